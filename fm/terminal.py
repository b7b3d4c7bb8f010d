"""The bottom rows of a terminal, kept for a panel.

The rows above it are made the terminal's scrolling region, and the cursor stays there. So whatever is printed, by this
process, by others of the run or by a library in C, scrolls by above the panel and cannot tear it.
"""

import os
from collections.abc import Sequence
from typing import TextIO

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
