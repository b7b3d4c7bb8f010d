"""Exponential moving average of the parameters, float32; evaluation uses it."""

import copy

import torch

from fm.model import WaveLiTFM


class EMA:
    """Keeps `model`, a copy whose parameters follow avg <- d * avg + (1 - d) * parameter.

    d = min(decay, (1 + step) / (10 + step)), so that a short run is not averaged over its initialisation.
    """

    def __init__(self, model: WaveLiTFM, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: WaveLiTFM, step: int) -> None:
        """Fold in the parameters after optimiser step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average = [p.detach() for p in self.model.parameters()]
        current = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(average, current, 1.0 - decay)
