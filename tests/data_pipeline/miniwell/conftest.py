"""The mini-Well with its extras, which the tests of this folder read and none may change."""

from pathlib import Path

import pytest

from data_pipeline.miniwell.generate import EIGHT, EXTRAS, simulate


@pytest.fixture(scope="session")
def full_well(tiny_well: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared mini-Well of eight, and the extras. Read only."""
    well = tmp_path_factory.mktemp("full")
    for name in EIGHT:
        (well / name).symlink_to(tiny_well / name)
    simulate(well, "tiny", EXTRAS, jobs=1)
    return well
