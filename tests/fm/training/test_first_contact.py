"""A recipe of the paper without all of The Well: what is there, how to train on it, and a question before toy data."""

import re
from pathlib import Path

import pytest
from whole_runs import ROOT, log

from data_pipeline.windows.loader import open_readers
from fm.checkpoint import newest_checkpoint, read_state
from fm.config import load_recipe
from fm.recipe import main

PAPER = str(ROOT / "recipes" / "fm_pretrain.yaml")
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "train.warmup_steps=1", "tracking.progress=false"]
TWO = ["helmholtz_staircase", "shear_flow"]


def part_of(shards: Path, folder: Path, names: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).symlink_to(shards / name)
    return f"data.shards={folder}"


def test_part_of_the_data_ends_in_the_override_that_trains_on_it(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = part_of(tiny_shards, tmp_path / "shards", TWO)
    assert main(PAPER, [shards]) == 2
    said = capsys.readouterr().err
    assert "2 of 8 datasets are there: helmholtz_staircase, shear_flow. To train on them:\n" in said
    override = re.search(r"^  (data.datasets=\S+), or data.datasets=available$", said, re.MULTILINE)
    assert override is not None
    assert load_recipe(Path(PAPER), [override[1]]).data.datasets == TWO
    assert "--datasets acoustic_scattering_maze,active_matter,gray_scott_reaction_diffusion,rayleigh_benard," in said
    assert "simulate" not in said
    (tmp_path / "shards" / "shear_flow").unlink()
    (tmp_path / "shards" / "helmholtz_staircase").unlink()
    assert main(PAPER, [shards, "data.datasets=available"]) == 2
    said = capsys.readouterr().err
    assert f"no train shards under {tmp_path / 'shards'}" in said
    assert "data-pipeline shard --well data/mini/well --out data/mini/shards" in said


def test_a_paper_length_run_on_toy_data_asks_first(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [part_of(tiny_shards, tmp_path / "shards", TWO), "data.datasets=available", *SMALL, f"run.dir={tmp_path}/run"]
    assert main(PAPER, run) == 2
    said = capsys.readouterr()
    assert "data.datasets: available: helmholtz_staircase, shear_flow" in said.out
    assert said.err.startswith("error: is this meant? 1,000,000 steps (train.steps) pass\n")
    assert re.search(r"^  [\d,]+ times over shear_flow: \d+ pairs of frames of \d+ x \d+; the pub", said.err, re.M)
    assert re.search(r"train.steps=\d+ passes at most 40 times", said.err)
    assert not (tmp_path / "run").exists()
    short = ["validation.every=0", "train.steps=100_000", "sampling.max_passes=null"]
    assert main(PAPER, [*run, *short, "run.stop_at=1"]) == 0  # the answer
    assert "warning" not in capsys.readouterr().err


def test_available_is_recorded_and_a_run_goes_on_with_what_it_began_with(tiny_shards: Path, tmp_path: Path) -> None:
    first = part_of(tiny_shards, tmp_path / "shards", TWO[:1])
    run = [first, "data.datasets=available", *SMALL, f"run.dir={tmp_path}/run", "train.steps=4", "validation.every=0"]
    assert main(PAPER, [*run, "run.stop_at=2"]) == 0
    part_of(tiny_shards, tmp_path / "shards", TWO[1:])
    assert list(open_readers(tmp_path / "shards", None, "train")) == TWO
    assert main(PAPER, run) == 0
    assert [line["dataset"] for line in log(tmp_path / "run")] == TWO[:1] * 4
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints", print)
    assert newest is not None
    assert read_state(newest)["recipe"]["data"]["datasets"] == TWO[:1]
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.datasets == TWO[:1]
