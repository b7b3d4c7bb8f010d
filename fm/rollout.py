"""Autoregressive rollout: the model's own prediction is its next input."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fm.surrogate import Surrogate


def rollout(model: Surrogate, dataset: str, initial: Tensor, constants: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield the next `steps` states (B, C, H, W) in raw units, without gradients.

    initial (B, C, H, W) and constants (B, K, H, W) in raw units. The state stays normalised from step to step. Nothing
    is clipped: a diverging rollout yields what the model says, infinities included.
    """
    with torch.no_grad():
        state = model.normalise(initial, dataset)
        fixed = model.normalise_constants(constants, dataset)
    for _ in range(steps):
        with torch.no_grad():
            state = model(state, fixed, dataset)
            raw = model.denormalise(state, dataset)
        yield raw
