"""What one optimiser step did, and what several of them come to: means, speed, time left."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fm.cost import forward_flops, forward_passes
from fm.runtime import peak_memory_bytes
from fm.settings import Recipe
from fm.surrogate import Surrogate


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all processes. A step may hold several draws (train.draws)."""

    step: int  # optimiser steps done, this one included
    datasets: tuple[str, ...]  # one per draw
    grids: tuple[tuple[int, int], ...]  # (H, W), one per draw
    windows: str  # digest of the global batches' window ids
    losses: tuple[float, ...]  # one per draw
    mse: float
    wavelet_l1: float
    grad_norm: float  # before clipping
    lr: float
    samples: int  # windows
    model_calls: tuple[int, ...]  # forward passes of the unroll, one number per draw
    data_seconds: float
    seconds: float
    stop: bool  # a process was asked to stop

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def tokens(self) -> int:
        """Token updates: windows x model calls x H W / 4."""
        windows = self.samples // len(self.grids)
        calls = zip(self.grids, self.model_calls, strict=True)
        return sum(windows * count * h * w // 4 for (h, w), count in calls)


class Meter:
    """Gathers steps, and reads off what they come to since the reading before."""

    def __init__(self, model: Surrogate, recipe: Recipe, pending: Iterable[Mapping[str, Any]]) -> None:
        """`pending` is what `saved` gave where the run continues."""
        self._model, self._steps, self._finetune = model, recipe.train.steps, recipe.finetune
        self._since = [StepResult(**saved) for saved in pending if _is_result(saved)]
        self._flops: dict[str, int] = {}  # dataset -> FLOPs of one model call on one window
        self._began: tuple[float, int] | None = None  # clock and step of this process's first reading

    def add(self, result: StepResult) -> None:
        self._since.append(result)

    def saved(self) -> list[dict[str, Any]]:
        """The steps since the last reading, as JSON."""
        return [asdict(result) for result in self._since]

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """TensorBoard's tags and values, and the facts of a `pace` event. At least one step must have been added.

        Speed is that of stepping; the hours left are by the clock, validations and checkpoints included.
        """
        steps, self._since = self._since, []
        seconds, samples = sum(s.seconds for s in steps), sum(s.samples for s in steps)
        losses = defaultdict(list)
        for name, loss in [pair for s in steps for pair in zip(s.datasets, s.losses, strict=True)]:
            losses[name].append(loss)
        values = {
            "train/loss": sum(s.loss for s in steps) / len(steps),
            "train/mse": sum(s.mse for s in steps) / len(steps),
            "train/wavelet_l1": sum(s.wavelet_l1 for s in steps) / len(steps),
            "train/grad_norm": sum(s.grad_norm for s in steps) / len(steps),
            "train/lr": steps[-1].lr,
            **{f"train_loss/{name}": sum(values) / len(values) for name, values in sorted(losses.items())},
            "throughput/samples_per_s": samples / seconds,
            "throughput/tokens_per_s": sum(s.tokens for s in steps) / seconds,
            "throughput/tflops": sum(self._step_flops(s) for s in steps) / seconds / 1e12,
            "throughput/data_wait_fraction": sum(s.data_seconds for s in steps) / seconds,
            "throughput/peak_memory_gb": peak_memory_bytes() / 1e9,
            "throughput/hours_left": self._hours_left(steps[-1].step, seconds / len(steps)),
        }
        return values, {"steps": len(steps), "seconds": seconds, "samples": samples}

    def _hours_left(self, step: int, seconds_per_step: float) -> float:
        """By the mean pace since the first reading: the steps before it are slow."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        else:
            seconds_per_step = (now - self._began[0]) / (step - self._began[1])
        return (self._steps - step) * seconds_per_step / 3600

    def _step_flops(self, step: StepResult) -> float:
        windows = step.samples // len(step.datasets)
        return sum(
            windows * forward_passes(calls, self._finetune) * self._forward_flops(name, grid)
            for name, grid, calls in zip(step.datasets, step.grids, step.model_calls, strict=True)
        )

    def _forward_flops(self, dataset: str, grid: tuple[int, int]) -> int:
        if dataset not in self._flops:
            self._flops[dataset] = forward_flops(self._model, dataset, grid)
        return self._flops[dataset]


def _is_result(saved: Mapping[str, Any]) -> bool:
    """Whether an entry is a step's result as this version writes them; model_calls was one number once."""
    return saved.keys() == {field.name for field in fields(StepResult)} and isinstance(saved["model_calls"], list)
