"""Extensions that are refused, with one message and nothing written."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from extensions import CARD, refused
from handmade import make_spec
from handmade_export import exported

from data_pipeline.errors import UserError
from data_pipeline.shards.format import MANIFEST_NAME, Manifest
from fm.checkpoint import load_pretrained
from fm.model.baselines import Baseline, BaselineConfig
from fm.model.wavelit import WaveLiTFM
from fm.share.extend import Rows, extend, extend_model


def test_wrong_datasets_are_refused(burgers: Path, tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    out = tmp_path / "new"
    assert f"--dataset shear_flow: expected a dataset that {trained} does not know" in (
        said := refused(trained, tiny_shards, out, "rayleigh_benard", "shear_flow")
    )
    assert "acoustic_scattering_maze, helmholtz_staircase, shear_flow" in said
    assert "Did you mean 'rayleigh_benard'?" in refused(trained, tiny_shards, out, "rayleigh_bernard")
    assert "expected the name of a dataset, or its card" in refused(trained, tiny_shards, out, "cards/burgers.yaml")
    loose = tmp_path / "burgers.yaml"
    loose.write_text(CARD)
    assert "got a card that is not in a folder datasets" in refused(trained, tiny_shards, out, str(loose))
    registry = str(burgers / "cards")
    said = refused(trained, tiny_shards, out, "burgers", registry=registry)
    assert "no train shards under" in said
    other = tmp_path / "cards" / "datasets"
    other.mkdir(parents=True)
    (other / "burgers.yaml").write_text(CARD.replace("burgers_", ""))
    said = refused(trained, burgers / "shards", out, "burgers", registry=str(tmp_path / "cards"))
    assert "the shards hold the state channels burgers_tracer" in said


def test_wrong_rows_are_refused(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    for rows, said in {
        "zeros": "expected zero, nearest, drawn, or NEW=OLD,... with each unseen channel once, got 'zeros'",
        "buoyancy=": "got 'buoyancy='",
        "buoyancy=tracer,buoyancy=density": "each unseen channel once",
        "bouyancy=tracer": "expected a channel that the model has not seen, got 'bouyancy'. Did you mean 'buoyancy'?",
        "pressure=tracer": "expected a channel that the model has not seen, got 'pressure'",
        "buoyancy=trace": "expected a channel of the model, got 'trace'. Did you mean 'tracer'?",
    }.items():
        assert said in refused(trained, tiny_shards, tmp_path / "new", "rayleigh_benard", rows=rows)


def test_a_folder_that_is_there_or_cannot_be_is_refused(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken: expected a folder that is not there yet"):
        extend(str(trained), ["rayleigh_benard"], str(tiny_shards), tmp_path / "taken", "zero")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*\); nothing was kept"):
        extend(str(trained), ["rayleigh_benard"], str(tiny_shards), tmp_path / "file" / "new", "zero")


def test_a_model_without_room_for_more_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("ptwt")
    config = BaselineConfig("wno", {"width": 8, "depth": 2, "levels": 3})
    exported(Baseline(config, [make_spec("shear_flow")]), tmp_path / "wno", tiny_shards)
    said = refused(tmp_path / "wno", tiny_shards, tmp_path / "new", "rayleigh_benard")
    assert "expected a WaveLiT, got a baseline" in said
    assert "(shear_flow)" in said
    assert "no checkpoint found" in refused(tmp_path / "nothing", tiny_shards, tmp_path / "new", "rayleigh_benard")


def test_shards_that_the_model_cannot_take_are_refused(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    shutil.copytree(tiny_shards / "rayleigh_benard" / "train", tmp_path / "shards" / "rayleigh_benard" / "train")
    file = tmp_path / "shards" / "rayleigh_benard" / "train" / MANIFEST_NAME
    replace(Manifest.load(file), boundary=(("PERIODIC", "WALL"), ("WALL", "WALL"))).save(file)
    said = refused(trained, tmp_path / "shards", tmp_path / "new", "rayleigh_benard")
    assert "dataset rayleigh_benard: x is periodic at one end only" in said
    assert "Make the shards again" in said

    model = load_pretrained(trained)
    assert isinstance(model, WaveLiTFM)
    bare = replace(make_spec("rayleigh_benard"), stats={})
    with pytest.raises(ValueError, match="dataset rayleigh_benard: no statistic 'mean' for channels buoyancy"):
        extend_model(model, [bare], {"buoyancy": Rows("zero")})
