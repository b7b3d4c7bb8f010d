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
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Fold in the parameters, of the same names, after optimiser step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [parameters[name] for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), current, 1.0 - decay)
