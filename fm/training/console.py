"""What a run shows on stderr: a panel in the bottom rows of a terminal, or plain lines now and then.

The rows above the panel are the terminal's scrolling region, and the cursor stays there. Text that this process, other
processes of the run or a library in C print therefore scrolls above the panel and cannot tear it. (rich.live redraws
from the position of the cursor, so it overwrites what other processes print.)
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TextIO

from rich.console import Console as Renderer
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Scores = Mapping[str, Mapping[str, float | None]]  # dataset -> vrmse, over_persistence

# control sequences of terminals
SAVE_CURSOR, RESTORE_CURSOR = "\x1b7", "\x1b8"
SCROLL_ALL_ROWS = "\x1b[r"  # moves the cursor to the top left, as every change of the scrolling region does
CLEAR_BELOW = "\x1b[J"

PANEL_SECONDS = 0.5  # between redraws
LINE_SECONDS = 10.0  # between plain lines
MIN_COLUMNS_OF_TWO_TABLES = 120  # from this width on, the datasets stand in two tables side by side
MIN_ROWS_ABOVE = 5  # rows that a panel leaves to messages


def print_quietly(message: str) -> None:
    """Print to stderr, if that is possible: a run goes on when its terminal is closed, or its output's disk is full."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class Console:
    """Prints messages and, if `shown`, the progress of a run."""

    def __init__(
        self, name: str, num_steps: int, step: int, datasets: Sequence[str], scores: Scores, *, shown: bool
    ) -> None:
        """`scores` are those of the last validation, as in events.jsonl."""
        self._name, self._num_steps, self._step, self._datasets = name, num_steps, step, datasets
        self._losses: dict[str, float] = {}  # the last loss of each dataset
        self._values: Mapping[str, float] = {}  # the last scalars of TensorBoard
        self._scores, self._shown = scores, shown
        on_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._rows = BottomRows(sys.stderr) if shown and on_terminal else None
        self._next = 0.0  # time.monotonic() from which on the progress is shown again
        self._draw_panel()

    def print(self, message: str) -> None:
        """Print a message, above the panel if there is one."""
        print_quietly(message)

    def update_losses(self, step: int, losses: Mapping[str, float]) -> None:
        """Show the last losses by dataset after `step` optimizer steps."""
        self._step = step
        self._losses.update(losses)
        if self._rows is not None and self._is_due(PANEL_SECONDS):
            self._draw_panel()

    def update_values(self, values: Mapping[str, float]) -> None:
        """Show scalars of TensorBoard."""
        self._values = values
        is_last = self._step == self._num_steps
        if self._shown and self._rows is None and (is_last or self._is_due(LINE_SECONDS)):
            figures = "  ".join(figure for line in self._figures() for figure in line)
            self.print(f"step {self._step}/{self._num_steps}  {figures}  {self._time_left()}")

    def update_scores(self, scores: Scores) -> None:
        """Show the scores of a validation."""
        self._scores = scores
        self._draw_panel()

    def close(self) -> None:
        """Let all rows of the terminal scroll again and leave the panel's last state among the printed lines."""
        if self._rows is not None:
            with suppress(OSError):
                self._rows.close(self._panel_lines(self._rows))
            self._rows = None

    def _is_due(self, seconds: float) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + seconds
        return True

    def _draw_panel(self) -> None:
        if self._rows is not None:
            with suppress(OSError):  # the terminal is closed
                lines = self._panel_lines(self._rows)
                if lines:
                    self._rows.draw(lines)
                else:
                    self._rows.close()

    def _panel_lines(self, bottom: "BottomRows") -> list[str]:
        """Return the largest panel that the terminal has room for, or [] if there is no room at all."""
        columns, rows = bottom.size()
        renderer = Renderer(stderr=True, force_terminal=True, width=columns)
        for with_datasets in (True, False):
            with renderer.capture() as capture:
                renderer.print(self._panel(columns, with_datasets))
            lines = capture.get().splitlines()
            if len(lines) + MIN_ROWS_ABOVE <= rows:
                return lines
        return []

    def _panel(self, columns: int, with_datasets: bool) -> RenderableType:
        """Return a panel of this width: a progress bar, two lines of figures and a table of the datasets."""
        bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for ratio in (1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        count = f"{self._step}/{self._num_steps}  {100 * self._step / self._num_steps:.0f} %"
        done = ProgressBar(total=self._num_steps, completed=self._step, complete_style="cyan", finished_style="cyan")
        bar.add_row(done, count, self._time_left())
        lines = [Text("   ".join(line) or "-", no_wrap=True, overflow="ellipsis") for line in self._figures()]
        parts: list[RenderableType] = [bar, *lines]
        if with_datasets:
            num_tables = 2 if columns >= MIN_COLUMNS_OF_TWO_TABLES else 1
            rows = -(-len(self._datasets) // num_tables)
            names = [self._datasets[start : start + rows] for start in range(0, len(self._datasets), rows)]
            tables = Table.grid(expand=True, padding=(0, 2, 0, 0))
            for _ in names:
                tables.add_column(ratio=1)
            tables.add_row(*map(self._dataset_table, names))
            parts.append(tables)
        return Panel(Group(*parts), title=Text(self._name), title_align="left", border_style="dim", width=columns)

    def _dataset_table(self, names: Sequence[str]) -> Table:

        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("dataset", no_wrap=True, ratio=1)
        for head in ("loss", "valid VRMSE", "/ persistence"):
            table.add_column(head, justify="right", no_wrap=True)
        for name in names:
            scores = self._scores.get(name, {})
            ratio = scores.get("over_persistence")
            style = "" if ratio is None else "green" if ratio < 1 else "yellow"
            cells = (number(self._losses.get(name)), number(scores.get("vrmse")), Text(number(ratio), style))
            table.add_row(name, *cells)
        return table

    def _figures(self) -> tuple[list[str], list[str]]:
        """Return the figures of training and those of speed and memory, with their names."""
        values = self._values
        if not values:
            return [], []
        training = [
            f"loss {values['train/loss']:.4f}",
            f"lr {values['train/lr']:.2e}",
            f"gradient {values['train/grad_norm']:.3g}",
        ]
        speed = [
            f"{values['throughput/samples_per_s']:.3g} samples/s",
            f"{_short(values['throughput/tokens_per_s'])} tokens/s",
            f"data wait {100 * values['throughput/data_wait_fraction']:.0f} %",
            f"memory {values['throughput/peak_memory_gb']:.2f} GB",
        ]
        return training, speed

    def _time_left(self) -> str:
        """Return the time left and the time of day at which the run ends."""
        hours = self._values.get("throughput/hours_left")
        if hours is None:
            return "time left -"
        ends = (datetime.now() + timedelta(hours=hours)).strftime("%H:%M" if hours < 12 else "%d %b %H:%M")
        left = str(timedelta(seconds=round(3600 * hours))) if hours < 24 else f"{hours:.1f} h"
        return f"{left} left, ends {ends}"


def _short(value: float) -> str:
    """Return three digits and the power of a thousand, such as 12.3k."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


class BottomRows:
    """The last rows of a terminal, reserved for some lines of text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reserved: tuple[os.terminal_size, int] | None = None  # size of the terminal, number of rows

    def size(self) -> os.terminal_size:
        """Return columns and rows, or 80 x 24 if the terminal does not report them."""
        size = os.get_terminal_size(self._stream.fileno())
        return size if size.columns and size.lines else os.terminal_size((80, 24))

    def draw(self, lines: Sequence[str]) -> None:
        """Show lines, which must be fewer than the terminal's rows and not wider than the terminal."""
        size, num_rows, reserve = self.size(), len(lines), ""
        if self._reserved != (size, num_rows):
            if self._reserved is not None:
                reserve = f"{SAVE_CURSOR}{SCROLL_ALL_ROWS}{RESTORE_CURSOR}{CLEAR_BELOW}"
            # make room below the cursor, then let only the rows above it scroll
            region = f"{SAVE_CURSOR}\x1b[1;{size.lines - num_rows}r{RESTORE_CURSOR}"
            reserve += "\n" * num_rows + f"\x1b[{num_rows}A{region}"
            self._reserved = (size, num_rows)
        top = size.lines - num_rows + 1
        rows = "".join(f"\x1b[{top + number};1H\x1b[2K{line}" for number, line in enumerate(lines))
        self._write(f"{reserve}{SAVE_CURSOR}{rows}{RESTORE_CURSOR}")

    def close(self, lines: Sequence[str] = ()) -> None:
        """Let all rows scroll again and leave `lines` behind as if they had been printed."""
        if self._reserved is not None:
            self._reserved = None
            text = "".join(f"{line}\n" for line in lines)
            self._write(f"{SAVE_CURSOR}{SCROLL_ALL_ROWS}{RESTORE_CURSOR}\r{CLEAR_BELOW}{text}")

    def _write(self, text: str) -> None:
        self._stream.write(text)  # in one call, so that no other text comes in between
        self._stream.flush()
