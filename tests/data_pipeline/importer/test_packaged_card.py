"""`data-pipeline import` of data that a packaged card describes: PDEArena's smoke."""

import shlex
from pathlib import Path

import foreign_files as foreign
import numpy as np
import pytest
from foreign_files import TRUTH, T

from data_pipeline.cli import main
from data_pipeline.registry import VARIABLE, load_registry
from data_pipeline.well.hdf5 import WellFile

PDEARENA = "pdearena_navier_stokes"


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def run(files: str, options: str) -> int:
    return main(["import", files, "--name", PDEARENA, "--out", "out", *shlex.split(options)])


def test_the_packaged_card_describes_an_import_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """PDEArena's smoke, a file for each split: no second card is drafted, and the packaged one makes the shards."""
    for split, chosen in {"train": slice(0, 2), "valid": slice(2, 3), "test": slice(3, 4)}.items():
        foreign.pdearena(Path(f"NavierStokes2D_{split}.h5"), {split: chosen})
    assert run("*.h5", "--shards shards") == 0
    said = capsys.readouterr().out
    assert f"The package has the card {PDEARENA}, and it describes these fields." in said
    assert f"shards/{PDEARENA}/test: " in said
    assert not Path("out/cards").exists()
    card = load_registry().card(PDEARENA)
    with WellFile(Path(f"out/{PDEARENA}/data/train/{PDEARENA}.hdf5"), card) as file:
        assert np.array_equal(file.read(0, 0, T)[:, 0], TRUTH[0])
        assert file.scalars(1) == pytest.approx({"buo_y": 0.3})
        assert file.dt(0) == pytest.approx(0.25)
    assert Path(f"shards/{PDEARENA}/test/manifest.json").is_file()


def test_other_data_do_not_get_the_packaged_card(capsys: pytest.CaptureFixture[str]) -> None:
    foreign.pdearena(Path("a.h5"), {"train": slice(0, 2), "valid": slice(2, 3), "test": slice(3, 4)})
    for options in ("--boundary x=periodic,y=wall", "--map u=dye --vector velocity=vx,vy"):
        assert run("a.h5", options) == 2
        said = capsys.readouterr().err
        assert f"there is a card '{PDEARENA}' already, and it describes other data: fields smoke, velocity" in said
        assert "Choose another --name" in said
        assert not Path("out").exists()
