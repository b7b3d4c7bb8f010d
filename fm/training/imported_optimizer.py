"""The optimizer of a run: AdamW, Muon, or a class that the recipe imports (`train.optimizer: {import: ...}`)."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from fm.config import AdaptSettings, TrainSettings
from fm.model.imports import ImportedOptimizer, construct, import_class
from fm.model.surrogate import Surrogate
from fm.training.optim import GroupedAdamW, GroupedOptimizer, MuonWithAdamW, parameter_groups, trunk_matrices


class ImportedOptimizers(GroupedOptimizer):
    """An optimizer that a recipe imports, and perhaps AdamW for the parameters that it does not take.

    Every learning rate follows the schedule, in the ratio of the peaks. The optimizer takes no flag on the device, so
    on a GPU too a step is judged before the next one begins. Its state may hold tensors and numbers.
    """

    takes_found_inf = False

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], name: str, peak: float) -> None:
        """Take the optimizers, the first of which has the name `name`, and the recipe's peak learning rate."""
        self._optimizers, self._name, self._checked = optimizers, name, False
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._relative_rates = [float(group["lr"]) / peak for group in self.param_groups]
        self.state = optimizers[0].state
        for optimizer in optimizers:
            optimizer.state = optimizers[0].state  # one for all, by parameter

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rates, in the ratio of their peaks; each group multiplies its own by its factor."""
        super().set_learning_rate(value)
        for group, relative in zip(self.param_groups, self._relative_rates, strict=True):
            group["lr"] *= relative

    def step(self, closure: Any = None, *, found_inf: Tensor | None = None) -> Any:
        """Take a step of the groups that are not skipped. UserError if the state cannot be stored in a checkpoint."""
        assert found_inf is None  # takes_found_inf
        before = [_numbers(group) for group in self.param_groups]
        for optimizer in self._optimizers:
            groups = optimizer.param_groups
            optimizer.param_groups = [group for group in groups if not group["skipped"]]
            try:
                if optimizer.param_groups:
                    optimizer.step(closure)
            finally:
                optimizer.param_groups = groups
        if not self._checked:
            self._check_storable(before)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)

    def load_moment(self, parameter: nn.Parameter, key: str, value: Tensor | float) -> None:
        """Set an entry of a parameter's state to a stored value; torch keeps most counts of steps on the CPU."""
        group = next(group for group in self.param_groups if any(one is parameter for one in group["params"]))
        if isinstance(value, Tensor) and value.ndim == 0 and not (group.get("capturable") or group.get("fused")):
            self.state[parameter][key] = value
        else:
            super().load_moment(parameter, key, value)

    def _check_storable(self, before: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError if a resumed run would lack a part of the state that this first step has made."""
        lost = {
            f"{key} of its parameter groups"
            for group, old in zip(self.param_groups, before, strict=True)
            for key, _ in _numbers(group).items() - old.items()
        }
        entries = [entry for state in self.state.values() for entry in state.items()]
        lost |= {key for key, value in entries if not isinstance(value, Tensor | bool | int | float | None)}
        if lost:
            raise UserError(
                f"train.optimizer.import: {self._name} changes {', '.join(sorted(map(str, lost)))}, which a checkpoint "
                "cannot hold: expected an optimizer whose state by parameter is tensors and numbers, and no other state"
            )
        self._checked = True


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, bool | int | float | str | tuple)}


def make_imported_optimizer(
    settings: TrainSettings, imported: ImportedOptimizer, own: Sequence[dict[str, Any]], rest: Sequence[dict[str, Any]]
) -> ImportedOptimizers:
    """Return the optimizer that the recipe imports for the groups `own`, and AdamW for `rest`.

    UserError if it cannot be made, or needs more than gradients.
    """
    key, name = "train.optimizer", imported.import_
    cls: type[torch.optim.Optimizer] = import_class(imported, torch.optim.Optimizer, f"{key}.import")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"{key}.import: expected an optimizer whose step takes no closure, got {name}")
    peak = {} if "lr" in imported.args else {"lr": settings.learning_rate}
    try:
        first = construct(cls, imported, key, list(own), **peak)
    except UserError as error:
        if imported.parameters == "all":
            raise UserError(
                f"{error}. {key}.parameters=matrices gives it only the matrices of WaveLiT's blocks"
            ) from error
        raise
    if not all(isinstance(group.get("lr"), float | int) and group["lr"] > 0 for group in first.param_groups):
        raise UserError(f"{key}.import: expected an optimizer with a learning rate lr above 0, got {name}")
    others = [GroupedAdamW(rest, settings)] if rest else []
    return ImportedOptimizers([first, *others], name, settings.learning_rate)


def make_optimizer(model: Surrogate, settings: TrainSettings, adapt: AdaptSettings | None) -> GroupedOptimizer:
    """Return the optimizer that train.optimizer names or imports.

    UserError if it is for matrices and this model has none, or as of `make_imported_optimizer`.
    """
    groups, optimizer = parameter_groups(model, adapt), settings.optimizer
    if optimizer == "adamw":
        return GroupedAdamW(groups, settings)
    if isinstance(optimizer, ImportedOptimizer) and optimizer.parameters == "all":
        return make_imported_optimizer(settings, optimizer, groups, ())
    matrices = {id(parameter) for parameter in trunk_matrices(model)}
    if not matrices:
        key = "train.optimizer=muon: Muon" if optimizer == "muon" else "train.optimizer.parameters=matrices: it"
        raise UserError(f"{key} updates the matrices of WaveLiT's blocks, and a baseline has none")
    split = []
    for group in groups:
        for orthogonal in (False, True):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in matrices) == orthogonal]
            if chosen:
                split.append({**group, "params": chosen, "orthogonal": orthogonal})
    if isinstance(optimizer, ImportedOptimizer):
        own, rest = ([group for group in split if group["orthogonal"] == which] for which in (True, False))
        return make_imported_optimizer(settings, optimizer, own, rest)
    return MuonWithAdamW(split, settings)
