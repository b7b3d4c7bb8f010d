"""What a run shows on stderr: on a terminal a panel below the messages, else plain lines now and then."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console as Renderer
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fm.terminal import BottomRows, is_terminal
from fm.tracking.steps import StepResult

PANEL_SECONDS = 0.5  # between redraws
LINE_SECONDS = 10.0  # between plain lines
WIDE = 120  # columns from which the datasets stand in two tables side by side
ROWS_ABOVE = 5  # a panel leaves at least so many rows to messages


@dataclass
class Progress:
    """How a run stands."""

    name: str
    steps: int  # length of the run
    step: int
    datasets: Sequence[str]
    losses: dict[str, float] = field(default_factory=dict)  # the last of each dataset
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # as in events.jsonl
    values: Mapping[str, float] = field(default_factory=dict)  # TensorBoard's, of the last tracking.every steps


class Console:
    """Messages, and how the run goes: a panel or lines if `shown`."""

    def __init__(self, progress: Progress, *, shown: bool) -> None:
        self._progress, self._shown = progress, shown
        self._rows = BottomRows(sys.stderr) if shown and is_terminal(sys.stderr) else None
        self._due = 0.0  # the clock at which something is shown again
        self._show_panel()

    def say(self, message: str) -> None:
        """Print a message, above the panel."""
        print(message, file=sys.stderr, flush=True)

    def step(self, result: StepResult) -> None:
        self._progress.step = result.step
        self._progress.losses.update(zip(result.datasets, result.losses, strict=True))
        if self._rows is not None and self._is_due(PANEL_SECONDS):
            self._show_panel()

    def scalars(self, values: Mapping[str, float]) -> None:
        """Take up what the last steps come to."""
        self._progress.values = values
        last = self._progress.step == self._progress.steps
        if self._shown and self._rows is None and (last or self._is_due(LINE_SECONDS)):
            self.say(plain_line(self._progress))

    def scores(self, scores: Mapping[str, Mapping[str, float | None]]) -> None:
        """Take up a validation's scores."""
        self._progress.scores = scores
        self._show_panel()

    def close(self) -> None:
        """Leave the terminal as it was, with the panel's last state among its lines."""
        if self._rows is not None:
            self._rows.close(self._panel_lines())
            self._rows = None

    def _is_due(self, seconds: float) -> bool:
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + seconds
        return True

    def _show_panel(self) -> None:
        if self._rows is not None:
            lines = self._panel_lines()
            if lines:
                self._rows.draw(lines)
            else:
                self._rows.close()

    def _panel_lines(self) -> list[str]:
        """The largest panel that the terminal has room for; none if it is very small."""
        assert self._rows is not None
        columns, rows = self._rows.size()
        renderer = Renderer(stderr=True, force_terminal=True, width=columns)
        for with_datasets in (True, False):
            with renderer.capture() as capture:
                renderer.print(panel(self._progress, columns, with_datasets))
            lines = capture.get().splitlines()
            if len(lines) + ROWS_ABOVE <= rows:
                return lines
        return []


def plain_line(progress: Progress) -> str:
    """How the run stands, for logs."""
    figures = "  ".join([*_learning(progress.values), *_speed(progress.values)])
    return f"step {progress.step}/{progress.steps}  {figures}  {_left(progress)}"


def panel(progress: Progress, columns: int, with_datasets: bool = True) -> RenderableType:
    """How the run stands, `columns` wide: 3 lines of figures, and a table of the datasets."""
    bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for ratio in (1, None, None):
        bar.add_column(ratio=ratio, no_wrap=True)
    count = f"{progress.step}/{progress.steps}  {100 * progress.step / progress.steps:.0f} %"
    done = ProgressBar(total=progress.steps, completed=progress.step, complete_style="cyan", finished_style="cyan")
    bar.add_row(done, count, _left(progress))
    lines = [_line(_learning(progress.values)), _line(_speed(progress.values))]
    parts: list[RenderableType] = [bar, *lines]
    if with_datasets:
        parts.append(_datasets(progress, 2 if columns >= WIDE else 1))
    return Panel(Group(*parts), title=Text(progress.name), title_align="left", border_style="dim", width=columns)


def _datasets(progress: Progress, tables: int) -> Table:
    """Last loss and last validation scores of each dataset, in tables side by side."""
    names = list(progress.datasets)
    rows = -(-len(names) // tables)
    parts = [_table(progress, names[start : start + rows]) for start in range(0, len(names), rows)]
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for _ in parts:
        grid.add_column(ratio=1)
    grid.add_row(*parts)
    return grid


def _table(progress: Progress, names: Sequence[str]) -> Table:
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("dataset", no_wrap=True, ratio=1)
    for head in ("loss", "valid VRMSE", "/ persistence"):
        table.add_column(head, justify="right", no_wrap=True)
    for name in names:
        scores = progress.scores.get(name, {})
        ratio = scores.get("over_persistence")
        style = "" if ratio is None else "green" if ratio < 1 else "yellow"
        cells = (_number(progress.losses.get(name)), _number(scores.get("vrmse")), Text(_number(ratio), style))
        table.add_row(name, *cells)
    return table


def _learning(values: Mapping[str, float]) -> list[str]:
    """Loss, learning rate and gradient norm, with their names."""
    if not values:
        return []
    return [
        f"loss {values['train/loss']:.4f}",
        f"lr {values['train/lr']:.2e}",
        f"gradient {values['train/grad_norm']:.3g}",
    ]


def _speed(values: Mapping[str, float]) -> list[str]:
    """Speed and memory, with their names."""
    if not values:
        return []
    return [
        f"{values['throughput/samples_per_s']:.3g} samples/s",
        f"{_short(values['throughput/tokens_per_s'])} tokens/s",
        f"data wait {100 * values['throughput/data_wait_fraction']:.0f} %",
        f"memory {values['throughput/peak_memory_gb']:.2f} GB",
    ]


def _line(figures: Sequence[str]) -> Text:
    return Text("   ".join(figures) or "-", no_wrap=True, overflow="ellipsis")


def _left(progress: Progress) -> str:
    """Time left, and the clock at which the run ends."""
    hours = progress.values.get("throughput/hours_left")
    if hours is None:
        return "time left -"
    ends = (datetime.now() + timedelta(hours=hours)).strftime("%H:%M" if hours < 12 else "%d %b %H:%M")
    left = str(timedelta(seconds=round(3600 * hours))) if hours < 24 else f"{hours:.1f} h"
    return f"{left} left, ends {ends}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(value: float) -> str:
    """Three digits and a thousandfold: 12.3k."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"
