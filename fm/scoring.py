"""From one stored file of errors to every score.

An evaluation stores, per (trajectory, step, channel), the mean squared error of each predictor and the variance of the
target. Any window, average or eps is recomputed from that file without the model:

    VRMSE = sqrt(mean over x, y of (prediction - truth)^2 / (variance of the truth over x, y + eps))

with the unbiased variance, as The Well defines it. Beside the model stand two predictors that know no physics.
`persistence` repeats the last frame it saw: the input of a one-step window, the initial frame held through a rollout.
`mean_field` is the target frame's own spatial mean, so its VRMSE is 1 by definition, but for eps and the n-1 in the
variance: a model above 1 does worse than any single number.

Array legend: R trajectories, S steps, C state channels.
"""

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from fm.protocol import Protocol, Window, check_same_rollouts

FORMAT = 1
PREDICTORS = ("model", "persistence", "mean_field")
TASKS = ("one_step", "rollout")
_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


@dataclass(frozen=True)
class Errors:
    """Errors of one task (one-step or rollout) on one dataset, float64, squared physical units, each (R, S, C).

    Step index t is, one-step, the window that predicts frame t + 1 from frame t; in a rollout, prediction number t + 1.
    All are NaN at a step that was not measured: beyond the end of a trajectory, or a window left out of a subset.
    """

    variance: np.ndarray  # of the target over x, y, unbiased; always finite where measured
    model: np.ndarray  # mean squared error over x, y, as are the next two
    persistence: np.ndarray
    mean_field: np.ndarray

    @classmethod
    def empty(cls, num_trajectories: int, num_steps: int, num_channels: int) -> "Errors":
        """All NaN, to be filled in: arrays (R, S, C)."""
        return cls(*(np.full((num_trajectories, num_steps, num_channels), np.nan) for _ in range(4)))

    @property
    def present(self) -> np.ndarray:
        """(R, S) bool: the steps that were measured."""
        return ~np.isnan(self.variance).any(axis=-1)

    @property
    def steps(self) -> np.ndarray:
        """(R,) int64: how many steps of each trajectory were measured."""
        return self.present.sum(axis=1)

    def vrmse(self, predictor: str, eps: float) -> np.ndarray:
        """VRMSE (R, S, C) of a predictor: +inf where a prediction was not finite, NaN where there is no such step."""
        error = np.sqrt(getattr(self, predictor) / (self.variance + eps))
        return np.where(self.present[..., None] & ~np.isfinite(error), np.inf, error)

    def first_failures(self) -> np.ndarray:
        """(R,) int64: the 1-based step at which the model first was not finite, 0 where it always was."""
        failed = self.present & ~np.isfinite(self.model).all(axis=-1)
        return np.where(failed.any(axis=1), failed.argmax(axis=1) + 1, 0) if failed.size else np.zeros_like(self.steps)


@dataclass(frozen=True)
class DatasetErrors:
    """All errors of one dataset: channel names (C), trajectory ids (R,), the two tasks, the digest of the manifest."""

    channels: tuple[str, ...]
    trajectories: np.ndarray
    one_step: Errors
    rollout: Errors
    data_digest: str


@dataclass(frozen=True)
class ErrorFile:
    """What one evaluation measured, with the protocol it ran under and, as plain JSON, whose errors they are."""

    protocol: Protocol
    datasets: dict[str, DatasetErrors]
    origin: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a plain .npz, without pickled objects; complete or not at all. UserError when the disk is full."""
        head = {"format": FORMAT, "protocol": self.protocol.to_json(), "datasets": sorted(self.datasets)}
        head["origin"] = self.origin
        arrays: dict[str, Any] = {"head": np.array(json.dumps(head, sort_keys=True))}
        for name, errors in sorted(self.datasets.items()):
            arrays[f"{name}/channels"] = np.array(errors.channels, np.str_)
            arrays[f"{name}/data_digest"] = np.array(errors.data_digest)
            arrays[f"{name}/trajectories"] = np.asarray(errors.trajectories, np.int64)
            for task in TASKS:
                for part in dataclasses.fields(Errors):
                    arrays[f"{name}/{task}/{part.name}"] = getattr(getattr(errors, task), part.name)
        with atomic_file(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "ErrorFile":
        """Read `save`'s file. UserError where it is missing, damaged, or of another format."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            head = json.loads(str(arrays["head"]))
        except FileNotFoundError:
            raise UserError(f"{path}: expected an error file, found none: `fm evaluate RUN` writes it") from None
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: expected the errors.npz of an evaluation, got {error!r}; evaluate again"
            ) from None
        if head["format"] != FORMAT:
            raise UserError(f"{path}: expected an error file of format {FORMAT}, got {head['format']}: evaluate again")
        datasets = {name: _unpack(arrays, name) for name in head["datasets"]}
        return cls(Protocol.from_json(head["protocol"]), datasets, head["origin"])


def _unpack(arrays: Mapping[str, np.ndarray], name: str) -> DatasetErrors:
    tasks = {
        task: Errors(**{part.name: arrays[f"{name}/{task}/{part.name}"] for part in dataclasses.fields(Errors)})
        for task in TASKS
    }
    channels = tuple(str(channel) for channel in arrays[f"{name}/channels"])
    digest = str(arrays[f"{name}/data_digest"])
    return DatasetErrors(channels, arrays[f"{name}/trajectories"], **tasks, data_digest=digest)


