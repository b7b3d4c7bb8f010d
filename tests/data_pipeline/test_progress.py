"""Long commands show in a log that they go on: a line a minute, which is every line where a minute is no time."""

import re
from pathlib import Path

import foreign_files as foreign
import pytest

from data_pipeline.cli import main
from data_pipeline.progress import progress_bar
from data_pipeline.registry import VARIABLE

ROOT = Path(__file__).parents[2]


def test_all_bars_have_the_lines_of_a_log() -> None:
    files = [path for folder in ("fm", "data_pipeline") for path in (ROOT / folder).rglob("*.py")]
    named = [path.name for path in files if re.search(r"^\s*(import|from) tqdm", path.read_text(), re.MULTILINE)]
    assert named == ["progress.py"]


def test_commands_print_lines_when_redirected(
    tiny_well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    small = ["--datasets", "helmholtz_staircase", "--jobs", "1"]
    foreign.npz(Path("a.npz"))
    stated = ["--dims", "n,t,x,y", "--boundary", "x=periodic,y=wall"]
    commands = {
        r"simulate: 1 of \d+ sets in \d+ s": ["simulate", "--preset", "tiny", "--out", "well", *small],
        r"shards: \d+ of \d+ MB in \d+ s": ["shard", "--well", str(tiny_well), "--out", "shards", *small],
        r"verify: \d+ of \d+ MB in \d+ s": ["verify", "shards"],
        r"audit: \d+ of \d+ MB in \d+ s": ["audit", str(tiny_well), *small],
        r"import mine: 20 of 20 frames in \d+ s": ["import", "a.npz", "--name", "mine", "--out", "out", *stated],
    }
    for line, command in commands.items():
        assert main(command) == 0
        assert re.search(f"^{line}", capsys.readouterr().err, re.MULTILINE)


def test_lines_tell_what_is_done_and_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter((0.0, 30.0, 60.0, 61.0, 300.0, 301.0, 400.0, 9000.0))
    monkeypatch.setattr("data_pipeline.progress.time.monotonic", lambda: next(now))
    with progress_bar(total=4, initial=1, desc="bake", unit="cake") as bar:
        bar.set_postfix_str("lemon")
        bar.update()  # half a minute after the start
        bar.update()  # a minute
        bar.refresh()  # five minutes
        bar.update()  # 100 s after the line before
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "bake: 3 of 4 cakes in 61 s, about 30 s left, lemon",
        "bake: 3 of 4 cakes in 5 min, about 3 min left, lemon",
        "bake: 4 of 4 cakes in 2.5 h, lemon",
    ]
