"""Keeps rollout finetuning from paying with one-step accuracy: the one-step regression gate.

Before the first step the pretrained model is validated. From then on, a validation's worsening is the geometric mean
over datasets of one-step VRMSE over the pretrained model's. Validations whose worsening is at most finetune.gate are
compromises, and the best of them is the one with the lowest rollout VRMSE: the geometric mean, over datasets and the
protocol's windows, of the ratio to persistence. Its checkpoint is kept in <run>/best. The pretrained model is one too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from fm.evaluation.validation import ValidationResult
from fm.runtime import as_main_process_finds
from fm.scores.scoring import geometric_mean
from fm.settings import FinetuneSettings


@dataclass(frozen=True)
class Verdict:
    """What a validation means."""

    worsening: float  # one-step VRMSE over the pretrained model's, geometric mean; inf where one is not finite
    worst: str  # the dataset that has worsened most
    limit: float
    passed: bool
    best: bool  # no validation that passed had better rollouts

    @property
    def code(self) -> int:
        """For `Gate.share`."""
        return 2 * self.best + (not self.passed)

    @property
    def text(self) -> str:
        what = f"one-step VRMSE is {self.worsening:.3f} times the pretrained model's (most on {self.worst})"
        if not self.passed:
            return f"{what}, more than finetune.gate={self.limit:g}"
        return f"{what}{'; the best rollouts so far' if self.best else ''}"


class Gate:
    """Judges validations. Its state is part of the checkpoint."""

    def __init__(self, settings: FinetuneSettings | None) -> None:
        self.limit = settings.gate if settings else None
        self._stops = settings is not None and settings.gate_action == "stop"
        self._before: dict[str, float | None] | None = None  # one-step VRMSE of the pretrained model, by dataset
        self._best: dict[str, float] | None = None  # step and score of the best compromise
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
        score = _rollout_score(result)
        best = passed and (self._best is None or score < self._best["score"])
        if best:
            self._best = {"step": step, "score": score}
        self._failed = not passed
        worst = max(ratios, key=lambda name: ratios[name] or math.inf)
        return Verdict(worsening, worst, self.limit, passed, best)

    def share(self, verdict: Verdict | None, accelerator: Accelerator) -> bool:
        """Let all processes know the main one's verdict; returns whether it is the best so far. Collective."""
        code = as_main_process_finds(accelerator, lambda: verdict.code if verdict else None)
        assert code is not None
        self._failed = bool(code % 2)
        return code >= 2

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON; an infinite score is null."""
        found = (self._best or {}).items()
        best = {key: value if math.isfinite(value) else None for key, value in found} or None
        return {"before": self._before, "best": best, "failed": self._failed, "limit": self.limit}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up the `state` of a checkpoint. Under another limit the last validation is not held against the run."""
        self._before, best = saved["before"], saved["best"]
        self._best = best and {key: math.inf if value is None else value for key, value in best.items()}
        self._failed = saved["failed"] and saved["limit"] == self.limit


def _ratio(now: float | None, before: float | None) -> float | None:
    """None where it is not finite now; 1 where it was not before, as there is nothing to lose."""
    if before is None:
        return 1.0
    return None if now is None else max(now, 1e-30) / max(before, 1e-30)


def _rollout_score(result: ValidationResult) -> float:
    """inf where a rollout has diverged; windows that rollouts do not cover are left out."""
    cells = [cell for part in result.scores["datasets"].values() for cell in part["windows"].values()]
    return geometric_mean([cell["ratio_to_persistence"] for cell in cells if cell is not None]) or math.inf
