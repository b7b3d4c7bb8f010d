"""AdamW and the learning rate as a pure function of the step."""

import math

import torch

from fm.settings import TrainSettings


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Learning rate of optimiser step `step` (counted from 0).

    Linear warm-up from peak / warmup_steps to the peak, then peak * decay ** (steps since / decay_every), or a cosine
    to zero at the last step. A function of the step alone: accelerate's scheduler wrapper, which advances once per
    process, is not used.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    since = step - settings.warmup_steps
    if settings.schedule == "cosine":
        span = max(settings.steps - settings.warmup_steps, 1)
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(since / span, 1.0)))
    return settings.learning_rate * settings.decay ** (since / settings.decay_every)


def make_optimizer(model: torch.nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over all parameters; one whose gradient is None (another dataset's head) is left untouched by a step."""
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Write `value` into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
