"""What may refuse a step or end a run: anomalous losses and gradients, and one-step accuracy lost in finetuning.

`SlowSteps` refuses nothing: it finds where steps begin to take many times as long.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.windows.schedule import Draw
from fm.checkpoint import Snapshot, delete_checkpoints, list_checkpoints, prune_checkpoints, write_checkpoint
from fm.config import FinetuneSettings, GuardSettings, ValidationSettings
from fm.evaluation.evaluate import ValidationResult
from fm.evaluation.scores import geometric_mean

MIN_HISTORY = 16  # steps of a dataset before a value can be a spike
MIN_SPREAD = 0.05  # of logarithms, so that variations of less than 5 % do not make small changes spikes
SLOW_FACTOR = 10  # times the median of earlier steps of the same kind, from which on a step is slow
NUM_SLOW_STEPS = 3  # in a row, so that a pause of the machine is no finding
MIN_EARLIER_STEPS, MAX_EARLIER_STEPS = 3, 50  # of a kind, whose median a step is compared with
TINY = 1e-30  # in place of zero, for logarithms and ratios
_ORDER = itemgetter("diverged", "score")  # of the best validations


@dataclass(frozen=True)
class RefusedStep:
    """A step whose gradient was not used."""

    step: int  # its number, counted from 1
    reason: str
    action: str  # guard.action
    windows: Mapping[str, Sequence[int]]  # dataset -> window ids in the global batch

    @classmethod
    def of(cls, step: int, reason: str, action: str, draws: Sequence[Draw]) -> "RefusedStep":
        """Return the refusal of a step of these draws; several may be of one dataset."""
        windows: dict[str, list[int]] = {}
        for draw in draws:
            windows.setdefault(draw.dataset, []).extend(draw.windows.tolist())
        return cls(step, reason, action, windows)

    @property
    def text(self) -> str:
        """Return a sentence for people."""
        end = {
            "stop": "the run ends",
            "skip": "the step is skipped",
            "rollback": "the run goes back to its last checkpoint and passes this step over",
        }
        ids = "; ".join(f"{name} windows {', '.join(map(str, ids))}" for name, ids in self.windows.items())
        return f"step {self.step} refused: {self.reason}: {end[self.action]} ({ids})"

    def advice(self, run: Path) -> str:
        """Return what the user can do after the step has ended the run in this folder."""
        return (
            f"step {self.step}: {self.reason}. The optimizer did not move; the newest checkpoint in "
            f"{run / 'checkpoints'} is from before it.\nLook at the step with `fm replay {run} --step {self.step}`. "
            "Lower train.learning_rate or train.clip, or let the run go on without such steps (guard.action=skip, or "
            "rollback)."
        )


class RollBack(Exception):
    """The run must go back to its last checkpoint and pass over the steps in `refused`."""

    def __init__(self, refusal: RefusedStep, refused: set[int]) -> None:
        super().__init__(f"step {refusal.step} refused")
        self.refusal, self.refused = refusal, refused


class AnomalyDetector:
    """Finds losses and gradient norms that are not finite, or are spikes (the recipe's section `guard`).

    A spike's logarithm exceeds the median of the dataset's recent logarithms by more than `guard.spike` spreads. The
    spread is 1.4826 x the median absolute deviation, the standard deviation of normally distributed numbers. Refused
    values do not enter the history, which is part of the checkpoint. `refused` are the numbers of the refused steps.
    After a rollback some of them are still to come; they are passed over.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.refused: set[int] = set()
        self._history: dict[str, deque[float]] = {}  # "loss of <dataset>" -> the recent logarithms

    def find(self, datasets: Sequence[str], losses: Sequence[float], grad_norm: float) -> str | None:
        """Return what is wrong with a step of these draws, or add its values to the history and return None."""
        norm_name = f"gradient norm of {datasets[0]}" if len(datasets) == 1 else "gradient norm"
        values = [*zip((f"loss of {name}" for name in datasets), losses, strict=True), (norm_name, grad_norm)]
        problems = [f"the {name} is not finite" for name, value in values if not math.isfinite(value)]
        if not problems:
            problems = [problem for name, value in values if (problem := self._spike(name, value))]
        if problems:
            return "; ".join(dict.fromkeys(problems))
        for name, value in values:
            self._history.setdefault(name, deque(maxlen=self.settings.history)).append(_log(value))
        return None

    def count_refused(self, step: int) -> None:
        """Add a step to the refused ones. Raises UserError if there are more than guard.max_events."""
        self.refused.add(step)
        if len(self.refused) > self.settings.max_events:
            raise UserError(
                f"step {step}: the guard has refused {len(self.refused)} steps, more than guard.max_events="
                f"{self.settings.max_events}.\nLower train.learning_rate or train.clip, or look at the steps with `fm "
                "replay`; the last whole checkpoint is untouched."
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        return {"refused": sorted(self.refused), "history": {name: list(past) for name, past in self._history.items()}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the `state` of a checkpoint."""
        self.refused |= set(saved["refused"])
        size = self.settings.history
        self._history = {name: deque(past, maxlen=size) for name, past in saved["history"].items()}

    def _spike(self, name: str, value: float) -> str | None:
        past = self._history.get(name, ())
        if self.settings.spike is None or len(past) < min(MIN_HISTORY, self.settings.history):
            return None
        median = statistics.median(past)
        spread = max(1.4826 * statistics.median(abs(one - median) for one in past), MIN_SPREAD)
        distance = (_log(value) - median) / spread
        if distance <= self.settings.spike:
            return None
        return (
            f"the {name} is {value:.4g}, {distance:.1f} spreads above its median {math.exp(median):.4g} "
            f"(guard.spike: {self.settings.spike:g})"
        )


def _log(value: float) -> float:
    return math.log(max(value, TINY))


class SlowSteps:
    """Finds where steps begin to take SLOW_FACTOR times as long as earlier steps of the same kind, once a process.

    The first step of a kind may include a compilation, so the median of the earlier steps is taken. Slow steps are not
    among them.
    """

    def __init__(self) -> None:
        self._history: dict[Hashable, deque[float]] = {}  # kind -> the latest durations
        self._factors: list[float] = []  # of the slow steps in a row that end with the latest step
        self._found = False

    def find(self, kind: Hashable, seconds: float) -> float | None:
        """Add a step; if the last NUM_SLOW_STEPS are slow, return how many times as long they took (median), else None.

        `kind` is equal for steps with the same work. `seconds` may be in any unit that is the same for all of a kind.
        """
        past = self._history.setdefault(kind, deque(maxlen=MAX_EARLIER_STEPS))
        usual = statistics.median(past) if len(past) >= MIN_EARLIER_STEPS else 0.0
        if usual > 0 and seconds >= SLOW_FACTOR * usual:
            self._factors.append(seconds / usual)
        else:
            past.append(seconds)
            if usual > 0:
                self._factors.clear()
        if self._found or len(self._factors) < NUM_SLOW_STEPS:
            return None
        self._found = True
        return statistics.median(self._factors)


def slow_steps_warning(factor: float, threads: int, processes: int, device: str) -> str:
    """Return the warning of steps that take `factor` times as long as before: the likely cause, and what to set."""
    cause = "other programs use the cores" if device == "cpu" else "other programs use the GPU or the cores"
    if threads > 1:
        cause += f", and the {threads} threads of each process wait for each other"
        remedy = "set OMP_NUM_THREADS=1"
    elif processes > 1:
        remedy = f"start fewer processes (--processes, now {processes})"
    else:
        remedy = "end those programs (this run has one process of one thread, so OMP_NUM_THREADS does not help)"
    return f"steps take {factor:.0f} times as long as before. Likely cause: {cause}. What to do: {remedy}"


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a validation with the pretrained model's."""

    worsening: float  # one-step VRMSE over the pretrained model's, geometric mean; inf where one is not finite
    worst: str  # the dataset that has worsened most
    limit: float  # finetune.gate
    diverged: int  # number of rollout scores, by dataset and window, that are not finite
    best: bool  # within the limit, and no earlier validation within it had better rollouts

    @property
    def within_limit(self) -> bool:
        """Return whether the worsening is at most the limit."""
        return self.worsening <= self.limit

    @property
    def text(self) -> str:
        """Return a sentence for people."""
        text = f"one-step VRMSE is {self.worsening:.3f} times the pretrained model's (most on {self.worst})"
        text += f", {self.diverged} rollout scores diverged" if self.diverged else ""
        if not self.within_limit:
            return f"{text}, more than finetune.gate={self.limit:g}"
        return f"{text}{'; the best rollouts so far' if self.best else ''}"


class RegressionLimit:
    """Keeps rollout finetuning from giving up one-step accuracy, if the recipe has finetune.gate (`active`).

    The worsening of a validation is the geometric mean over datasets of its one-step VRMSE over that of the pretrained
    model, which is validated first. At most finetune.gate is within the limit. The best validation within it has the
    fewest diverged rollout scores, and among those the lowest rollout VRMSE (geometric mean, over datasets and the
    protocol's windows, of the ratio to persistence). Its checkpoint is kept in <run>/best, with a state of its own.
    """

    def __init__(self, settings: FinetuneSettings | None, validation: ValidationSettings) -> None:
        self.limit = settings.gate if settings else None
        self.active = self.limit is not None
        self._stops = settings is not None and settings.gate_action == "stop"
        # scores can be compared if they agree in these settings
        self._scored = [validation.protocol, validation.windows, validation.rollouts]
        self._before: dict[str, float | None] | None = None  # one-step VRMSE of the pretrained model, by dataset
        self._best: dict[str, float] | None = None  # worsening, diverged and score of the best validation
        self.failed = False  # whether the last validation exceeded the limit

    @property
    def needs_pretrained(self) -> bool:
        """Return whether the pretrained model must be validated first."""
        return self.active and self._before is None

    @property
    def ends_run(self) -> bool:
        """Return whether the run is over, since its last validation exceeded the limit."""
        return self.active and self._stops and self.failed

    def judge(self, result: ValidationResult) -> Verdict:
        """Return the verdict on a validation, on the main process; the first must be that of the pretrained model."""
        assert self.limit is not None
        now = {name: scores["vrmse"] for name, scores in result.one_step().items()}
        if self._before is None:
            self._before = now
        ratios = {name: _ratio(now[name], self._before.get(name)) for name in now}
        worsening = geometric_mean(list(ratios.values())) or math.inf
        diverged, score = _rollout_score(result)
        found = {"worsening": worsening, "diverged": diverged, "score": score}
        self.failed = worsening > self.limit
        best = not self.failed and (self._best is None or _ORDER(found) < _ORDER(self._best))
        if best:
            self._best = found
        worst = max(ratios, key=lambda name: ratios[name] or math.inf)
        return Verdict(worsening, worst, self.limit, diverged, best)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        return {
            "before": self._before,
            "best": self._best,
            "failed": self.failed,
            "limit": self.limit,
            "scored": self._scored,
        }

    def restore(self, saved: Mapping[str, Any], best: Mapping[str, Any] | None, step: int) -> None:
        """Restore the `state` of a checkpoint of `step` and that of the best checkpoint, if there is one.

        If the limit has changed, the last validation does not end the run, and a best that exceeds the new limit is
        dropped. Raises UserError if the pretrained model was not validated, or not with the present settings.
        """
        if not self.active:
            return
        if saved["before"] is None:
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
        self.failed = saved["failed"] and saved["limit"] == self.limit
        found = [state["best"] for state in (saved, best) if state is not None and state["best"] is not None]
        within = [one for one in found if one["worsening"] <= (self.limit or math.inf)]
        self._best = min(within, key=_ORDER, default=None)


def _ratio(now: float | None, before: float | None) -> float | None:
    """Return now / before: None if it is not finite now, 1 if it was not finite before."""
    if before is None:
        return 1.0
    return None if now is None else max(now, TINY) / max(before, TINY)


def _rollout_score(result: ValidationResult) -> tuple[int, float]:
    """Return the number of diverged rollout scores and the geometric mean of the others."""
    blocks = [block for part in result.scores.datasets.values() for block in part.windows.values()]
    ratios = [block.ratio_to_persistence for block in blocks if block is not None]  # None: a window not covered
    if not ratios:
        raise UserError(
            f"finetune.gate: no trajectory of the valid split covers a window of the protocol "
            f"{result.scores.protocol.name}; choose another (validation.protocol=thirds fits any length)"
        )
    finite = [ratio for ratio in ratios if ratio is not None]
    return len(ratios) - len(finite), geometric_mean(finite) or 0.0


def keep_incident(root: Path, snapshot: Snapshot, report: Callable[[str], None]) -> None:
    """Write the state before a refused step for `fm replay`; keep the newest three. A failure is only reported."""
    try:
        prune_checkpoints(root, write_checkpoint(root, snapshot), keep=3, keep_every=None)
    except UserError as error:
        report(f"what `fm replay` needs could not be kept: {error}")


def keep_best(root: Path, snapshot: Snapshot) -> None:
    """Write the best checkpoint of a run in place of the one before."""
    best = write_checkpoint(root, snapshot)
    # Newer ones are of a run that went back to an earlier checkpoint since.
    delete_checkpoints(path for step, path in list_checkpoints(root).items() if step > snapshot.step)
    prune_checkpoints(root, best, keep=1, keep_every=None)
