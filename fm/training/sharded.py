"""FSDP2 of a training objective: parameters, gradients, moments and averaged weights in equal slices.

This file stands apart from fm/training/parallel.py since torch's FSDP2 takes a second to import, which only runs under
launch/fsdp.yaml need.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from typing_extensions import override

from fm.config import AdaptSettings, TrainSettings
from fm.training.objective import Unroll
from fm.training.optim import GroupedAdamW, parameter_groups
from fm.training.parallel import MOMENTS, Parallel, named_state


class FullySharded(Parallel):
    """FSDP2: parameters, gradients, moments and averaged weights in equal slices.

    torch's `fully_shard` is called directly, since accelerate drops FSDP on a CPU without a message. CPU and GPU so run
    the same code.
    """

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
        self._mesh: DeviceMesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for part in (*objective.model.blocks, objective):
            fully_shard(part, mesh=self._mesh, reshard_after_forward=reshard_after_forward)
        # The optimizer is made after fully_shard, so that it gets the slices.
        super().__init__(accelerator, objective, GroupedAdamW(parameter_groups(objective.model, adapt), settings))

    @override
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        cast(FSDPModule, self.objective).set_requires_gradient_sync(last)
        return nullcontext()

    @override
    def grad_norm(self) -> Tensor:
        norm = super().grad_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @override
    def clip(self, norm: Tensor, max_norm: float) -> None:
        # Slices can be scaled only by a DTensor on the same mesh.
        super().clip(DTensor.from_local(norm, self._mesh, [Replicate()], run_check=False), max_norm)

    @override
    def shards(self) -> dict[str, Tensor]:
        return {name: parameter.to_local().detach() for name, parameter in self._parameters().items()}

    @override
    def shard(self, name: str, whole: Tensor) -> Tensor:
        return self._slice(self._parameters()[name], whole).clone()

    @override
    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = self._parameters()
        whole = {name: self._whole(_like(parameters[name], shards[name])) for name in parameters}
        return whole if self._accelerator.is_main_process else {}

    @override
    def moments(self) -> dict[str, Tensor]:
        # Gathering is collective, so all processes need one order; a file of tensors that was loaded has another.
        own = sorted(named_state(self.model, self.optimizer).items())
        whole = {key: self._whole(value) for key, value in own}
        return whole if self._accelerator.is_main_process else {}

    @override
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        parameters, own = self._parameters(), dict(moments)
        for key in moments:
            name, _, moment = key.rpartition("/")
            if moment in MOMENTS:
                own[key] = _like(parameters[name], self._slice(parameters[name], moments[key]))
        super().load_moments(own)

    def _parameters(self) -> dict[str, DTensor]:
        return {name: cast(DTensor, parameter) for name, parameter in self.model.named_parameters()}

    @staticmethod
    def _slice(parameter: DTensor, whole: Tensor) -> Tensor:
        """Return this process's slice of a tensor of the parameter's shape; the last processes may have none."""
        rank, parts = parameter.device_mesh.get_local_rank(), whole.detach().chunk(parameter.device_mesh.size())
        return (parts[rank] if rank < len(parts) else whole[:0]).to(parameter.device)

    def _whole(self, tensor: Tensor) -> Tensor:
        """Return the whole tensor in the main process's memory, not on its GPU; an empty tensor on the others."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.cpu() if self._accelerator.is_main_process else whole.new_empty(0)


def _like(parameter: DTensor, local: Tensor) -> DTensor:
    """Return the tensor of which `local` is this process's slice, distributed as the parameter."""
    spec = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(local, *spec, run_check=False, shape=parameter.shape, stride=parameter.stride())
