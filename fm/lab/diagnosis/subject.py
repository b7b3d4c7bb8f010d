"""How fast the true flow parts from itself, where it can be simulated again: twins of a mini-Well's trajectories.

What is diagnosed: one model on one dataset.

What a diagnosis measured, as numbers: `R` trajectories, `K` rollout steps.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.files import UserError
from data_pipeline.miniwell.system import ParameterSet
from data_pipeline.miniwell.task import file_name, load_system, split_rows
from data_pipeline.miniwell.twins import twin_states
from data_pipeline.remote import is_url
from data_pipeline.windows.reader import ShardReader
from fm.lab.diagnosis.quantities import Bands, Drift, Recurrence, Spectra, Step
from fm.model.surrogate import Surrogate

SAME = 0.01  # rms distance, in std, up to which a simulated first frame is the stored one: float16 rounds to 0.001


def sibling_well(shards: str | Path) -> Path | None:
    """The folder `well` beside the shards' folder, where the quickstart simulates; None if there is none."""
    well = Path(shards).parent / "well"
    return well if not is_url(shards) and well.is_dir() else None


def twins_of(
    reader: ShardReader, well: Path, trajectories: Sequence[int], advance: Callable[[int], object] = lambda count: None
) -> np.ndarray:
    """These trajectories of the shards and their twins, float64 (R, 2, T, C, X, Y), simulated as in <well>/<dataset>.

    UserError where the folder does not say how it was simulated, or where the shards hold something else.
    """
    preset, seed = _origin(well, reader.dataset)
    sets = load_system(reader.dataset).presets[preset].parameter_sets
    pairs = []
    for index in trajectories:
        number, place = _place(reader, index, sets)
        pair = twin_states(reader.dataset, preset, number, place, seed)
        _check_same(reader, index, pair[0, 0], well)
        pairs.append(pair)
        advance(1)
    return np.stack(pairs)


def _origin(well: Path, dataset: str) -> tuple[str, int]:
    """Preset and seed that <well>/<dataset> was simulated with."""
    file = well / dataset / "simulation.json"
    try:
        marker: Any = json.loads(file.read_text())
        preset, seed = marker["preset"], int(marker["seed"])
        load_system(dataset).presets[preset]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: expected what `data-pipeline simulate` writes, with preset and seed, got "
            f"{type(error).__name__}: {error}. Give --well the folder that `data-pipeline simulate --out` was given."
        ) from error
    return preset, seed


def _place(reader: ShardReader, index: int, sets: Sequence[ParameterSet]) -> tuple[int, int]:
    """Which parameter set a trajectory of the shards is of, and its place among the set's over all splits."""
    manifest = reader.manifest
    trajectory = manifest.trajectories[index]
    name = Path(manifest.sources[trajectory.source].name).name
    for number, parameter_set in enumerate(sets):
        rows = split_rows(parameter_set).get(manifest.split)
        if rows is not None and file_name(reader.dataset, parameter_set) == name:
            return number, rows.start + trajectory.source_index
    raise UserError(
        f"{reader.folder}: trajectory {index} comes from {name}, which the simulation does not make. Give --well the "
        "folder that the shards were made from."
    )


def _check_same(reader: ShardReader, index: int, first: np.ndarray, well: Path) -> None:
    """UserError where the simulated first frame (C, X, Y) is not the stored one."""
    stored = reader.trajectory_frames(index, 0, 1)[0]
    std = np.array([reader.manifest.stats["std"][name] for name in reader.manifest.state_channels])
    distance = np.inf
    if stored.shape == first.shape:
        distance = float(np.sqrt(np.square((stored - first) / std[:, None, None]).mean()))
    if not distance < SAME:
        raise UserError(
            f"{reader.folder}: trajectory {index} is not the one that {well / reader.dataset} says it simulated (they "
            f"are {distance:.2g} std apart). Give --well the folder that the shards were made from."
        )


class Subject:
    """One model on one dataset, in evaluation mode and without gradients of its parameters.

    States are normalised as the model normalises them, so that every channel counts by its own spread.
    """

    def __init__(self, model: Surrogate, reader: ShardReader, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.reader, self.device, self.dataset = reader, device, reader.dataset

    def states(self, trajectories: Sequence[int], num_frames: int) -> Tensor:
        """The first frames of trajectories, normalised: (R, T, C, H, W) on the CPU."""
        frames = np.stack([self.reader.trajectory_frames(index, 0, num_frames) for index in trajectories])
        return self.model.normalize(torch.from_numpy(frames).to(self.device), self.dataset).cpu()

    def physical(self, states: Tensor) -> np.ndarray:
        """Normalised states (..., C, H, W) in physical units."""
        return self.model.denormalize(states.to(self.device), self.dataset).cpu().numpy()

    def step(self, trajectories: Sequence[int]) -> Step:
        """The map from normalised states of these trajectories, in their order, to the next ones."""
        constants = torch.from_numpy(np.stack([self.reader.constants(index) for index in trajectories]))
        fixed = self.model.normalize_constants(constants.to(self.device), self.dataset)
        return lambda state: self.model(state, fixed, self.dataset)

    def pairs(self, reader: ShardReader, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Normalised states and next states (B, C, H, W) of windows of a reader of the same dataset, on the CPU."""
        fields = self.model.normalize(reader.batch(ids, 2).fields.to(self.device), self.dataset).cpu()
        return fields[:, 0], fields[:, 1]


def choose_trajectories(reader: ShardReader, count: int) -> tuple[int, ...]:
    """Up to `count` of the longest trajectories, evenly spaced: different parameters come in different places."""
    frames = [reader.num_frames(index) for index in range(reader.num_trajectories)]
    longest = [index for index, length in enumerate(frames) if length == max(frames)]
    places = np.unique(np.linspace(0, len(longest) - 1, min(count, len(longest))).round().astype(int))
    return tuple(longest[place] for place in places)


@dataclass(frozen=True)
class Growth:
    """Errors along the rollouts, (R, K) each, of normalised states unless said otherwise."""

    rollout: np.ndarray  # root mean square error after k steps
    one_step: np.ndarray  # of one step that starts from the truth
    vrmse: np.ndarray  # as the scores have it: physical units, mean over channels
    recurrence: Recurrence | None
    failed: tuple[int | None, ...]  # first step worse than the mean field, VRMSE above 1
    not_finite: tuple[int | None, ...]


@dataclass(frozen=True)
class Stability:
    """What a step does to small differences: growth factors (R, K), largest singular values (n,)."""

    along_truth: np.ndarray
    along_rollout: np.ndarray
    true_flow: np.ndarray | None  # of twins; None where the flow cannot be simulated again
    frames: tuple[int, ...]  # of the first trajectory: where the singular values were taken
    largest_along_truth: np.ndarray
    largest_along_rollout: np.ndarray


@dataclass(frozen=True)
class Floors:
    """Median one-step VRMSE over windows of the test split."""

    windows: int
    model: float
    pointwise: float  # the best linear map of a grid point's own channels
    persistence: float


@dataclass(frozen=True)
class Diagnosis:
    """All that was measured."""

    dataset: str
    origin: dict[str, object]  # checkpoint, step, data digest
    trajectories: tuple[int, ...]
    dt: float  # physical time of a step
    growth: Growth
    stability: Stability
    spectra: Spectra
    bands: Bands
    drifts: tuple[Drift, ...]
    floors: Floors

    @property
    def num_steps(self) -> int:
        return self.growth.rollout.shape[1]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON; what is not finite is null."""
        return {"num_steps": self.num_steps, **_plain(self)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
