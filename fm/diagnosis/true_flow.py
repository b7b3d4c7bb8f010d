"""How fast the true flow parts from itself, where it can be simulated again: twins of a mini-Well's trajectories."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.miniwell.system import ParameterSet
from data_pipeline.miniwell.task import load_system
from data_pipeline.miniwell.twins import twin_states
from data_pipeline.miniwell.well_file import file_name, split_rows
from data_pipeline.remote import is_url
from data_pipeline.windows.reader import ShardReader

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
