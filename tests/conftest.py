"""Data that many tests read and none may change."""

from pathlib import Path

import pytest

from data_pipeline.miniwell.generate import simulate
from data_pipeline.shards.build import build_shards


@pytest.fixture(scope="session")
def tiny_well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini-Well of all eight systems, 9 frames each. Read only."""
    well = tmp_path_factory.mktemp("tiny") / "well"
    simulate(well, preset="tiny", jobs=1)
    return well


@pytest.fixture(scope="session")
def tiny_shards(tiny_well: Path) -> Path:
    """Shards of the tiny mini-Well, with more than one chunk per trajectory. Read only."""
    shards = tiny_well.parent / "shards"
    build_shards(tiny_well, shards, jobs=1, frames_per_chunk=4)
    return shards
