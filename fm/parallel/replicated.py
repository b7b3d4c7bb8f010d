"""Every process holds the whole model: one process, or DistributedDataParallel."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fm.optim import GroupedAdamW
from fm.parallel.base import Parallel
from fm.unroll import Unroll


class Replicated(Parallel):
    """One process, or DDP: gradients are averaged while the backward pass of a step's last piece runs."""

    can_halt = True

    def __init__(self, accelerator: Accelerator, objective: Unroll, optimizer: GroupedAdamW) -> None:
        super().__init__(objective, optimizer)
        self.name = "DDP" if accelerator.num_processes > 1 else "one process"
        self._accelerator = accelerator
        self.objective = accelerator.prepare_model(objective)
        if isinstance(self.objective, DistributedDataParallel):
            self.objective.broadcast_buffers = False  # constants; torch 2.13 warns of it as an argument

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self._accelerator.no_sync(self.objective):
                yield

    def clip(self, max_norm: float) -> Tensor:
        self._drop_resting_gradients()
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def shards(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def shard(self, name: str, whole: Tensor) -> Tensor:
        return whole.detach().clone()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(shards) if self._accelerator.is_main_process else {}

    def moments(self) -> dict[str, Tensor]:
        return named_state(self.model, self.optimizer) if self._accelerator.is_main_process else {}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        load_named_state(self.model, self.optimizer, moments)


def named_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as "<parameter>/<moment>"."""
    state = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    return {f"{name}/{key}": value for name, moments in state.items() for key, value in moments.items()}


def load_named_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `named_state`; moves each tensor to where the optimiser wants it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[id(parameter)]: number for number, parameter in enumerate(listed)}
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(index[name], {})[moment] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
