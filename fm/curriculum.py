"""What an optimiser step's unroll looks like: its length, which inputs are the truth, and the noise on those.

All are functions of (seed, step, draw, place in the global batch): they depend on no number of processes, and a run
that is continued has the same.
"""

import math

import numpy as np
import torch
from torch import Tensor

from data_pipeline.hashing import stream_key, uniform
from fm.settings import FinetuneSettings

SIGMOID_STEEPNESS = 10.0


def unroll_length(step: int, steps: int, settings: FinetuneSettings, dataset: str) -> int:
    """Model steps of a window of `dataset` at optimiser step `step` of `steps`.

    With unroll_start it grows by one at a time, each length for an equal part of the first `unroll_growth` of the run.
    """
    full = settings.unroll_of(dataset)
    if settings.unroll_start is None or settings.unroll_start >= full:
        return full
    lengths = full - settings.unroll_start + 1
    grown = int(lengths * step / (settings.unroll_growth * steps))
    return min(settings.unroll_start + grown, full)


def forcing_prob(step: int, steps: int, settings: FinetuneSettings) -> float:
    """Probability that an input is the truth at optimiser step `step` of `steps`; 0 but for scheduled sampling.

    From forcing_start at the first step to forcing_end at the last: linearly, by half a cosine, or by the inverse
    sigmoid of Bengio et al. (2015), shifted and scaled so that it begins and ends there.
    """
    if settings.objective != "scheduled_sampling":
        return 0.0
    fraction = min(step / max(steps - 1, 1), 1.0)
    left = {"linear": _linear, "cosine": _cosine, "inverse_sigmoid": _inverse_sigmoid}[settings.forcing](fraction)
    return settings.forcing_end + (settings.forcing_start - settings.forcing_end) * left


def _linear(fraction: float) -> float:
    return 1 - fraction


def _cosine(fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * fraction))


def _inverse_sigmoid(fraction: float) -> float:
    high, low = (1 / (1 + math.exp(SIGMOID_STEEPNESS * (at - 0.5))) for at in (0.0, 1.0))
    return (1 / (1 + math.exp(SIGMOID_STEEPNESS * (fraction - 0.5))) - low) / (high - low)


def forcing_coins(seed: int, draw: int, batch: int, unroll_steps: int, prob: float) -> np.ndarray:
    """Which inputs of a global batch are the truth: (batch, unroll_steps) bool. The first input always is."""
    slots = np.arange(batch * unroll_steps, dtype=np.uint64)
    coins = uniform(stream_key("teacher forcing", seed, draw), slots).reshape(batch, unroll_steps) < prob
    coins[:, 0] = True
    return coins


def input_noise(
    seed: int, draw: int, places: np.ndarray, shape: tuple[int, ...], scale: float, device: torch.device
) -> Tensor:
    """Gaussian noise with std `scale` for the windows at `places` of a draw's batch, (len(places), *shape) float32.

    It is drawn on `device`, so CPUs and GPUs have different numbers.
    """
    noise = torch.empty(len(places), *shape, device=device)
    for row, place in enumerate(places.tolist()):
        key = int(stream_key("jitter", seed, draw, place)) >> 1  # torch takes 63 bits
        noise[row].normal_(std=scale, generator=torch.Generator(device).manual_seed(key))
    return noise
