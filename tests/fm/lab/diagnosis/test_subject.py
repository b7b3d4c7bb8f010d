"""Twins of the trajectories that shards hold, found through the folder that says how they were simulated."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.lab.diagnosis.subject import sibling_well, twins_of


def reader_of(shards: Path, dataset: str, split: str = "test") -> ShardReader:
    return open_readers(shards, [dataset], split)[dataset]


def origin(folder: Path, dataset: str, **marker: object) -> Path:
    """A folder that says something of how `dataset` was simulated."""
    (folder / dataset).mkdir(parents=True)
    (folder / dataset / "simulation.json").write_text(json.dumps(marker))
    return folder


@pytest.mark.parametrize("dataset", ["rayleigh_benard", "active_matter", "gray_scott_reaction_diffusion"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_first_twin_is_what_the_shards_hold(tiny_shards: Path, tiny_well: Path, dataset: str, split: str) -> None:
    """Channels in the shards' order, the right parameter set and the right place in it."""
    reader = reader_of(tiny_shards, dataset, split)
    chosen = tuple(range(reader.num_trajectories))
    twins = twins_of(reader, tiny_well, chosen)
    for row, index in enumerate(chosen):
        stored = reader.trajectory_frames(index, 0, reader.num_frames(index))
        np.testing.assert_array_equal(twins[row, 0].astype(np.float32), stored)
        assert 0 < np.abs(twins[row, 1] - twins[row, 0]).max() < 1


def test_the_folder_beside_the_shards_is_tried(tiny_shards: Path, tiny_well: Path, tmp_path: Path) -> None:
    assert sibling_well(tiny_shards) == tiny_well
    assert sibling_well(tmp_path / "shards") is None
    assert sibling_well("https://example.org/shards") is None


def test_another_seed_or_preset_is_noticed(tiny_shards: Path, tmp_path: Path) -> None:
    reader = reader_of(tiny_shards, "shear_flow")
    other = origin(tmp_path / "seed", "shear_flow", preset="tiny", seed=5)
    with pytest.raises(UserError, match=r"trajectory 0 is not the one that .*shear_flow says it simulated"):
        twins_of(reader, other, (0,))
    reader = reader_of(tiny_shards, "rayleigh_benard")
    other = origin(tmp_path / "preset", "rayleigh_benard", preset="mini", seed=0)
    with pytest.raises(UserError, match=r"trajectory 0 comes from .*hdf5, which the simulation does not make"):
        twins_of(reader, other, (0,))


def test_a_folder_that_says_nothing_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    reader = reader_of(tiny_shards, "shear_flow")
    with pytest.raises(UserError, match=r"simulation\.json: expected what `data-pipeline simulate` writes"):
        twins_of(reader, tmp_path, (0,))
    with pytest.raises(UserError, match="got KeyError: 'huge'"):
        twins_of(reader, origin(tmp_path, "shear_flow", preset="huge", seed=0), (0,))
