"""What the fuzz tests share: mutations of data and bytes, an equality, and a guard of what Python reaches for."""

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError

MANY = int(os.environ.get("FUZZ_FACTOR", "1"))  # more cases, other ones at every run, by hand


def cases(count: int) -> Callable[[Any], Any]:
    """`count` cases, the same at every run unless FUZZ_FACTOR asks for more."""
    return settings(
        max_examples=count * MANY,
        deadline=None,
        derandomize=MANY == 1,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class Guard:
    """Notes whatever Python starts, connects to, reads or writes outside `root` while a block is open.

    `root` lies in a folder with a file `secret` beside it: nothing in that folder may be opened. Interpreters keep
    their audit hooks for good, so the first guard adds one, and it asks for the guard whose block is open.
    """

    active: "Guard | None" = None
    FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.")
    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")

    def __init__(self, root: Path) -> None:
        self.root, self.outside = str(root), str(root.parent)
        self.wrong: list[str] = []
        _add_hook()

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(self.FORBIDDEN):
            self.wrong.append(f"{event}{arguments}")
        elif event == "open" and not isinstance(arguments[0], int):
            path, writes = self._path(arguments[0]), arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not self._inside(path) and (writes or path.startswith(self.outside)):
                self.wrong.append(f"open {path} {arguments[1:]}")
        elif event in self.CHANGES:
            paths = [self._path(one) for one in arguments if isinstance(one, str | bytes | os.PathLike)]
            self.wrong += [f"{event} {path}" for path in paths if not self._inside(path)]

    def _path(self, path: Any) -> str:
        return os.path.abspath(os.fsdecode(path))

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + os.sep)

    def check(self, call: Callable[[], object]) -> bool:
        """Whether the call succeeds; UserError is the only failure that it may have."""
        Guard.active = self
        try:
            call()
            return True
        except UserError:
            return False
        finally:
            Guard.active = None
            assert not self.wrong, self.wrong


@functools.cache
def _add_hook() -> None:
    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if Guard.active is not None:
            Guard.active.note(event, arguments)

    sys.addaudithook(audit)


NUMBERS = (0, 1, -1, 2, 3, 7, 100, 2**31, 2**32 + 1, 2**40, 2**63, 10**30, -(2**63), 0.0, 0.5, -1.5, 1e-300, 1e308)
TEXTS = ("", ".", "..", "../secret", "/etc/passwd", "pipe:id", "file:///etc/passwd", "a/b", "\0", "x" * 3000, "\u202e")
VALUES = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [0, 1], [2, 1], {"a": 1}, [None], [1] * 500]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from(["set", "set", "nudge", "drop", "double", "add"]), VALUES),
    min_size=1,
    max_size=3,
)


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree of dicts and lists, as (container, key)."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield tree, key
        yield from _nodes(value)


def mutated(tree: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A copy with values replaced, shifted a little, removed, doubled or added, at places chosen by number."""
    tree = copy.deepcopy(tree)
    for place, kind, value in changes:
        nodes = list(_nodes(tree))
        if not nodes:
            break
        container, key = nodes[place % len(nodes)]
        if kind == "set":
            container[key] = copy.deepcopy(value)
        elif kind == "nudge" and type(container[key]) in (int, float):
            container[key] += (place % 5) - 2
        elif kind == "drop":
            del container[key]
        elif kind == "double" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == "add" and isinstance(container, dict):
            container[str(value)[:20]] = copy.deepcopy(value)
    return tree


PIECES = (
    *(b"../secret", b"\0" * 16, b"\xff" * 8, b"9" * 30, b"-1", b"[" * 2000, b"{", b'"', b": ", b"- ", b"\n", b"NaN"),
    *(b"1e999", b"2020-99-99", b"&a [*a]", b"*a", b"!!python/object/apply:os.system [id]", b"<<: ", b"0x_"),
)
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["flip", "put", "insert", "cut", "end"]),
        st.sampled_from(PIECES),
        st.integers(0, 7),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[float, str, bytes, int]]) -> bytes:
    """A copy with bits flipped, pieces written over or inserted, and parts cut out."""
    raw = bytearray(content)
    for place, kind, piece, number in edits:
        at = int(place * max(len(raw) - 1, 0))
        if kind == "flip" and raw:
            raw[at] ^= 1 << number
        elif kind == "put":
            raw[at : at + len(piece)] = piece
        elif kind == "insert":
            raw[at:at] = piece
        elif kind == "cut":
            del raw[at : at + 4**number]
        elif kind == "end":
            del raw[at:]
    return bytes(raw)


def same(first: Any, second: Any) -> bool:
    """Whether two trees of plain values are equal: 1 equals 1.0, but neither true nor "1"."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    kinds = [bool if isinstance(one, bool) else float if isinstance(one, int) else type(one) for one in (first, second)]
    return kinds[0] is kinds[1] and bool(first == second)
