"""Named protocols: start frame, context, windows, eps, averages and split of a score.

Published rollout scores differ in each of these, mostly without a word, so numbers of one name cannot be compared. Here
a protocol is stored with the errors and the scores, and printed above every table. It is one of PROTOCOLS, an earlier
version of one (`wavelit@1`), or a file:

    name: early
    version: 1
    windows: {"1:5": [1, 5], first_third: {first: 1, last: 1, parts: 3}}
    eps: 1.0e-5  # this and any other field of Protocol, where it is not the default
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from data_pipeline import schema
from data_pipeline.errors import UserError
from data_pipeline.schema import Count, Key, Mismatch, Name, Real, Strict, at_least, choice

STATISTICS = ("mean", "median")
ORDERS = ("per_step", "per_trajectory")
SHORT = ("skip", "cut")
Statistic = Annotated[str, choice(STATISTICS, "a statistic")]


@dataclass(frozen=True)
class Window(Strict):
    """Steps of a rollout, 1-indexed and inclusive; step 1 is the first prediction.

    With `parts` = 0, `first` and `last` are step numbers. Otherwise they number equal parts of the dataset's horizon:
    (1, 1, parts 3) is its first third.
    """

    first: Count
    last: Count
    parts: Count = 0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last or self.parts < 0 or (self.parts and self.last > self.parts):
            raise ValueError(f"window: expected 1 <= first <= last (<= parts where given), got {self}")

    def steps(self, horizon: int, shortest: int | None = None) -> tuple[int, int] | None:
        """Return the window as (first, last) step numbers, None if a rollout of `horizon` steps does not cover it.

        If `shortest` is given, the steps of the shortest rollout, the window ends there at the latest.
        """
        first, last = self.first, self.last
        if self.parts:
            first, last = (first - 1) * horizon // self.parts + 1, last * horizon // self.parts
        elif shortest is not None:
            last = min(last, shortest)
        return (first, last) if first <= last <= horizon else None


@dataclass(frozen=True)
class Protocol(Strict):
    """All that defines a score."""

    name: Name
    version: Count  # raised whenever the same name would give another number
    windows: Mapping[Key, Window]  # rollout windows by name
    # the last frame that a rollout is given, 0-based; a model of more frames than there are up to it is given the first
    # frames of the trajectory, and its rollout begins later. One-step windows cover all frames.
    start: Annotated[int, at_least(0)] = 0
    context: Count | None = None  # input frames of the model; None: of any number. What is measured has a number
    max_steps: Count | None = None  # rollouts stop after this many steps; None: at the end of the trajectory
    one_step_windows: Count | None = None  # of each dataset, evenly spaced over the split; None: all, the full score
    eps: Real = 1e-7  # added to the target variance, in squared physical units
    channels: Statistic = "mean"  # statistic over the channels of a frame
    steps: Statistic = "mean"  # statistic over the steps of a window
    trajectories: Statistic = "median"  # over trajectories, or over one-step windows (of an even count: midpoint)
    # per_step: over trajectories at each step, then over steps; per_trajectory: steps first
    order: Annotated[str, choice(ORDERS, "an order of averages")] = "per_step"
    # trajectories that end within a window. skip: they are left out of it; cut: the window ends with the shortest one
    short: Annotated[str, choice(SHORT, "a rule for short trajectories")] = "skip"
    split: Name = "test"

    def __post_init__(self) -> None:
        for name in ("channels", "steps", "trajectories"):
            if getattr(self, name) not in STATISTICS:
                raise ValueError(f"protocol {name}: expected one of {STATISTICS}, got {getattr(self, name)!r}")
        for name, valid in (("order", ORDERS), ("short", SHORT)):
            if getattr(self, name) not in valid:
                raise ValueError(f"protocol {name}: expected one of {valid}, got {getattr(self, name)!r}")
        counts = (self.context, self.max_steps, self.one_step_windows)
        if self.start < 0 or self.eps < 0 or any(count is not None and count < 1 for count in counts):
            raise ValueError(
                f"protocol: expected start, eps >= 0 and context, max_steps, one_step_windows >= 1, got {self}"
            )
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

    @property
    def reference(self) -> str:
        """What `load_protocol` finds this version of a named protocol by."""
        return f"{self.name}@{self.version}"

    @property
    def last_given(self) -> int:
        """The last frame that a rollout is given, 0-based."""
        return max(self.start, (self.context or 1) - 1)

    def covered(self, window: str, lengths: Sequence[int]) -> tuple[int, int] | None:
        """Return a window's (first, last) step in rollouts of these numbers of steps, None if there is no such step."""
        present = [steps for steps in lengths if steps] or [0]
        return self.windows[window].steps(max(present), min(present) if self.short == "cut" else None)

    def for_context(self, context: int) -> "Protocol":
        """Return the protocol for a model of `context` input frames; UserError if it is for another number."""
        if self.context not in (None, context):
            raise UserError(
                f"protocol {self.name}: expected context {context}, the input frames of this model; got "
                f"{self.context}: leave context out of the protocol, or choose another model"
            )
        return replace(self, context=context)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Protocol":
        """Return the inverse of `to_json`; ValueError for other data.

        The data have all fields, zeros among them, which the rules for users' protocol files refuse.
        """
        try:
            return cls(**{**data, "windows": {name: Window(**window) for name, window in data["windows"].items()}})
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"not a protocol ({error!r})") from error

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
        context = "" if self.context is None else f"context {self.context}; "
        cut = "; windows end with the shortest trajectory" if self.short == "cut" else ""
        until = "the end of the trajectory" if self.max_steps is None else f"at most {self.max_steps} steps"
        return (
            f"protocol {self.name} v{self.version}: VRMSE in physical units, eps {self.eps:g}, split {self.split}, "
            f"{context}one step: {self.trajectories} over {windows}; rollout: from frame {self.last_given} to {until}, "
            f"{average}; {self.channels} over channels{cut}"
        )


