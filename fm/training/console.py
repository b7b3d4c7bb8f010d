"""The bottom rows of a terminal, kept for a panel.

The rows above it are made the terminal's scrolling region, and the cursor stays there. So whatever is printed, by this
process, by others of the run or by a library in C, scrolls by above the panel and cannot tear it.

What one optimiser step did, and what several of them come to: means, speed, time left.

What a run shows on stderr: on a terminal a panel below the messages, else plain lines now and then.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any, TextIO

from rich.console import Console as Renderer
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fm.config import Recipe
from fm.distributed import peak_memory_bytes
from fm.model.surrogate import Surrogate
from fm.training.flops import forward_flops, forward_passes

_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor
_ALL_ROWS_SCROLL = "\x1b[r"  # and the cursor goes home, as with any change of the region
_CLEAR_BELOW = "\x1b[J"


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that knows control sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class BottomRows:
    """Draws lines into the last rows of a terminal; `close` gives these back."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._kept: tuple[os.terminal_size, int] | None = None  # size of the terminal, number of rows

    def size(self) -> os.terminal_size:
        """Columns and rows; 80 x 24 where the terminal does not say."""
        size = os.get_terminal_size(self._stream.fileno())
        return size if size.columns and size.lines else os.terminal_size((80, 24))

    def draw(self, lines: Sequence[str]) -> None:
        """Show lines, none wider than the terminal. They are fewer than its rows."""
        size = self.size()
        begin = "" if self._kept == (size, len(lines)) else self._keep(size, len(lines))
        top = size.lines - len(lines) + 1
        rows = "".join(f"\x1b[{top + number};1H\x1b[2K{line}" for number, line in enumerate(lines))
        self._write(f"{begin}{_SAVE}{rows}{_RESTORE}")

    def close(self, lines: Sequence[str] = ()) -> None:
        """Let all rows scroll again; leave `lines` behind as if they had been printed."""
        if self._kept is not None:
            self._kept = None
            self._write(f"{_SAVE}{_ALL_ROWS_SCROLL}{_RESTORE}\r{_CLEAR_BELOW}" + "".join(f"{line}\n" for line in lines))

    def _keep(self, size: os.terminal_size, rows: int) -> str:
        """Make room below the cursor, and the rows above it the scrolling region."""
        free = "" if self._kept is None else f"{_SAVE}{_ALL_ROWS_SCROLL}{_RESTORE}{_CLEAR_BELOW}"
        self._kept = (size, rows)
        return free + "\n" * rows + f"\x1b[{rows}A{_SAVE}\x1b[1;{size.lines - rows}r{_RESTORE}"

    def _write(self, text: str) -> None:
        self._stream.write(text)  # at once, so that nothing comes in between
        self._stream.flush()


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all processes. A step may hold several draws (train.draws)."""

    step: int  # optimiser steps done, this one included
    datasets: tuple[str, ...]  # one per draw
    grids: tuple[tuple[int, int], ...]  # (H, W), one per draw
    windows: str  # digest of the global batches' window ids
    losses: tuple[float, ...]  # one per draw
    mse: float
    wavelet_l1: float
    grad_norm: float  # before clipping
    lr: float
    samples: int  # windows
    model_calls: tuple[int, ...]  # forward passes of the unroll, one number per draw
    data_seconds: float
    seconds: float
    stop: bool  # a process was asked to stop

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def tokens(self) -> int:
        """Token updates: windows x model calls x H W / 4."""
        windows = self.samples // len(self.grids)
        calls = zip(self.grids, self.model_calls, strict=True)
        return sum(windows * count * h * w // 4 for (h, w), count in calls)


class Meter:
    """Gathers steps, and reads off what they come to since the reading before."""

    def __init__(self, model: Surrogate, recipe: Recipe, pending: Iterable[Mapping[str, Any]]) -> None:
        """`pending` is what `saved` gave where the run continues."""
        self._model, self._steps, self._finetune = model, recipe.train.steps, recipe.finetune
        self._since = [StepResult(**saved) for saved in pending if _is_result(saved)]
        self._flops: dict[str, int] = {}  # dataset -> FLOPs of one model call on one window
        self._began: tuple[float, int] | None = None  # clock and step of this process's first reading

    def add(self, result: StepResult) -> None:
        self._since.append(result)

    def saved(self) -> list[dict[str, Any]]:
        """The steps since the last reading, as JSON."""
        return [asdict(result) for result in self._since]

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """TensorBoard's tags and values, and the facts of a `pace` event. At least one step must have been added.

        Speed is that of stepping; the hours left are by the clock, validations and checkpoints included.
        """
        steps, self._since = self._since, []
        seconds, samples = sum(s.seconds for s in steps), sum(s.samples for s in steps)
        losses = defaultdict(list)
        for name, loss in [pair for s in steps for pair in zip(s.datasets, s.losses, strict=True)]:
            losses[name].append(loss)
        values = {
            "train/loss": sum(s.loss for s in steps) / len(steps),
            "train/mse": sum(s.mse for s in steps) / len(steps),
            "train/wavelet_l1": sum(s.wavelet_l1 for s in steps) / len(steps),
            "train/grad_norm": sum(s.grad_norm for s in steps) / len(steps),
            "train/lr": steps[-1].lr,
            **{f"train_loss/{name}": sum(values) / len(values) for name, values in sorted(losses.items())},
            "throughput/samples_per_s": samples / seconds,
            "throughput/tokens_per_s": sum(s.tokens for s in steps) / seconds,
            "throughput/tflops": sum(self._step_flops(s) for s in steps) / seconds / 1e12,
            "throughput/data_wait_fraction": sum(s.data_seconds for s in steps) / seconds,
            "throughput/peak_memory_gb": peak_memory_bytes() / 1e9,
            "throughput/hours_left": self._hours_left(steps[-1].step, seconds / len(steps)),
        }
        return values, {"steps": len(steps), "seconds": seconds, "samples": samples}

    def _hours_left(self, step: int, seconds_per_step: float) -> float:
        """By the mean pace since the first reading: the steps before it are slow."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        else:
            seconds_per_step = (now - self._began[0]) / (step - self._began[1])
        return (self._steps - step) * seconds_per_step / 3600

    def _step_flops(self, step: StepResult) -> float:
        windows = step.samples // len(step.datasets)
        return sum(
            windows * forward_passes(calls, self._finetune) * self._forward_flops(name, grid)
            for name, grid, calls in zip(step.datasets, step.grids, step.model_calls, strict=True)
        )

    def _forward_flops(self, dataset: str, grid: tuple[int, int]) -> int:
        if dataset not in self._flops:
            self._flops[dataset] = forward_flops(self._model, dataset, grid)
        return self._flops[dataset]


def _is_result(saved: Mapping[str, Any]) -> bool:
    """Whether an entry is a step's result as this version writes them; model_calls was one number once."""
    return saved.keys() == {field.name for field in fields(StepResult)} and isinstance(saved["model_calls"], list)


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
