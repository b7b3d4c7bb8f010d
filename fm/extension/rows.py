"""What the lifting rows of a channel begin with that a trained model has not seen: zeros, a copy, or a fresh draw.

`nearest` copies the rows of the model's channel that has the same unit and the name most like its own, by difflib's
ratio (twice the letters in common over all letters), if that is at least SIMILAR; other rows are drawn as a new
model's are. Zeros learn late: while a channel's rows and the head are both zero, neither has a gradient from the other.
The model's channels are all that it has, those of earlier extensions too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from data_pipeline.cards.card import Channel
from data_pipeline.errors import UserError
from data_pipeline.strict_yaml import nearest

WAYS = ("zero", "nearest", "drawn")
SIMILAR = 0.6
UNKNOWN = "unknown"  # the unit in a draft of `data-pipeline register`


@dataclass(frozen=True)
class Rows:
    """Where the rows of one channel come from, and why."""

    origin: str  # zero, drawn, or copy
    copied: str | None = None  # the model's channel whose rows they are; only of a copy
    reason: str = ""

    def __str__(self) -> str:
        text = self.origin if self.copied is None else f"copy of {self.copied}"
        return f"{text} ({self.reason})" if self.reason else text


def choose_rows(
    given: str, channels: Sequence[str], known: Collection[str], described: Mapping[str, Channel]
) -> dict[str, Rows]:
    """The rows of each of the unseen `channels`, by name, sorted.

    `given` is one of WAYS, or `NEW=OLD,...`, and channels that it does not name are drawn; `known` are the model's
    channels, `described` those of the registry. UserError for anything else, naming the nearest valid name.
    """
    if given in ("zero", "drawn"):
        return {name: Rows(given) for name in sorted(channels)}
    if given == "nearest":
        return {name: _nearest_rows(name, known, described) for name in sorted(channels)}
    pairs = _read_pairs(given)
    for new, old in pairs.items():
        if new not in channels:
            raise UserError(
                f"--rows {new}={old}: expected a channel that the model has not seen, got {new!r}. "
                f"{nearest(new, channels)}"
            )
        if old not in known:
            raise UserError(f"--rows {new}={old}: expected a channel of the model, got {old!r}. {nearest(old, known)}")
    return {name: Rows("copy", pairs[name]) if name in pairs else Rows("drawn") for name in sorted(channels)}


def _read_pairs(given: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in given.split(","):
        new, equals, old = pair.strip().partition("=")
        if not (new and equals and old) or new in pairs:
            raise UserError(
                f"--rows: expected {', '.join(WAYS)}, or NEW=OLD,... with each unseen channel once, got {given!r}"
            )
        pairs[new] = old
    return pairs


def _nearest_rows(name: str, known: Collection[str], described: Mapping[str, Channel]) -> Rows:
    """A copy of the nearest channel's rows, if there is one; `described` need not have all that is known."""
    unit = described[name].unit
    if unit == UNKNOWN:
        return Rows("drawn", reason=f"its unit is {UNKNOWN}")
    same = [old for old in sorted(known) if old in described and described[old].unit == unit]
    if not same:
        return Rows("drawn", reason=f"no channel in the unit {unit!r}")
    best = max(same, key=lambda old: _similarity(old, name))  # the first by name where several are as near
    similarity = f"{_similarity(best, name):.2f}"
    if _similarity(best, name) < SIMILAR:
        return Rows("drawn", reason=f"in its unit, {best} has the most similar name, {similarity} < {SIMILAR}")
    return Rows("copy", best, f"same unit, similarity of names {similarity}")


def _similarity(old: str, new: str) -> float:
    return SequenceMatcher(None, old, new, autojunk=False).ratio()
