"""FSDP2: each process holds a slice of every parameter and gathers a block's when it computes with it.

torch's `fully_shard` is used directly: accelerate's wrapping of it leaves it out on a CPU without a word, and this way
CPU and GPU run the same code.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fm.adapt import parameter_groups
from fm.optim import GroupedAdamW
from fm.parallel.base import MOMENTS, Parallel
from fm.parallel.replicated import load_named_state, named_state
from fm.settings import AdaptSettings, TrainSettings
from fm.unroll import Unroll


class FullySharded(Parallel):
    """Parameters, gradients, moments and averaged weights in equal slices."""

    name = "FSDP2"
    holds_whole_model = False

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Unroll,
        settings: TrainSettings,
        adapt: AdaptSettings | None,
        reshard_after_forward: bool,
    ) -> None:
        self._is_main = accelerator.is_main_process
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for part in (*objective.model.blocks, objective):
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
        super().__init__(objective, GroupedAdamW(parameter_groups(objective.model, adapt), settings))  # of the slices

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        cast(FSDPModule, self.objective).set_requires_gradient_sync(last)
        yield

    def clip(self, max_norm: float) -> Tensor:
        self._drop_resting_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def shards(self) -> dict[str, Tensor]:
        return {name: _sharded(parameter).to_local().detach() for name, parameter in self.model.named_parameters()}

    def shard(self, name: str, whole: Tensor) -> Tensor:
        return self._slice(self._parameters()[name], whole).clone()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = self._parameters()
        whole = {name: self._kept(_like(parameters[name], shards[name])) for name in parameters}
        return whole if self._is_main else {}

    def moments(self) -> dict[str, Tensor]:
        # in one order on all processes, which a file of tensors that was read does not have
        own = sorted(named_state(self.model, self.optimizer).items())
        whole = {key: self._kept(value) for key, value in own}
        return whole if self._is_main else {}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        parameters, own = self._parameters(), dict(moments)
        for key in moments:
            name, _, moment = key.rpartition("/")
            if moment in MOMENTS:
                own[key] = _like(parameters[name], self._slice(parameters[name], moments[key]))
        load_named_state(self.model, self.optimizer, own)

    def _parameters(self) -> dict[str, DTensor]:
        return {name: _sharded(parameter) for name, parameter in self.model.named_parameters()}

    @staticmethod
    def _slice(parameter: DTensor, whole: Tensor) -> Tensor:
        """This process's slice of what has the parameter's shape; the last processes may have none."""
        rank, parts = parameter.device_mesh.get_local_rank(), whole.detach().chunk(parameter.device_mesh.size())
        return (parts[rank] if rank < len(parts) else whole[:0]).to(parameter.device)

    def _kept(self, tensor: Tensor) -> Tensor:
        """The whole tensor: in the main process's memory, not on its GPU; nothing on the others."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.cpu() if self._is_main else whole.new_empty(0)


def _like(parameter: DTensor, local: Tensor) -> DTensor:
    """The tensor whose slices are distributed as the parameter's."""
    spec = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(local, *spec, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _sharded(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter
