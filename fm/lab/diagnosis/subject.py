"""The subject of a diagnosis: one model on one dataset, and twins of the trajectories for the growth of the true flow.

A twin is a second simulation from an initial state that differs slightly. It can be made only for the mini-Well's
datasets, whose simulations can be run again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.files import load_json
from data_pipeline.miniwell.generate import file_name, load_system, split_rows
from data_pipeline.miniwell.system import ParameterSet
from data_pipeline.miniwell.twins import twin_states
from data_pipeline.progress import progress_bar
from data_pipeline.remote import is_url
from data_pipeline.windows.loader import ShardPlaces, shard_places
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.samples import evenly_spaced
from fm.lab.diagnosis.growth import Step
from fm.model.surrogate import Surrogate, next_frames

SAME = 0.01  # rms distance, in std, below which two first frames are equal: float16 rounds to 0.001


class Subject:
    """One model on one dataset, in evaluation mode and without gradients of its parameters.

    Frames are normalized as the model normalizes them, so that every channel counts by its own spread. What the model
    reads, n frames of C channels, is its state: (B, n C, H, W), the oldest frame first.
    """

    def __init__(self, model: Surrogate, reader: ShardReader, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.reader, self.device, self.dataset = reader, device, reader.dataset
        self.context = model.context

    def frames(self, trajectories: Sequence[int], num_frames: int) -> Tensor:
        """Return the first frames of trajectories, normalized: (R, T, C, H, W) on the CPU."""
        frames = np.stack([self.reader.trajectory_frames(index, 0, num_frames) for index in trajectories])
        return self.model.normalize(torch.from_numpy(frames).to(self.device), self.dataset).cpu()

    def physical(self, frames: Tensor) -> np.ndarray:
        """Return normalized frames (..., C, H, W) in physical units."""
        return self.model.denormalize(frames.to(self.device), self.dataset).cpu().numpy()

    def state(self, frames: Tensor, index: int) -> Tensor:
        """Return the state (B, n C, H, W) that begins with frame `index` of frames (B, T, C, H, W), on the device."""
        return frames[:, index : index + self.context].flatten(1, 2).to(self.device)

    def newest(self, states: Tensor) -> Tensor:
        """Return the newest frame (B, C, H, W) of states, on the CPU."""
        return states.unflatten(1, (self.context, -1))[:, -1].cpu()

    def step(self, trajectories: Sequence[int]) -> Step:
        """Return the map from states of these trajectories (B, n C, H, W), in their order, to the next states."""
        constants = torch.from_numpy(np.stack([self.reader.constants(index) for index in trajectories]))
        fixed = self.model.normalize_constants(constants.to(self.device), self.dataset)
        given = self.reader.scalars(trajectories)
        scalars = self.model.normalize_scalars(given, self.dataset, len(trajectories), self.device)

        def step(states: Tensor) -> Tensor:
            frames = states.unflatten(1, (self.context, -1))
            return next_frames(frames, self.model(frames, fixed, self.dataset, scalars)).flatten(1, 2)

        return step

    def pairs(self, reader: ShardReader, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return states (B, n C, H, W) and the frames after them (B, C, H, W), on the CPU, of a reader's windows."""
        fields = self.model.normalize(reader.batch(ids, self.context + 1).fields.to(self.device), self.dataset).cpu()
        return fields[:, :-1].flatten(1, 2), fields[:, -1]


def choose_trajectories(reader: ShardReader, count: int) -> tuple[int, ...]:
    """Choose up to `count` of the longest trajectories, evenly spaced, because parameters change along the list."""
    frames = [reader.num_frames(index) for index in range(reader.num_trajectories)]
    longest = [index for index, length in enumerate(frames) if length == max(frames)]
    return tuple(longest[place] for place in evenly_spaced(len(longest), count))


def sibling_well(shards: ShardPlaces) -> Path | None:
    """Return the folder `well` beside a folder of the shards, where the quickstart simulates, if there is one."""
    wells = [Path(place).parent / "well" for place in shard_places(shards) if not is_url(place)]
    return next((well for well in wells if well.is_dir()), None)


def twins_of(reader: ShardReader, well: Path, trajectories: Sequence[int]) -> np.ndarray:
    """Simulate these trajectories of the shards and their twins again, as in <well>/<dataset>.

    Returns float64 (R, 2, T, C, X, Y). Raises UserError if <well>/<dataset> does not describe its simulation, or the
    shards hold another one.
    """
    file = well / reader.dataset / "simulation.json"
    try:
        marker: Any = load_json(file.read_text())
        preset, seed = marker["preset"], int(marker["seed"])
        sets = load_system(reader.dataset).presets[preset].parameter_sets
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{file}: expected what `data-pipeline simulate` writes, with preset and seed, got "
            f"{type(error).__name__}: {error}. Give `fm diagnose --well` the folder that `data-pipeline "
            "simulate --out` was given."
        ) from error
    pairs = []
    for index in progress_bar(trajectories, desc="simulate twins", unit="pair", leave=False):
        number, place = _locate(reader, index, sets)
        pair = twin_states(reader.dataset, preset, number, place, seed)
        _check_same(reader, index, pair[0, 0], well)
        pairs.append(pair)
    return np.stack(pairs)


def _locate(reader: ShardReader, index: int, sets: Sequence[ParameterSet]) -> tuple[int, int]:
    """Return the parameter set of a trajectory of the shards, and its place in that set over all splits."""
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
    """Raise UserError if the simulated first frame (C, X, Y) differs from the stored one."""
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
