"""AdamW, its learning rate, the parameters that it updates, and the average of the weights (paper Appendix E).

Which parameters a step updates depends on its datasets and, in the recipe's section `adapt`, on the part of the model.
`adapt` teaches a pretrained model new datasets while it keeps what it knows: in the first `alone_steps` steps only the
new datasets are drawn and only their own parameters are updated; then all parameters are, each part at its own rate.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.files import UserError
from fm.config import AdaptSettings, TrainSettings
from fm.model.surrogate import Surrogate

PARTS = ("embedding", "trunk", "head")
OWN_PARTS = ("embedding", "head")  # in which a dataset may have parameters that no other dataset uses


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0 (paper Appendix E).

        warm-up      peak * (step + 1) / warmup_steps                                        for step < warmup_steps
        exponential  peak * decay ** ((step - warmup_steps) / decay_every)                   after it, or
        cosine       peak * (1 + cos(pi * (step - warmup_steps) / (steps - warmup_steps))) / 2

    It depends on the step alone, so a run that continues needs no state. accelerate's scheduler wrapper is not used,
    because it advances once per process.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    since = step - settings.warmup_steps
    if settings.schedule == "cosine":
        span = max(settings.steps - settings.warmup_steps, 1)
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(since / span, 1.0)))
    return settings.learning_rate * settings.decay ** (since / settings.decay_every)


def learns_alone(adapt: AdaptSettings | None, step: int) -> bool:
    """Return whether the step after `step` steps updates only the new datasets' own parameters."""
    return adapt is not None and step < adapt.alone_steps


def part_rates(adapt: AdaptSettings, step: int) -> dict[str, float]:
    """Return the factors on the learning rate, by part, in the step after `step` steps.

    The factors of the new datasets' own parameters are called own_<part>.
    """
    alone = learns_alone(adapt, step)
    rates = {part: 0.0 if alone else getattr(adapt.rates, part) for part in PARTS}
    own = OWN_PARTS if adapt.datasets else ()
    return rates | {f"own_{part}": getattr(adapt.rates, part) for part in own}


def part_of(parameter: str) -> str:
    """Return the part of the model, one of PARTS, that the named parameter belongs to; a baseline is all trunk."""
    return {"lifting": "embedding", "task_vectors": "embedding", "heads": "head"}.get(parameter.split(".")[0], "trunk")


def parameter_group(
    parameters: Iterable[nn.Parameter], datasets: frozenset[str], rate: float = 1.0, learns_alone: bool = True
) -> dict[str, Any]:
    """Return a group of the optimizer: parameters that are always updated together.

    `datasets` are those whose forward passes use them. `rate` is a factor on the learning rate; at 0 they are frozen.
    `learns_alone` says whether they are updated in adapt.alone_steps.
    """
    group = {"params": list(parameters), "datasets": datasets, "rate": rate, "learns_alone": learns_alone}
    return group | {"skipped": False}


def parameter_groups(model: Surrogate, adapt: AdaptSettings | None) -> list[dict[str, Any]]:
    """Return groups of parameters that the same datasets use and, with `adapt`, that belong to the same part."""
    by_datasets = model.parameters_by_datasets()
    if adapt is None:
        return [parameter_group(parameters, datasets) for datasets, parameters in by_datasets.items()]
    parts = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    groups = []
    for datasets, parameters in by_datasets.items():
        for part in PARTS:
            chosen = [parameter for parameter in parameters if parts[id(parameter)] == part]
            if chosen:
                own = part in OWN_PARTS and datasets <= set(adapt.datasets)
                groups.append(parameter_group(chosen, datasets, getattr(adapt.rates, part), learns_alone=own))
    if adapt.alone_steps and not any(group["learns_alone"] and group["rate"] for group in groups):
        raise UserError(
            f"adapt.alone_steps: nothing would move in them, {', '.join(adapt.datasets)} has no part of its own with a "
            "rate above 0. Own parts are of embedding and head (adapt.rates); a baseline has none"
        )
    return groups


class GroupedAdamW(torch.optim.AdamW):
    """AdamW that can skip parameter groups.

    AdamW moves a parameter by its momentum even where the gradient is zero. Heads, task vectors and embedding rows of
    datasets that a step does not draw must keep their values, and so must frozen parameters: their groups are skipped.
    """

    found_inf: Tensor | None = None  # torch's fused AdamW changes nothing where this scalar is 1

    def __init__(self, groups: Sequence[dict[str, Any]], settings: TrainSettings) -> None:
        betas, decay = settings.betas, settings.weight_decay
        super().__init__(groups, lr=settings.learning_rate, betas=betas, weight_decay=decay, fused=True)

    def skip_unused(self, datasets: Collection[str], alone: bool = False) -> None:
        """Skip, in the steps that follow, the groups that none of `datasets` uses and the frozen groups.

        With `alone`, groups that do not learn in adapt.alone_steps are skipped too.
        """
        for group in self.param_groups:
            unused = group["datasets"].isdisjoint(datasets)
            group["skipped"] = unused or group["rate"] == 0 or (alone and not group["learns_alone"])

    def clear_skips(self) -> None:
        """Skip no group in the steps that follow."""
        for group in self.param_groups:
            group["skipped"] = False

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate; each group multiplies it by its own factor."""
        for group in self.param_groups:
            group["lr"] = value * group["rate"]

    def step(self, closure: Any = None, *, found_inf: Tensor | None = None) -> Any:
        """Take a step of the groups that are not skipped, unless `found_inf`, a scalar on the device, is 1."""
        groups, self.found_inf = self.param_groups, found_inf
        self.param_groups = [group for group in groups if not group["skipped"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups, self.found_inf = groups, None


class EMA:
    """Exponential moving average of the parameters in float32, which evaluation uses (paper Appendix E).

        average <- d * average + (1 - d) * parameter,    d = min(decay, (1 + step) / (10 + step))

    The ramp of d keeps the random initial weights out of the average of a short run. Parameters may be slices of whole
    parameters, since the average is taken element by element.
    """

    def __init__(self, average: Mapping[str, Tensor], decay: float) -> None:
        self.average, self.decay = dict(average), decay

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int, found_inf: Tensor | None = None) -> None:
        """Update the average after optimizer step `step`, counted from 0, unless `found_inf` on the device is 1."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        averages, current = list(self.average.values()), [parameters[name] for name in self.average]
        if found_inf is not None:  # where it is 1, average each tensor with itself
            current = list(torch._foreach_mul(current, 1 - found_inf))
            torch._foreach_add_(current, torch._foreach_mul(averages, found_inf))
        torch._foreach_lerp_(averages, current, weight)
