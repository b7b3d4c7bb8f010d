"""AdamW and the learning rate as a pure function of the step.

Learning datasets that a pretrained model did not know, without forgetting the others (the recipe's section `adapt`).

A parameter belongs to a part of the model: embedding (lifting rows, task vectors), trunk or head. It is a new dataset's
own if no other dataset of the run uses it and it is not of the trunk. At the beginning only the new datasets are drawn
and only their own parameters move; then all do, each part at its rate, and the other datasets are replayed. All of it
is a function of the step, so a run that continues has the same.

Exponential moving average of the parameters, float32; evaluation uses it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.files import UserError
from data_pipeline.schema import nearest
from data_pipeline.windows.schedule import Schedule
from fm.config import AdaptSettings, TrainSettings
from fm.model.surrogate import Surrogate


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
    """AdamW that can skip parameter groups.

    AdamW moves a parameter by its momentum even where the gradient is zero. Heads, task vectors and embedding rows of
    datasets that a step does not draw must keep their values, and so must frozen parameters: their groups are skipped.
    """

    found_inf: torch.Tensor | None = None  # torch's fused AdamW changes nothing where this scalar is 1

    def __init__(self, groups: Sequence[ParameterGroup], settings: TrainSettings) -> None:
        super().__init__(
            [{"params": list(group.parameters), "of": group, "skipped": False} for group in groups],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def skip_unused(self, datasets: Collection[str], alone: bool = False) -> None:
        """Skip, in the steps that follow, the groups that none of `datasets` uses and the frozen groups.

        With `alone`, groups that the datasets share with others are skipped too (adapt.alone_steps).
        """
        for group in self.param_groups:
            of = group["of"]
            unused = of.datasets.isdisjoint(datasets)
            group["skipped"] = unused or of.rate == 0 or (alone and not of.moves_alone)

    def clear_skips(self) -> None:
        """Skip no group in the steps that follow."""
        for group in self.param_groups:
            group["skipped"] = False

    def set_learning_rate(self, value: float) -> None:
        """That of a group whose factor is 1."""
        for group in self.param_groups:
            group["lr"] = value * group["of"].rate

    def step(self, closure: Any = None, *, found_inf: torch.Tensor | None = None) -> Any:
        """Take an optimizer step of the groups that are not skipped, unless `found_inf` is 1.

        `found_inf` is a scalar on the device, so the host does not wait for it.
        """
        groups, self.found_inf = self.param_groups, found_inf
        self.param_groups = [group for group in groups if not group["skipped"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups, self.found_inf = groups, None


PARTS = ("embedding", "trunk", "head")


def part_of(parameter: str) -> str:
    """The part of the model, one of PARTS, that the named parameter belongs to; a baseline is all trunk."""
    return {"lifting": "embedding", "task_vectors": "embedding", "heads": "head"}.get(parameter.split(".")[0], "trunk")


def parameter_groups(model: Surrogate, adapt: AdaptSettings | None) -> list[ParameterGroup]:
    """The optimiser's groups: parameters that the same datasets use and, where the recipe adapts, of the same part.

    UserError where new datasets are to learn alone and have no part of their own that may move.
    """
    by_datasets = model.parameters_by_datasets()
    if adapt is None:
        return [ParameterGroup(parameters, datasets) for datasets, parameters in by_datasets.items()]
    parts = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    groups = []
    for datasets, parameters in by_datasets.items():
        for part in PARTS:
            mine: list[nn.Parameter] = [one for one in parameters if parts[id(one)] == part]
            if mine:
                own = part != "trunk" and datasets <= set(adapt.datasets)
                groups.append(ParameterGroup(mine, datasets, getattr(adapt.rates, part), moves_alone=own))
    if adapt.alone_steps and not any(group.moves_alone and group.rate for group in groups):
        raise UserError(
            f"adapt.alone_steps: nothing would move in them, {', '.join(adapt.datasets)} has no part of its own with a "
            "rate above 0. Own parts are of embedding and head (adapt.rates); a baseline has none"
        )
    return groups


def learns_alone(adapt: AdaptSettings | None, step: int) -> bool:
    """Whether only the new datasets' own parameters move in the step after `step` steps."""
    return adapt is not None and step < adapt.alone_steps


def rates_after(adapt: AdaptSettings, step: int) -> dict[str, float]:
    """Factors on the learning rate in the step after `step` steps, by part; those of own parameters as own_<part>."""
    alone = learns_alone(adapt, step)
    rates = {part: 0.0 if alone else getattr(adapt.rates, part) for part in PARTS}
    own = ("embedding", "head") if adapt.datasets else ()
    return rates | {f"own_{part}": getattr(adapt.rates, part) for part in own}


def check_adapted(adapt: AdaptSettings | None, datasets: Collection[str]) -> None:
    """UserError unless the datasets of the run are those that the settings speak of."""
    for name in adapt.datasets if adapt else ():
        if name not in datasets:
            raise UserError(f"adapt.datasets: no dataset {name!r} in this run. {nearest(name, sorted(datasets))}")
    if adapt is not None and adapt.share is not None and set(datasets) <= set(adapt.datasets):
        raise UserError(
            "adapt.share: expected datasets beside the new ones to divide the other draws among, got "
            f"{', '.join(sorted(datasets))} alone; name more in data.datasets, or set adapt.share=null"
        )


def adapted(schedule: Schedule, adapt: AdaptSettings | None, draws: int) -> Schedule:
    """A schedule of one segment with the segments that the settings ask for; a step has `draws` draws.

    UserError where the schedule gives the new datasets no share.
    """
    if adapt is None or (not adapt.alone_steps and adapt.share is None):
        return schedule
    shares = schedule.shares
    fresh = {name: share for name, share in shares.items() if name in adapt.datasets}
    others = {name: share for name, share in shares.items() if name not in adapt.datasets}
    if not sum(fresh.values()):
        raise UserError(f"adapt: sampling.weights gives {', '.join(fresh)} no share; expected a weight above 0")
    if adapt.share is not None:
        if not sum(others.values()):
            raise UserError("adapt.share: sampling.weights leaves the other datasets no share; set adapt.share=null")
        shares = _scaled(fresh, adapt.share) | _scaled(others, 1 - adapt.share)
    if not adapt.alone_steps:
        return schedule.with_shares(0, shares)
    alone = _scaled(fresh, 1.0) | dict.fromkeys(others, 0.0)
    return schedule.with_shares(0, alone).with_shares(adapt.alone_steps * draws, shares)


def _scaled(shares: Mapping[str, float], total: float) -> dict[str, float]:
    """The shares in their proportions, with this sum."""
    return {name: total * share / sum(shares.values()) for name, share in shares.items()}


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
