"""`fm figure`: stored fields are drawn without the model, others by it; formats, refusals."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from fm.cli import main

MAZE = ["--dataset", "acoustic_scattering_maze"]


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The run of two datasets with its report, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def drawn(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[str], Path]:
    """What the command printed before the file, and the file."""
    assert main(["figure", *map(str, arguments)]) == 0
    *lines, file = capsys.readouterr().out.splitlines()
    return lines, Path(file)


def test_stored_fields_are_drawn_without_model_and_shards(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "checkpoints")
    lines, file = drawn(capsys, copied, *MAZE)
    assert lines == [f"stored fields: {copied / 'report' / 'samples.npz'}, of the weights of step 8"]
    assert file == copied / "report" / "figures" / "acoustic_scattering_maze_pressure_0.pdf"
    content = file.read_bytes()
    assert content.startswith(b"%PDF")
    assert b"TrueType" in content or b"/Type0" in content  # text, no outlines
    assert b"/CreationDate" not in content
    lines, same = drawn(capsys, copied / "report", *MAZE, "--out", copied / "again.pdf")
    assert same.read_bytes() == content


def test_formats(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, svg = drawn(capsys, copied, *MAZE, "--steps", "1,3", "--format", "svg")
    assert b"<svg" in svg.read_bytes()[:1000]
    assert b"<dc:date>" not in svg.read_bytes()
    _, png = drawn(capsys, copied, *MAZE, "--steps", "1", "--format", "png")
    with Image.open(png) as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert 3.4 * 300 < image.width <= 7 * 300


def test_another_channel_is_rolled_out(
    copied: Path, exported_model: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines, file = drawn(capsys, copied, *MAZE, "--channel", "velocity_x", "--steps", "2,5")
    assert lines[1] == f"rolling out: 8 steps of step_00000008 on {tiny_shards / MAZE[1] / 'test'}"
    assert file.name == "acoustic_scattering_maze_velocity_x_0.pdf"
    out = tmp_path / "mine.pdf"
    lines, file = drawn(capsys, exported_model, *MAZE, "--channel", "velocity_y", "--shards", tiny_shards, "--out", out)
    assert lines[-1].startswith("rolling out: ")
    assert (file, out.read_bytes()[:4]) == (out, b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1,x"], "--steps: expected numbers with commas between, such as 1,5,20; got 1,x"),
        (["--steps", "5,1"], "--steps: expected 1 to 8 steps of a rollout, ascending and from 1 on"),
        (["--steps", "0"], "--steps: expected 1 to 8 steps of a rollout, ascending and from 1 on"),
        (["--steps", "99"], "--steps: trajectory 0 of acoustic_scattering_maze has 8 steps to predict, got 99"),
        (["--trajectory", "-1"], "--trajectory: expected a number from 0 on, got -1"),
        (["--trajectory", "77"], "--trajectory: the test split of acoustic_scattering_maze has the trajectories 0 to"),
        (["--channel", "pressur"], "--channel: acoustic_scattering_maze has no 'pressur'. Did you mean 'pressure'?"),
        (["--dataset", "maze"], "--dataset: the model knows no 'maze'. "),
        (["--out", "."], "--out .: expected a file to write in an existing folder"),
        (
            ["--channel", "velocity_x", "--shards", "nowhere"],
            "this can be drawn of acoustic_scattering_maze: channel p",
        ),
    ],
)
def test_refusals_say_what_there_is(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["figure", str(run), *MAZE, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "report" / "figures").exists()


def test_stored_fields_of_other_weights_are_not_taken_for_those_of_a_checkpoint(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = copied / "checkpoints" / "step_00000006"
    lines, _ = drawn(capsys, earlier, *MAZE)
    assert lines[0].startswith("rolling out: 8 steps of step_00000006")
