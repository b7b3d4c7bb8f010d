"""Named protocols: start frame, context, windows, eps, averages and split of a score.

Published rollout scores differ in each of these, mostly without a word, so numbers of one name cannot be compared. Here
a protocol is stored with the errors that were measured under it and with the scores made from them, and it is printed
above every table. It is one of PROTOCOLS, or a file of the user's own:

    name: early
    version: 1
    windows: {"1:5": [1, 5], first_third: {first: 1, last: 1, parts: 3}}
    eps: 1.0e-5  # this and any other field of Protocol, where it is not the default
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import schema
from data_pipeline.files import UserError
from data_pipeline.schema import Node

STATISTICS = ("mean", "median")
ORDERS = ("per_step", "per_trajectory")


@dataclass(frozen=True)
class Window:
    """Steps of a rollout, 1-indexed and inclusive; step 1 is the first prediction.

    With `parts` = 0, `first` and `last` are step numbers. Otherwise they number equal parts of the dataset's horizon:
    (1, 1, parts 3) is its first third.
    """

    first: int
    last: int
    parts: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last or self.parts < 0 or (self.parts and self.last > self.parts):
            raise ValueError(f"window: expected 1 <= first <= last (<= parts where given), got {self}")

    def steps(self, horizon: int) -> tuple[int, int] | None:
        """Return the window as (first, last) step numbers, None if a rollout of `horizon` steps does not cover it."""
        first, last = self.first, self.last
        if self.parts:
            first, last = (first - 1) * horizon // self.parts + 1, last * horizon // self.parts
        return (first, last) if first <= last <= horizon else None


@dataclass(frozen=True)
class Protocol:
    """All that defines a score."""

    name: str
    version: int  # raised whenever the same name would give another number
    windows: Mapping[str, Window]  # rollout windows by name
    start: int = 0  # first frame a rollout sees, 0-based; one-step windows always cover the whole trajectory
    context: int = 1  # frames the model sees
    max_steps: int | None = None  # rollouts stop after this many steps; None: at the end of the trajectory
    one_step_windows: int | None = None  # of each dataset, evenly spaced over the split; None: all, the full score
    eps: float = 1e-7  # added to the target variance, in squared physical units
    channels: str = "mean"  # statistic over the channels of a frame
    steps: str = "mean"  # statistic over the steps of a window
    trajectories: str = "median"  # statistic over trajectories, or over one-step windows (of an even count: midpoint)
    order: str = "per_step"  # per_step: over trajectories at each step, then over steps; per_trajectory: steps first
    split: str = "test"

    def __post_init__(self) -> None:
        for name in ("channels", "steps", "trajectories"):
            if getattr(self, name) not in STATISTICS:
                raise ValueError(f"protocol {name}: expected one of {STATISTICS}, got {getattr(self, name)!r}")
        if self.order not in ORDERS:
            raise ValueError(f"protocol order: expected one of {ORDERS}, got {self.order!r}")
        if self.one_step_windows is not None and self.one_step_windows < 1:
            raise ValueError(f"protocol {self.name}: expected one_step_windows >= 1, got {self.one_step_windows}")
        if self.start < 0 or self.context < 1 or self.eps < 0 or (self.max_steps is not None and self.max_steps < 1):
            raise ValueError(f"protocol: expected start >= 0, context >= 1, eps >= 0, max_steps >= 1, got {self}")
        if not self.windows:
            raise ValueError(f"protocol {self.name}: expected at least one window, got none")
        reach = max((window.last for window in self.windows.values() if not window.parts), default=0)
        if self.max_steps is not None and self.max_steps < reach:
            raise ValueError(
                f"protocol {self.name}: expected max_steps that cover the windows, {reach} at least, got "
                f"{self.max_steps}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return all fields, as stored with errors and scores."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Protocol":
        """Return the inverse of `to_json`; LookupError, TypeError or ValueError for other data."""
        return cls(**{**data, "windows": {name: Window(**window) for name, window in data["windows"].items()}})

    def describe(self) -> str:
        """Return all that defines the numbers in one line, for the head of a table."""
        average = {
            "per_step": f"{self.trajectories} over trajectories at each step, then {self.steps} over steps",
            "per_trajectory": f"{self.steps} over the steps of each trajectory, then {self.trajectories}",
        }[self.order]
        windows = "all windows"
        if self.one_step_windows is not None:
            count = self.one_step_windows
            windows = f"at most {count} evenly spaced windows per dataset (a subset, not the full score)"
        until = "the end of the trajectory" if self.max_steps is None else f"at most {self.max_steps} steps"
        return (
            f"protocol {self.name} v{self.version}: VRMSE in physical units, eps {self.eps:g}, split {self.split}, "
            f"context {self.context}; one step: {self.trajectories} over {windows}; rollout: from frame {self.start} "
            f"to {until}, {average}; {self.channels} over channels"
        )


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # The paper's tables. Its medians are taken to be Walrus's: over trajectories at each step.
        Protocol("wavelit", 1, {"1:20": Window(1, 20), "21:60": Window(21, 60)}, max_steps=60),
        # The paper's Appendix G, rollout finetuning.
        Protocol("appendix_g", 1, {"2:8": Window(2, 8), "9:26": Window(9, 26), "27:56": Window(27, 56)}, max_steps=56),
        # The Well's benchmark sees frames 0-3 and predicts from frame 4 on, averaging by the mean. Its two published
        # windows are defined in no code: they are read as step numbers here.
        Protocol(
            "well", 1, {"6:12": Window(6, 12), "13:30": Window(13, 30)}, start=3, max_steps=100, trajectories="mean"
        ),
        # For trajectories shorter than the published windows, such as the mini-Well's.
        Protocol(
            "thirds",
            1,
            {"first_third": Window(1, 1, 3), "middle_third": Window(2, 2, 3), "last_third": Window(3, 3, 3)},
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """Return the protocol of that name; UserError, with the valid names, if there is none."""
    if name not in PROTOCOLS:
        raise UserError(
            f"protocol: expected one of {', '.join(PROTOCOLS)}; got {name!r}. One of your own is a file that ends in "
            ".yaml"
        )
    return PROTOCOLS[name]


def load_protocol(name_or_path: str | Path) -> Protocol:
    """The named protocol, or the one in a file that ends in .yaml or .yml.

    UserError, with file, key and value, for a name that is not known and for a file that is not a protocol's.
    """
    if not str(name_or_path).endswith((".yaml", ".yml")):
        return get_protocol(str(name_or_path))
    root = schema.load(Path(name_or_path))
    entries = root.record(_REQUIRED, _OPTIONAL)
    if entries["name"].value in PROTOCOLS:
        entries["name"].fail(f"a name of its own, not one of {', '.join(PROTOCOLS)}", "Choose another.")
    try:
        return Protocol(**{key: (_REQUIRED | _OPTIONAL)[key](node) for key, node in entries.items()})
    except ValueError as error:
        raise UserError(f"{root.file}: {error}") from error


def _window(node: Node) -> Window:
    if isinstance(node.value, list):
        parts = dict(zip(("first", "last"), node.elements(2), strict=True))
    else:
        parts = node.record(("first", "last"), ("parts",))
    try:
        return Window(**{key: part.count() for key, part in parts.items()})
    except ValueError as error:
        raise UserError(f"{node.file}: {node.path}: {error}") from error


def _windows(node: Node) -> dict[str, Window]:
    entries = node.entries()
    for name, entry in entries.items():
        if name.replace("_", " ") == "one step":
            entry.fail(f"another name for a window than {name!r}", "That is what the one-step scores are called.")
    return {name: _window(entry) for name, entry in entries.items()}


def _statistic(node: Node) -> str:
    return node.choice(STATISTICS, "a statistic")


def _count_or_null(node: Node) -> int | None:
    return None if node.value is None else node.count()


_REQUIRED: dict[str, Callable[[Node], Any]] = {"name": Node.name, "version": Node.count, "windows": _windows}
_OPTIONAL: dict[str, Callable[[Node], Any]] = {
    "start": lambda node: node.count(0),
    "context": Node.count,
    "max_steps": _count_or_null,
    "one_step_windows": _count_or_null,
    "eps": Node.real,
    "channels": _statistic,
    "steps": _statistic,
    "trajectories": _statistic,
    "order": lambda node: node.choice(ORDERS, "an order of averages"),
    "split": Node.name,
}


def check_same_rollouts(measured: Protocol, wanted: Protocol, longest: int | None = None) -> None:
    """UserError unless errors measured under one protocol can be scored under another: same frames, as many steps.

    `longest`: steps of the longest rollout that was measured. If it is below the measured protocol's limit, all
    rollouts went to the end of their trajectories, so the limit had no effect.
    """
    for name in ("split", "start", "context", "one_step_windows"):
        if getattr(measured, name) != getattr(wanted, name):
            raise UserError(
                f"protocol {wanted.name} needs {name} {getattr(wanted, name)!r}; these errors were measured under "
                f"{measured.name} with {name} {getattr(measured, name)!r}: evaluate again with that protocol"
            )
    limit = measured.max_steps
    if limit is None or (longest is not None and longest < limit):
        return
    if wanted.max_steps is None or wanted.max_steps > limit:
        raise UserError(
            f"protocol {wanted.name} needs rollouts of {wanted.max_steps or 'all'} steps; these errors were measured "
            f"under {measured.name} with at most {limit}: evaluate again with that protocol"
        )
