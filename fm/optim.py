"""AdamW and the learning rate as a pure function of the step."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

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


class GroupedAdamW(torch.optim.AdamW):
    """AdamW with a group for the parameters that the same datasets use; groups can rest.

    A step of AdamW on a zero gradient is not none: it decays the moments and moves by what is left of them. So what the
    step's datasets do not use (heads, task vectors and lifting rows of others) must rest.
    """

    def __init__(self, groups: Mapping[frozenset[str], Sequence[torch.nn.Parameter]], settings: TrainSettings) -> None:
        """`groups` are the parameters by the datasets that use them (`Surrogate.parameters_by_datasets`)."""
        self.fused = next(iter(groups.values()))[0].device.type == "cuda"
        super().__init__(
            [{"params": params, "datasets": datasets, "rests": False} for datasets, params in groups.items()],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=self.fused or None,
        )

    def let_rest(self, datasets: Collection[str]) -> None:
        """From now on, steps leave the parameters alone that none of `datasets` uses."""
        for group in self.param_groups:
            group["rests"] = group["datasets"].isdisjoint(datasets)

    def set_learning_rate(self, value: float) -> None:
        for group in self.param_groups:
            group["lr"] = value

    def step(self, closure: Any = None) -> Any:
        """A step of the groups that do not rest."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["rests"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups
