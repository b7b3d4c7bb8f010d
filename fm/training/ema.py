"""Exponential moving average of the parameters, float32; evaluation uses it."""

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """Keeps `average`, which follows parameters by avg <- d * avg + (1 - d) * parameter.

    d = min(decay, (1 + step) / (10 + step)), so that a short run is not averaged over its initialisation. Parameters
    may be slices of those of a model: each element goes its own way.
    """

    def __init__(self, average: Mapping[str, Tensor], decay: float) -> None:
        self.average, self.decay = dict(average), decay

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int, halted: Tensor | None = None) -> None:
        """Fold in the parameters, of the same names, after optimiser step `step` (counted from 0).

        Where `halted`, one number on their device, is 1, the averages stay as they are.
        """
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        averages, current = list(self.average.values()), [parameters[name] for name in self.average]
        if halted is not None:  # then each follows itself
            current = list(torch._foreach_mul(current, 1 - halted))
            torch._foreach_add_(current, torch._foreach_mul(averages, halted))
        torch._foreach_lerp_(averages, current, weight)
