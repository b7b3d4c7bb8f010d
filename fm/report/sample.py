"""What pictures of a rollout are drawn from, and the file that keeps it: pictures can be redrawn without the model."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from fm.scores.errors import DAMAGED, check_names

FORMAT = 1
Domain = tuple[tuple[float, float], tuple[float, float]]  # (lower, upper) of x, of y


@dataclass(frozen=True)
class Sample:
    """One channel of one rollout at some steps. Fields (n, H, W) in physical units, axis 0 of a field is x."""

    dataset: str
    channel: str
    trajectory: int
    dt: float  # physical time between frames
    steps: tuple[int, ...]  # rollout steps, 1-based and ascending
    truth: np.ndarray
    prediction: np.ndarray
    vrmse: np.ndarray  # (n,) of this channel
    domain: Domain | None = None  # physical extent of the grid; None where the card does not say

    @property
    def extent(self) -> Domain:
        """What the grid covers: the domain, or as many units as cells where there is none."""
        _, across, up = self.truth.shape
        return self.domain or ((0.0, float(across)), (0.0, float(up)))

    @property
    def lengths(self) -> tuple[float, float]:
        """Lengths of the extent along x and y."""
        (left, right), (bottom, top) = self.extent
        return right - left, top - bottom

    @property
    def spacing(self) -> tuple[float, float]:
        """Distances between grid points along x and y."""
        _, across, up = self.truth.shape
        return self.lengths[0] / across, self.lengths[1] / up

    @property
    def extent_text(self) -> str:
        """The extent in words, for captions."""
        if self.domain is None:
            return f"{self.truth.shape[1]} x {self.truth.shape[2]} cells, grid units"
        return ", ".join(f"{axis} {low:.3g}..{high:.3g}" for axis, (low, high) in zip("xy", self.domain, strict=True))

    def at(self, indices: Sequence[int]) -> "Sample":
        """The same rollout at fewer of its steps."""
        chosen = list(indices)
        return dataclasses.replace(
            self,
            steps=tuple(self.steps[index] for index in chosen),
            truth=self.truth[chosen],
            prediction=self.prediction[chosen],
            vrmse=self.vrmse[chosen],
        )


def spread_over(count: int, shown: int) -> list[int]:
    """Indices of `shown` of `count` things, or of all where there are fewer; evenly, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, shown)).round().astype(int)).tolist()


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write a plain .npz, without pickled objects; complete or not at all. UserError when the disk is full."""
    heads = [
        {
            "dataset": sample.dataset,
            "channel": sample.channel,
            "trajectory": sample.trajectory,
            "dt": sample.dt,
            "steps": sample.steps,
            "domain": sample.domain,
        }
        for sample in samples
    ]
    arrays: dict[str, Any] = {"head": np.array(json.dumps({"format": FORMAT, "samples": heads}))}
    for number, sample in enumerate(samples):
        for part in ("truth", "prediction", "vrmse"):
            arrays[f"{number}/{part}"] = getattr(sample, part)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def load_samples(path: Path) -> list[Sample]:
    """Read `save_samples`'s file. UserError where it is missing, damaged, or of another format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        head = json.loads(str(arrays["head"]))
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}, where {FORMAT} is known")
        return [_unpack(arrays, number, facts) for number, facts in enumerate(head["samples"])]
    except FileNotFoundError:
        raise UserError(f"{path}: expected the samples of an evaluation, found none: `fm evaluate` writes it") from None
    except DAMAGED as error:
        raise UserError(f"{path}: expected the samples.npz of an evaluation, got {error!r}; evaluate again") from None


def _unpack(arrays: Mapping[str, np.ndarray], number: int, facts: Mapping[str, Any]) -> Sample:
    truth, prediction, vrmse = (arrays[f"{number}/{part}"] for part in ("truth", "prediction", "vrmse"))
    steps = tuple(facts["steps"])
    if truth.ndim != 3 or prediction.shape != truth.shape or not len(truth) == len(vrmse) == len(steps) > 0:
        raise ValueError(
            f"sample {number}: truth {truth.shape}, prediction {prediction.shape}, vrmse {vrmse.shape} at "
            f"{len(steps)} steps"
        )
    check_names(facts["dataset"], [facts["channel"]])
    domain = facts["domain"]
    return Sample(
        dataset=facts["dataset"],
        channel=facts["channel"],
        trajectory=facts["trajectory"],
        dt=facts["dt"],
        steps=steps,
        truth=truth,
        prediction=prediction,
        vrmse=vrmse,
        domain=domain and ((domain[0][0], domain[0][1]), (domain[1][0], domain[1][1])),
    )