_WAVELIT = {"1:20": Window(1, 20), "21:60": Window(21, 60)}
_APPENDIX_G = {"2:8": Window(2, 8), "9:26": Window(9, 26), "27:56": Window(27, 56)}
VERSIONS = (
    # The paper's tables. Its medians are taken to be Walrus's: over trajectories at each step. That rollouts begin at
    # frame 3 is inferred: viscoelastic_instability, of 20 frames, has 16 steps in the paper, and the windows of its
    # Appendix G are The Well's 6:12, 13:30 and 31:60 less the 4 given frames. That a window ends with the shortest
    # trajectory is inferred too: the paper has 1:20 of those 16 steps, and 21:60 of helmholtz_staircase's 46.
    Protocol("wavelit", 1, _WAVELIT, max_steps=60),
    Protocol("wavelit", 2, _WAVELIT, start=3, max_steps=60, short="cut"),
    # The paper's Appendix G, rollout finetuning.
    Protocol("appendix_g", 1, _APPENDIX_G, max_steps=56),
    Protocol("appendix_g", 2, _APPENDIX_G, start=3, max_steps=56, short="cut"),
    # The Well's benchmark sees frames 0-3 and predicts from frame 4 on, averaging by the mean. Its two published
    # windows are defined in no code. Version 1 reads them as numbers of steps; version 2 as numbers of frames, of which
    # the first 4 are given, since the paper's Appendix G has the same windows less 4.
    Protocol("well", 1, {"6:12": Window(6, 12), "13:30": Window(13, 30)}, start=3, max_steps=100, trajectories="mean"),
    Protocol("well", 2, {"6:12": Window(2, 8), "13:30": Window(9, 26)}, start=3, max_steps=100, trajectories="mean"),
    # For trajectories shorter than the published windows, such as the mini-Well's.
    Protocol(
        "thirds",
        1,
        {"first_third": Window(1, 1, 3), "middle_third": Window(2, 2, 3), "last_third": Window(3, 3, 3)},
    ),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in VERSIONS}  # the newest version of each


def load_protocol(name_or_path: str | Path) -> Protocol:
    """Return the protocol NAME (its newest version), NAME@VERSION, or that in a file that ends in .yaml or .yml."""
    file = Path(name_or_path)
    if file.suffix not in (".yaml", ".yml"):
        named = PROTOCOLS | {protocol.reference: protocol for protocol in VERSIONS}
        if str(name_or_path) in named:
            return named[str(name_or_path)]
        raise UserError(
            f"protocol: expected one of {', '.join(PROTOCOLS)}, or an earlier version "
            f"({', '.join(name for name, one in named.items() if one not in PROTOCOLS.values())}); got "
            f"{str(name_or_path)!r}. One of your own is a file that ends in .yaml"
        )
    content = schema.read_yaml(file)
    windows: Any = content.get("windows") if isinstance(content, dict) else None
    for name, window in windows.items() if isinstance(windows, dict) else ():
        if isinstance(window, list):  # the short form of steps
            if len(window) != 2:
                raise UserError(f"{file}: windows.{name}: expected a list of 2, got {window}")
            windows[name] = dict(zip(("first", "last"), window, strict=True))
    return schema.validate(Protocol, content, str(file), _check_names)


def _check_names(protocol: Protocol) -> None:
    if protocol.name in PROTOCOLS:
        raise Mismatch(f"a name of its own, not one of {', '.join(PROTOCOLS)}", "Choose another.", ("name",))
    for name in protocol.windows:
        if name.replace("_", " ") == "one step":
            hint = "That is what the one-step scores are called."
            raise Mismatch(f"another name for a window than {name!r}", hint, ("windows", name))


def check_same_rollouts(measured: Protocol, wanted: Protocol, longest: int | None = None) -> None:
    """UserError unless errors measured under one protocol can be scored under another: same frames, as many steps.

    `longest`: steps of the longest rollout that was measured. If it is below the measured protocol's limit, all
    rollouts went to the end of their trajectories, so the limit had no effect.
    """
    for name in ("split", "start", "context", "one_step_windows"):
        any_context = name == "context" and wanted.context is None
        if getattr(measured, name) != getattr(wanted, name) and not any_context:
            earlier = [one.reference for one in VERSIONS if one.name == wanted.name and one.start == measured.start]
            instead = f", or score under {earlier[-1]}" if name == "start" and earlier else ""
            raise UserError(
                f"protocol {wanted.name} v{wanted.version} needs {name} {getattr(wanted, name)!r}; these errors were "
                f"measured under {measured.name} v{measured.version} with {name} {getattr(measured, name)!r}: evaluate "
                f"again with that protocol{instead}"
            )
    limit = measured.max_steps
    if limit is None or (longest is not None and longest < limit):
        return
    if wanted.max_steps is None or wanted.max_steps > limit:
        raise UserError(
            f"protocol {wanted.name} v{wanted.version} needs rollouts of {wanted.max_steps or 'all'} steps; these "
            f"errors were measured under {measured.name} v{measured.version} with at most {limit}: evaluate again with "
            "that protocol"
        )
