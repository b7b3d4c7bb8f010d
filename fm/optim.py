"""AdamW and the learning rate as a pure function of the step."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that move together."""

    parameters: Sequence[torch.nn.Parameter]
    datasets: frozenset[str]  # whose forward passes use them
    rate: float = 1.0  # factor on the learning rate; at 0 they never move
    moves_alone: bool = True  # whether they move in steps in which new datasets learn alone


class GroupedAdamW(torch.optim.AdamW):
    """AdamW whose groups can rest.

    A step of AdamW on a zero gradient is not none: it decays the moments and moves by what is left of them. So what the
    step's datasets do not use (heads, task vectors and lifting rows of others) must rest, and so must what is frozen.
    """

    found_inf: torch.Tensor | None = None  # torch's fused AdamW stands still where it is 1

    def __init__(self, groups: Sequence[ParameterGroup], settings: TrainSettings) -> None:
        super().__init__(
            [{"params": list(group.parameters), "of": group, "rests": False} for group in groups],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def let_rest(self, datasets: Collection[str], alone: bool = False) -> None:
        """From now on, steps leave alone what none of `datasets` uses, what is frozen, and, `alone`, what is shared."""
        for group in self.param_groups:
            of = group["of"]
            unused = of.datasets.isdisjoint(datasets)
            group["rests"] = unused or of.rate == 0 or (alone and not of.moves_alone)

    def wake(self) -> None:
        """From now on, nothing rests."""
        for group in self.param_groups:
            group["rests"] = False

    def set_learning_rate(self, value: float) -> None:
        """That of a group whose factor is 1."""
        for group in self.param_groups:
            group["lr"] = value * group["of"].rate

    def step_unless(self, halted: torch.Tensor | None) -> None:
        """A step where `halted`, one number on the device that nobody reads, is 0; where it is 1 all stays as it is."""
        self.found_inf = halted
        self.step()
        self.found_inf = None

    def step(self, closure: Any = None) -> Any:
        """A step of the groups that do not rest."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["rests"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups
