"""Progress of long work: a bar on a terminal, elsewhere a line a minute, so that a log shows that the work goes on."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0  # between the lines of a log


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: float | None = None,
    initial: float = 0,
    disable: bool = False,
    leave: bool = True,
) -> Any:
    """Return a progress bar of tqdm if stderr is a terminal, else a `ProgressLog`, which has the same methods.

    `desc` names the work. `unit` is the singular of what is counted; "B" stands for bytes. `leave` keeps a finished bar
    on the terminal. With `disable`, nothing is shown.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if disable or sys.stderr is None or not sys.stderr.isatty():
        return ProgressLog(iterable, desc, unit, total, initial, disable)
    scale = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    return tqdm(iterable, desc=desc, unit=unit, total=total, initial=initial, leave=leave, **scale)


def write_above(text: str, file: TextIO | None = None) -> None:
    """Print a text, on a terminal above the progress bars."""
    tqdm.write(text, file=file)


class ProgressLog:
    """Progress as plain lines on stderr: one whenever LINE_SECONDS have passed, and a last one if any came before."""

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        desc: str,
        unit: str,
        total: float | None,
        initial: float,
        disable: bool,
    ) -> None:
        self.n, self.total = initial, total
        self._iterable, self._desc, self._unit, self._initial, self._disable = iterable, desc, unit, initial, disable
        self._postfix = ""
        self._start = self._line = time.monotonic()
        self._printed: float | None = None  # the count in the last line

    def update(self, count: float = 1) -> None:
        """Count more units done, and print a line if it is time."""
        self.n += count
        self.refresh()

    def refresh(self) -> None:
        """Print a line if it is time."""
        if not self._disable and time.monotonic() - self._line >= LINE_SECONDS:
            self._print()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set what the lines end with, such as the name of the part that is worked on."""
        self._postfix = text

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Print a text."""
        print(text, file=file, flush=True)

    def close(self) -> None:
        """Print a last line, if lines were printed and more was done since."""
        if self._printed is not None and self._printed != self.n:
            self._print()

    def _print(self) -> None:
        self._line, self._printed = time.monotonic(), self.n
        seconds, done = self._line - self._start, self.n - self._initial
        parts = [f"{self._amount()} in {_duration(seconds)}"]
        if done > 0 and self.total is not None and self.n < self.total:
            parts.append(f"about {_duration((self.total - self.n) / done * seconds)} left")
        parts += [self._postfix] * bool(self._postfix)
        print(f"{self._desc}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def _amount(self) -> str:
        if self._unit == "B":
            whole = "" if self.total is None else f" of {self.total / 1e6:.0f}"
            return f"{self.n / 1e6:.0f}{whole} MB"
        counted = self.n if self.total is None else self.total
        done = f"{self.n:.0f}" if self.total is None else f"{self.n:.0f} of {self.total:.0f}"
        return f"{done} {self._unit}{'s' * (counted != 1)}"

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable if self._iterable is not None else ():
            yield item
            self.update()
        self.close()

    def __enter__(self) -> "ProgressLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _duration(seconds: float) -> str:
    """Return seconds as 45 s, 12 min or 3.4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
