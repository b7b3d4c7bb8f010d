"""AdamW or Muon, the learning rate, the parameters that it updates, and the average of the weights (paper Appendix E).

Which parameters a step updates depends on its datasets and, in the recipe's section `adapt`, on the part of the model.
`adapt` teaches a pretrained model new datasets while it keeps what it knows: in the first `alone_steps` steps only the
new datasets are drawn and only their own parameters are updated; then all parameters are, each part at its own rate.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from data_pipeline.errors import UserError
from fm.config import AdaptSettings, TrainSettings
from fm.model.surrogate import Surrogate

MUON_MOMENTUM = 0.95
# Of the quintic Newton-Schulz iteration, its steps, and the least norm that it divides by: Jordan's, and torch.optim's.
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, LEAST_NORM = (3.4445, -4.7750, 2.0315), 5, 1e-7
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
    parts = {
        **dict.fromkeys(("lifting", "task_vectors", "scalars"), "embedding"),
        **dict.fromkeys(("heads", "adapters"), "head"),  # an adapter belongs to its dataset, as the head does
    }
    return parts.get(parameter.split(".")[0], "trunk")


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


class GroupedOptimizer(ABC):
    """An optimizer that can skip parameter groups.

    AdamW moves a parameter by its momentum even where the gradient is zero. Heads, adapters, task vectors and embedding
    rows of datasets that a step does not draw must keep their values, and so must frozen parameters: their groups are
    skipped.
    """

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    takes_found_inf = True  # whether `step` takes a flag on the device

    @abstractmethod
    def step(self, closure: Any = None, *, found_inf: Tensor | None = None) -> Any:
        """Take a step of the groups that are not skipped, unless `found_inf`, a scalar on the device, is 1."""

    @abstractmethod
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""

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

    def load_moment(self, parameter: nn.Parameter, key: str, value: Tensor | float) -> None:
        """Set an entry of a parameter's state to a stored value."""
        self.state[parameter][key] = value.to(parameter.device) if isinstance(value, Tensor) else value


class GroupedAdamW(torch.optim.AdamW, GroupedOptimizer):
    """AdamW that can skip parameter groups."""

    found_inf: Tensor | None = None  # torch's fused AdamW changes nothing where this scalar is 1

    def __init__(self, groups: Sequence[dict[str, Any]], settings: TrainSettings) -> None:
        betas, decay = settings.betas, settings.weight_decay
        super().__init__(groups, lr=settings.learning_rate, betas=betas, weight_decay=decay, fused=True)

    def step(self, closure: Any = None, *, found_inf: Tensor | None = None) -> Any:
        """Take a step of the groups that are not skipped, unless `found_inf`, a scalar on the device, is 1."""
        groups, self.found_inf = self.param_groups, found_inf
        self.param_groups = [group for group in groups if not group["skipped"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups, self.found_inf = groups, None


class MuonWithAdamW(GroupedAdamW):
    """Muon for the groups marked `orthogonal`, whose parameters are matrices, and AdamW for the other groups.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) changes a matrix W (m, n) with gradient G by

        B <- mu B + (1 - mu) G,    W <- (1 - rate * weight_decay) W - rate * sqrt(max(1, m / n)) O

    with mu = 0.95 and O close to the nearest semi-orthogonal matrix to mu B + (1 - mu) G (Nesterov's momentum). This is
    torch.optim.Muon (torch >= 2.9) with adjust_lr_fn="original". It is written out here because torch's orthogonalizes
    one matrix at a time: all matrices of one shape together take a third of the time on a CPU. `rate` is
    train.muon_learning_rate times the factor of the schedule and the group's own factor.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], settings: TrainSettings) -> None:
        super().__init__(groups, settings)
        self._relative_rate = settings.muon_learning_rate / settings.learning_rate

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of AdamW and, in the ratio of the two peaks, the learning rate of Muon."""
        super().set_learning_rate(value)
        for group in self.param_groups:
            group["lr"] *= self._relative_rate if group["orthogonal"] else 1.0

    def step(self, closure: Any = None, *, found_inf: Tensor | None = None) -> Any:
        """Take a step of the groups that are not skipped, unless `found_inf`, a scalar on the device, is 1."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            result = super().step(closure, found_inf=found_inf)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"] and not group["skipped"]:
                self._step_matrices(group, found_inf)
        return result

    @torch.no_grad()
    def _step_matrices(self, group: Mapping[str, Any], found_inf: Tensor | None) -> None:
        """Take Muon's step of a group, the matrices of one shape at once."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append((parameter, parameter.grad))
        rate = group["lr"]
        for (rows, columns), pairs in by_shape.items():
            parameters = [parameter for parameter, _ in pairs]
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            before, weights = torch.stack(buffers), torch.stack(parameters)  # (k, m, n)
            gradients = torch.stack([gradient for _, gradient in pairs])
            momentum = before.lerp(gradients, 1 - MUON_MOMENTUM)
            directions = orthogonalize_together(gradients.lerp(momentum, MUON_MOMENTUM))
            moved = weights * (1 - rate * group["weight_decay"])
            moved -= rate * math.sqrt(max(1.0, rows / columns)) * directions
            if found_inf is not None:
                refused = found_inf > 0
                momentum, moved = torch.where(refused, before, momentum), torch.where(refused, weights, moved)
            torch._foreach_copy_(buffers, list(momentum.unbind()))
            torch._foreach_copy_(parameters, list(moved.unbind()))


def orthogonalize_together(matrices: Tensor) -> Tensor:
    """Return `orthogonalize` of matrices (k, m, n) that all processes have: each process takes its share of them."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes == 1:
        return orthogonalize(matrices)
    share = -(-len(matrices) // processes)
    padded = torch.cat([matrices, matrices.new_zeros(processes * share - len(matrices), *matrices.shape[1:])])
    own = orthogonalize(padded[dist.get_rank() * share :][:share]).contiguous()
    directions = torch.empty_like(padded)
    dist.all_gather(list(directions.chunk(processes)), own)
    return directions[: len(matrices)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices (k, m, n) of the same singular vectors, whose singular values lie between about 0.7 and 1.2.

    A singular value far below the matrix's norm stays smaller. Each of the five steps of Newton-Schulz applies
    x -> a x + b x^3 + c x^5 to the singular values. Products are in bfloat16 on a GPU, else in the dtype of the
    matrices: many CPUs have no fast bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)
    if matrices.is_cuda:
        x = x.bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Return the FLOPs (two per multiply-add) of the products that orthogonalize a matrix."""
    m, n = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * 2 * (2 * m * m * n + m**3)


def trunk_matrices(model: Surrogate) -> list[nn.Parameter]:
    """Return the parameters that Muon updates: the weight matrices of the trunk's linear layers. A baseline has none.

    Channel embedding, task vectors, heads, adapters, biases, norms, depthwise convolutions and level weights are not.
    """
    if not len(model.blocks):  # all of a baseline is trunk, its embedding and head included
        return []
    return [one for name, one in model.named_parameters() if part_of(name) == "trunk" and one.ndim == 2]


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
