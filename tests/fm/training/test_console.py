"""What a run shows: on a real pseudo-terminal, read back by a terminal emulator, and in a file."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
import pytest
from forked import Forked
from whole_runs import DATASETS, log, small, wait_for, written

from fm.config import Recipe

PANEL_TOP = "╭─ small ─"


class Terminal:
    """A script on a pseudo-terminal, and the screen that its user sees, with what has scrolled off.

    A `fresh` Python runs it, or a process that has torch already.
    """

    def __init__(self, script: Path, columns: int, rows: int, fresh: bool = False) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        self._resize(columns, rows)
        variables = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        self.process: subprocess.Popen[bytes] | Forked
        if fresh:
            command = [sys.executable, str(script)]
            self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=variables)
        else:
            self.process = Forked(script, environment=variables, terminal=slave)
        os.close(slave)

    def read(self) -> bool:
        """Show what has come; False at the end."""
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # Linux says so where the last process has closed its side
            data = b""
        self._stream.feed(data)
        return bool(data)

    def resize(self, columns: int, rows: int) -> None:
        self._resize(columns, rows)
        self.screen.resize(rows, columns)

    def finish(self) -> int | None:
        while self.read():
            pass
        return self.process.wait()

    def lines(self) -> list[str]:
        """All lines from the first, those off the screen included."""
        gone = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return [line.rstrip() for line in [*gone, *self.screen.display]]

    def _resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def on_terminal(recipe: Recipe, columns: int = 80, rows: int = 24, fresh: bool = False) -> Terminal:
    return Terminal(written(recipe), columns, rows, fresh)


def shown(shards: Path, directory: Path, **sections: dict) -> Recipe:
    sections["tracking"] = {"progress": True, **sections.get("tracking", {})}
    return small(shards, directory, **sections)


@pytest.mark.parametrize("columns", [80, 140])
def test_messages_scroll_above_one_whole_panel(tiny_shards: Path, tmp_path: Path, columns: int) -> None:
    recipe = shown(
        tiny_shards, tmp_path / "run", train={"steps": 40}, validation={"every": 2, "windows": 1, "rollouts": 0}
    )
    terminal = on_terminal(recipe, columns, fresh=columns == 80)
    assert terminal.finish() == 0
    lines = [line for line in terminal.lines() if line]
    top = lines.index(next(line for line in lines if line.startswith(PANEL_TOP)))
    messages, panel = lines[:top], lines[top:]
    told = [line for line in messages if "geometric mean" in line]
    assert [int(line.split()[1].strip(":")) for line in told] == list(range(2, 41, 2))  # each once, in order, whole
    assert not [line for line in messages if "│" in line or "╰" in line]  # nothing of earlier panels is left
    assert {len(line) for line in panel} == {columns}
    assert panel[-1].startswith("╰")
    assert re.search(r"40/40  100 %  0:00:00 left, ends \d\d:\d\d", panel[1])
    assert re.search(r"loss \d\.\d{4}   lr \d\.\d\de-\d\d   gradient ", panel[2])
    assert re.search(r"samples/s   \S+ tokens/s   data wait \d+ %   memory \d\.\d\d GB", panel[3])
    for name in DATASETS:
        assert re.search(rf"{name} +\d\.\d{{4}} +\d\.\d{{4}} +\d\.\d{{4}}", "\n".join(panel))
    assert len(panel) == (8 if columns == 80 else 7)  # two datasets below each other, or side by side
    assert terminal.screen.margins is None  # all rows scroll again


def test_prints_of_other_processes_do_not_tear_the_panel(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys\n"
        "from fm.training.console import BottomRows\n"
        "rows = BottomRows(sys.stderr)\n"
        "for number in range(30):\n"
        "    rows.draw([f'panel {number}', 'second line'])\n"
        "    subprocess.run(['echo', f'stranger {number}'])\n"
        "rows.close(['panel at the end'])\n"
        "print('after')\n"
    )
    terminal = Terminal(script, 40, 10)
    assert terminal.finish() == 0
    lines = [line for line in terminal.lines() if line]
    assert lines == [*(f"stranger {number}" for number in range(30)), "panel at the end", "after"]


def test_a_terminal_that_changes_its_size_gets_a_new_panel(tiny_shards: Path, tmp_path: Path) -> None:
    terminal = on_terminal(shown(tiny_shards, tmp_path / "run", train={"steps": 90_000}), 100, 30)
    while not any(line.startswith(PANEL_TOP) for line in terminal.lines()):
        assert terminal.read()
    terminal.resize(80, 20)
    while not any(line.startswith(PANEL_TOP) and len(line) == 80 for line in terminal.lines()):
        assert terminal.read()
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    panels = [line for line in terminal.lines() if line.startswith(PANEL_TOP)]
    assert [len(line) for line in panels] == [80]


def test_ctrl_c_and_failures_leave_the_terminal_clean(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = shown(tiny_shards, tmp_path / "run", train={"steps": 90_000})
    terminal = on_terminal(recipe)
    wait_for(lambda: terminal.read() and (tmp_path / "run/log.jsonl").exists() and len(log(tmp_path / "run")) > 3,
             terminal.process)  # fmt: skip
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    assert terminal.screen.margins is None
    assert any("interrupted: saved step" in line for line in terminal.lines())
    bad = shown(tiny_shards, tmp_path / "bad", train={"learning_rate": 1e30, "steps": 50, "warmup_steps": 0})
    terminal = on_terminal(bad)
    assert terminal.finish() == 2
    assert terminal.screen.margins is None
    lines = [line for line in terminal.lines() if line]
    bottom = max(number for number, line in enumerate(lines) if line.startswith("╰"))
    assert any(line.startswith("error: step ") for line in lines[bottom:])  # below the panel, untouched


def through_a_file(recipe: Recipe) -> str:
    process = Forked(written(recipe), environment={**os.environ, "FORCE_COLOR": "1"})
    _, err = process.communicate()
    assert process.returncode == 0, err
    return err


def test_a_file_gets_plain_lines(tiny_shards: Path, tmp_path: Path) -> None:
    every = {"validation": {"every": 4, "windows": 1, "rollouts": 0}}
    text = through_a_file(shown(tiny_shards, tmp_path / "run", **every))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    lines = [line for line in text.splitlines() if "step" in line]
    assert re.fullmatch(
        r"step 2/8  loss \S+  lr \S+  gradient \S+  \S+ samples/s  \S+ tokens/s  data wait \d+ %  memory \S+ GB  "
        r"\d:\d\d:\d\d left, ends \d\d:\d\d",
        lines[0],
    )
    assert sum(line.startswith("step 8/8  loss") for line in lines) == 1  # the last, however soon after
    assert sum("geometric mean" in line for line in lines) == 2
    quiet = through_a_file(small(tiny_shards, tmp_path / "quiet", **every))
    assert "loss" not in quiet
    assert quiet.count("geometric mean") == 2
