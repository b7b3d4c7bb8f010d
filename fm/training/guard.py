"""Watches the loss and the gradient of every step: they must be finite, and not far above what is usual.

Usual is the median of the last steps' logarithms, and far is counted in their spread, 1.4826 x the median absolute
deviation (that of a normal distribution is its standard deviation), for each dataset by itself. What was refused does
not become usual.

Keeps rollout finetuning from paying with one-step accuracy: the one-step regression gate.

Before the first step the pretrained model is validated. From then on, a validation's worsening is the geometric mean
over datasets of one-step VRMSE over the pretrained model's. Validations whose worsening is at most finetune.gate are
compromises. The best of them has the fewest diverged rollout scores, and among these the lowest rollout VRMSE: the
geometric mean, over datasets and the protocol's windows, of the ratio to persistence. Its checkpoint is kept in
<run>/best. The pretrained model is one too.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from data_pipeline.files import UserError
from fm.config import FinetuneSettings, GuardSettings, ValidationSettings
from fm.distributed import broadcast_from_main
from fm.evaluation.evaluate import ValidationResult
from fm.evaluation.scores import geometric_mean

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


@dataclass(frozen=True)
class Verdict:
    """What a validation means."""

    worsening: float  # one-step VRMSE over the pretrained model's, geometric mean; inf where one is not finite
    worst: str  # the dataset that has worsened most
    limit: float
    diverged: int  # rollout scores, by dataset and window, that are not finite
    passed: bool
    best: bool  # no validation that passed had better rollouts

    @property
    def code(self) -> int:
        """For `Gate.share`."""
        return 2 * self.best + (not self.passed)

    @property
    def text(self) -> str:
        what = f"one-step VRMSE is {self.worsening:.3f} times the pretrained model's (most on {self.worst})"
        what += f", {self.diverged} rollout scores diverged" if self.diverged else ""
        if not self.passed:
            return f"{what}, more than finetune.gate={self.limit:g}"
        return f"{what}{'; the best rollouts so far' if self.best else ''}"


class Gate:
    """Judges validations. Its state is part of the checkpoint, and of the best one, which may be newer."""

    def __init__(self, settings: FinetuneSettings | None, validation: ValidationSettings) -> None:
        self.limit = settings.gate if settings else None
        self._stops = settings is not None and settings.gate_action == "stop"
        # what scores must agree in to be compared
        self._scored = [validation.protocol, validation.windows, validation.rollouts]
        self._before: dict[str, float | None] | None = None  # one-step VRMSE of the pretrained model, by dataset
        self._best: dict[str, float] | None = None  # worsening, diverged and score of the best compromise
        self._failed = False  # whether the last validation did not pass

    @property
    def active(self) -> bool:
        return self.limit is not None

    @property
    def knows_pretrained(self) -> bool:
        return self._before is not None

    @property
    def ends(self) -> bool:
        """Whether the run is over: its last validation did not pass."""
        return self.active and self._stops and self._failed

    def judge(self, result: ValidationResult, step: int) -> Verdict:
        """The verdict on a validation after `step` steps; the first one is that of the pretrained model."""
        assert self.limit is not None
        now = {name: scores["vrmse"] for name, scores in result.one_step().items()}
        if self._before is None:
            self._before = now
        ratios = {name: _ratio(now[name], self._before.get(name)) for name in now}
        worsening = geometric_mean(list(ratios.values())) or math.inf
        passed = worsening <= self.limit
        diverged, score = _rollout_score(result)
        found = {"worsening": worsening, "diverged": diverged, "score": score}
        best = passed and (self._best is None or _order(found) < _order(self._best))
        if best:
            self._best = found
        self._failed = not passed
        worst = max(ratios, key=lambda name: ratios[name] or math.inf)
        return Verdict(worsening, worst, self.limit, diverged, passed, best)

    def share(self, verdict: Verdict | None, accelerator: Accelerator) -> bool:
        """Let all processes know the main one's verdict; returns whether it is the best so far. Collective."""
        code = broadcast_from_main(accelerator, lambda: verdict.code if verdict else None)
        assert code is not None
        self._failed = bool(code % 2)
        return code >= 2

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "before": self._before,
            "best": self._best,
            "failed": self._failed,
            "limit": self.limit,
            "scored": self._scored,
        }

    def restore(self, saved: Mapping[str, Any] | None, best: Mapping[str, Any] | None, step: int) -> None:
        """Take up the `state` of a checkpoint of `step`, and that of the best one, if there is one.

        Under another limit the last validation is not held against the run, and a best that exceeds it is dropped.
        UserError where the pretrained model was not measured, or not as validations are now.
        """
        if not self.active:
            return
        if saved is None or saved["before"] is None:
            raise UserError(
                f"finetune.gate: the run is at step {step} and began without it, so the pretrained model was not "
                "measured. Leave it out, or start afresh in another folder with run.dir=..."
            )
        if saved["scored"] != self._scored:
            raise UserError(
                f"finetune.gate: the pretrained model was validated with protocol, windows and rollouts "
                f"{saved['scored']}, now they are {self._scored}. Put them back (validation.*), leave the gate out, or "
                "start afresh in another folder with run.dir=..."
            )
        self._before = saved["before"]
        self._failed = saved["failed"] and saved["limit"] == self.limit
        found = [state["best"] for state in (saved, best) if state is not None and state["best"] is not None]
        within = [one for one in found if one["worsening"] <= (self.limit or math.inf)]
        self._best = min(within, key=_order, default=None)


def _order(found: Mapping[str, float]) -> tuple[float, float]:
    return found["diverged"], found["score"]


def _ratio(now: float | None, before: float | None) -> float | None:
    """None where it is not finite now; 1 where it was not before, as there is nothing to lose."""
    if before is None:
        return 1.0
    return None if now is None else max(now, 1e-30) / max(before, 1e-30)


def _rollout_score(result: ValidationResult) -> tuple[int, float]:
    """How many rollout scores have diverged, and the mean of the others; windows not covered are left out."""
    cells = [cell for part in result.scores["datasets"].values() for cell in part["windows"].values()]
    ratios = [cell["ratio_to_persistence"] for cell in cells if cell is not None]
    if not ratios:
        raise UserError(
            f"finetune.gate: no trajectory of the valid split covers a window of the protocol "
            f"{result.scores['protocol']['name']}; choose another (validation.protocol=thirds fits any length)"
        )
    finite = [ratio for ratio in ratios if ratio is not None]
    return len(ratios) - len(finite), geometric_mean(finite) or 0.0
