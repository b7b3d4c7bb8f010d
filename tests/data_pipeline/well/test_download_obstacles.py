"""Downloaded files that something keeps from being read may be whole: they stay, and their bytes do not come again."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from faulty_server import FaultyServer
from obstacles import compress_with_blosc, opened_for_writing, ordinary_user

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.well.download import damage, download

NAME = "gray_scott_reaction_diffusion"


@pytest.fixture
def server(tiny_well: Path, tmp_path: Path) -> Iterator[FaultyServer]:
    shutil.copytree(tiny_well / NAME, tmp_path / "served" / NAME)
    with FaultyServer(tmp_path / "served") as server:
        yield server


def get(server: FaultyServer, out: Path) -> None:
    download(out, load_registry(), [NAME], ["train"], first_only=True, source=server.url, jobs=1)


def failure(server: FaultyServer, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        get(server, out)
    assert "1 files failed" in str(caught.value)
    assert "truncated" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_locked_or_not_readable_stays(server: FaultyServer, tmp_path: Path) -> None:
    """A whole file under its final name, then one whose last byte has come and whose name is `.part`."""
    source = min((server.folder / NAME / "data" / "train").iterdir())
    name, out = str(source.relative_to(server.folder)), tmp_path / "out"
    path = out / "datasets" / name
    path.parent.mkdir(parents=True)
    shutil.copy(source, path)
    with opened_for_writing(path):
        assert f"{name}: {path}: another program has it open for writing: wait until" in failure(server, out)
    path.chmod(0)
    with ordinary_user(), pytest.raises(UserError, match=r"you have no permission to read it: `chmod u\+r` it"):
        damage(path, None)
    path.chmod(0o600)
    partial = path.rename(f"{path}.part")
    with opened_for_writing(partial):
        assert f"{name}: {partial}: another program has it open for writing: wait until" in failure(server, out)
    get(server, out)
    assert path.read_bytes() == source.read_bytes()
    assert server.sent.get(name, 0) == 0


def test_a_file_with_a_filter_that_is_not_installed_stays(server: FaultyServer, tmp_path: Path) -> None:
    source = min((server.folder / NAME / "data" / "train").iterdir())
    with h5py.File(source, "r+") as file:
        compress_with_blosc(file, "t0_fields/A")
    said = failure(server, tmp_path / "out")
    assert "is whole and was kept, but cannot be used with the card" in said
    assert "filter 32001" in said
    assert "h5repack -f GZIP=4" in said
    assert list((tmp_path / "out").rglob("*.hdf5"))
