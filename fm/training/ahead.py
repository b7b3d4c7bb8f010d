"""Steps whose losses nobody has read yet.

To read a number from a GPU is to wait until it has computed it, and meanwhile nobody hands it work. So the trainer
reads what several steps found at once. Until then a flag on the device judges: from the first step whose loss or
gradient is not finite on, optimiser and averaged weights stand still, so the state is the one before that step when the
trainer reads of it, and goes back to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.windows.schedule import Draw


@dataclass(frozen=True)
class Found:
    """What the processes found in a step together: per draw loss, mse and wavelet_l1; gradient norm; a stop."""

    values: Tensor  # (3 * draws + 2,)

    @classmethod
    def by(cls, everyone: Tensor) -> "Found":
        """`everyone` is (processes, 3 * draws + 2): parts of the losses, which add up, the norm, 1 where stopped."""
        return cls(torch.cat([everyone[:, :-2].sum(dim=0), everyone[:, -2:].amax(dim=0)]))

    @property
    def losses(self) -> list[float]:
        """One per draw."""
        return self.values[:-2:3].tolist()

    @property
    def mse(self) -> float:
        return float(self.values[1:-2:3].mean())

    @property
    def wavelet_l1(self) -> float:
        return float(self.values[2:-2:3].mean())

    @property
    def norm(self) -> float:
        """Of the gradient, before clipping."""
        return float(self.values[-2])

    @property
    def stop(self) -> bool:
        """Whether a process was asked to stop."""
        return bool(self.values[-1])

    def is_broken(self) -> Tensor:
        """1 where a loss or the norm is not finite, else 0; float32, on the device, as the optimiser takes it."""
        judged = torch.cat([self.values[:-2:3], self.values[-2:-1]])
        return 1 - torch.isfinite(judged).all().float()


@dataclass(frozen=True)
class Taken:
    """A step that was taken."""

    number: int  # counted from 1
    draws: Sequence[Draw]
    lr: float
    started: float  # time.perf_counter
    data_seconds: float
    found: Found


class Ahead:
    """The steps since the last read."""

    def __init__(self) -> None:
        self._taken: list[Taken] = []
        self._halted: Tensor | None = None

    def add(self, taken: Taken) -> None:
        self._taken.append(taken)

    def halted(self) -> Tensor:
        """1 if the step added last is broken, or one that this was asked of since the last read; else 0."""
        broken = self._taken[-1].found.is_broken()
        self._halted = broken if self._halted is None else torch.maximum(self._halted, broken)
        return self._halted

    def read(self) -> list[Taken]:
        """The steps since the last read, in the processor's memory."""
        taken, self._taken, self._halted = self._taken, [], None
        rows = torch.stack([step.found.values for step in taken]).cpu()
        return [replace(step, found=Found(row)) for step, row in zip(taken, rows, strict=True)]
