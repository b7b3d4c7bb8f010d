"""Watches the loss and the gradient of every step: they must be finite, and not far above what is usual.

Usual is the median of the last steps' logarithms, and far is counted in their spread, 1.4826 x the median absolute
deviation (that of a normal distribution is its standard deviation), for each dataset by itself. What was refused does
not become usual.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from fm.settings import GuardSettings

LEAST_HISTORY = 16  # steps of a dataset before which nothing is unusual
LEAST_SPREAD = 0.05  # of logarithms: what varies by less than 5% is as usual


@dataclass(frozen=True)
class Refusal:
    """A step that the guard refused."""

    step: int  # its number, counted from 1
    reason: str
    action: str  # guard.action
    windows: Mapping[str, Sequence[int]]  # dataset -> window ids in the global batch

    @property
    def text(self) -> str:
        end = {
            "stop": "the run ends",
            "skip": "the step is skipped",
            "rollback": "the run goes back to its last checkpoint and passes this step over",
        }
        ids = "; ".join(f"{name} windows {', '.join(map(str, ids))}" for name, ids in self.windows.items())
        return f"step {self.step} refused: {self.reason}: {end[self.action]} ({ids})"


class Guard:
    """Judges steps. Its state is part of the checkpoint, so a run that is continued judges alike.

    `refused` are the steps whose gradient was not used; those among them that lie ahead, after the run was rolled back,
    are passed over.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.refused: set[int] = set()
        self._history: dict[str, deque[float]] = {}

    def judge(self, datasets: Sequence[str], losses: Sequence[float], norm: float) -> str | None:
        """What is wrong with a step of these draws, or None; then it counts as usual from now on."""
        values = [*zip((f"loss of {name}" for name in datasets), losses, strict=True), (_norm_of(datasets), norm)]
        broken = [f"the {what} is not finite" for what, value in values if not math.isfinite(value)]
        if broken:
            return "; ".join(dict.fromkeys(broken))
        spikes = [said for what, value in values if (said := self._spike(what, value))]
        if spikes:
            return "; ".join(spikes)
        for what, value in values:
            self._history.setdefault(what, deque(maxlen=self.settings.history)).append(_log(value))
        return None

    def refuse(self, step: int) -> None:
        """Count a step as refused. UserError where there have been too many."""
        self.refused.add(step)
        if len(self.refused) > self.settings.max_events:
            raise UserError(
                f"step {step}: the guard has refused {len(self.refused)} steps, more than guard.max_events="
                f"{self.settings.max_events}.\nLower train.learning_rate or train.clip, or look at the steps with `fm "
                "replay`; the last whole checkpoint is untouched."
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"refused": sorted(self.refused), "history": {what: list(past) for what, past in self._history.items()}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up the `state` of a checkpoint."""
        self.refused |= set(saved["refused"])
        size = self.settings.history
        self._history = {what: deque(past, maxlen=size) for what, past in saved["history"].items()}

    def _spike(self, what: str, value: float) -> str | None:
        past = self._history.get(what, ())
        if self.settings.spike is None or len(past) < min(LEAST_HISTORY, self.settings.history):
            return None
        middle = statistics.median(past)
        spread = max(1.4826 * statistics.median(abs(one - middle) for one in past), LEAST_SPREAD)
        far = (_log(value) - middle) / spread
        if far <= self.settings.spike:
            return None
        return (
            f"the {what} is {value:.4g}, {far:.1f} spreads above its median {math.exp(middle):.4g} "
            f"(guard.spike: {self.settings.spike:g})"
        )


def _norm_of(datasets: Sequence[str]) -> str:
    """A step's gradient is that of its datasets together."""
    return f"gradient norm of {datasets[0]}" if len(datasets) == 1 else "gradient norm"


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