def aggregate(values: np.ndarray, protocol: Protocol, statistic: str) -> float | None:
    """One number from VRMSE (R, S, C): `statistic` over trajectories, the protocol's choice for the rest.

    A prediction that was not finite enters as +inf: it raises a median and voids a mean, and is never left out.
    None where the number is not finite, or nothing is there to average.
    """
    if not values.size:
        return None
    frames = _STATISTICS[protocol.channels](values, axis=2)  # (R, S)
    if protocol.order == "per_step":
        value = _STATISTICS[protocol.steps](_STATISTICS[statistic](frames, axis=0))
    else:
        value = _STATISTICS[statistic](_STATISTICS[protocol.steps](frames, axis=1))
    return float(value) if np.isfinite(value) else None


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """exp of the mean log. None where a value is missing or not positive: a mean over the others would flatter."""
    positive = [value for value in values if value is not None and value > 0]
    if not positive or len(positive) < len(values):
        return None
    return math.exp(sum(math.log(value) for value in positive) / len(positive))


def score(errors: ErrorFile, protocol: Protocol | None = None) -> dict[str, Any]:
    """All scores as strict JSON (null for what is not finite or not there), under `protocol` or the file's own.

    `datasets.<name>` has `one_step` and `windows.<window>`, each with the model's `median` and `mean`, `persistence`
    and `mean_field` (by the protocol's statistic), `ratio_to_persistence`, the same under `per_channel`, `count` (of
    one-step windows, of trajectories that cover the whole window) and `diverged` (how many of them were not finite).
    A window that no trajectory covers whole is null. `datasets.<name>.diverged`: trajectory id -> first failed step.
    UserError where the protocol needs other rollouts than the file holds.
    """
    protocol = protocol or errors.protocol
    check_same_rollouts(errors.protocol, protocol)
    datasets = {name: _score_dataset(part, protocol) for name, part in sorted(errors.datasets.items())}
    windows = {
        window: geometric_mean(
            [(part["windows"][window] or {}).get("ratio_to_persistence") for part in datasets.values()]
        )
        for window in protocol.windows
    }
    return {
        "format": FORMAT,
        "origin": errors.origin,
        "protocol": protocol.to_json(),
        "datasets": datasets,
        "geometric_mean_ratio_to_persistence": geometric_mean(
            [part["one_step"]["ratio_to_persistence"] for part in datasets.values()]
        ),
        "geometric_mean_ratio_to_persistence_windows": windows,
        "diverged": sum(len(part["diverged"]) for part in datasets.values()),
    }


def _score_dataset(errors: DatasetErrors, protocol: Protocol) -> dict[str, Any]:
    failures = zip(errors.trajectories.tolist(), errors.rollout.first_failures().tolist(), strict=True)
    return {
        "data_digest": errors.data_digest,
        "channels": list(errors.channels),
        "trajectories": len(errors.trajectories),
        "horizon": int(errors.rollout.steps.max(initial=0)),
        "one_step": _score_one_step(errors, protocol),
        "windows": {name: _score_window(errors, window, protocol) for name, window in protocol.windows.items()},
        "diverged": {str(trajectory): step for trajectory, step in failures if step},
    }


def _score_one_step(errors: DatasetErrors, protocol: Protocol) -> dict[str, Any]:
    """Every window counts as one trajectory of one step."""
    present = errors.one_step.present
    vrmse = {name: errors.one_step.vrmse(name, protocol.eps)[present][:, None] for name in PREDICTORS}  # (R*S, 1, C)
    return _columns(vrmse, errors.channels, protocol)


def _score_window(errors: DatasetErrors, window: Window, protocol: Protocol) -> dict[str, Any] | None:
    """Scores over the trajectories that cover the whole window; None where none does."""
    steps = window.steps(int(errors.rollout.steps.max(initial=0)))
    if steps is None:
        return None
    first, last = steps
    covered = errors.rollout.steps >= last
    vrmse = {name: errors.rollout.vrmse(name, protocol.eps)[covered, first - 1 : last] for name in PREDICTORS}
    return {"first": first, "last": last, **_columns(vrmse, errors.channels, protocol)}


def _columns(vrmse: Mapping[str, np.ndarray], channels: Sequence[str], protocol: Protocol) -> dict[str, Any]:
    """The scores of one block of frames, VRMSE (R, S, C) of each predictor: over all channels, then by channel."""
    return {
        **_averages(vrmse, protocol),
        "count": len(vrmse["model"]),
        "diverged": int(np.isinf(vrmse["model"]).any(axis=(1, 2)).sum()),
        "per_channel": {
            channel: _averages({name: values[..., index : index + 1] for name, values in vrmse.items()}, protocol)
            for index, channel in enumerate(channels)
        },
    }


def _averages(vrmse: Mapping[str, np.ndarray], protocol: Protocol) -> dict[str, float | None]:
    """Median and mean of the model, the protocol's statistic of the others, and model over persistence."""
    model = {statistic: aggregate(vrmse["model"], protocol, statistic) for statistic in ("median", "mean")}
    others = {name: aggregate(vrmse[name], protocol, protocol.trajectories) for name in PREDICTORS[1:]}
    ours, persistence = model[protocol.trajectories], others["persistence"]
    ratio = ours / persistence if ours is not None and persistence else None
    return {**model, **others, "ratio_to_persistence": ratio}
