"""What the trainer asks of the processes that train one model together, however they share it.

Every process holds the whole model: one process, or DistributedDataParallel.

FSDP2: each process holds a slice of every parameter and gathers a block's when it computes with it.

torch's `fully_shard` is used directly: accelerate's wrapping of it leaves it out on a CPU without a word, and this way
CPU and GPU run the same code.

DeepSpeed ZeRO: moments (stage 1), gradients (2) and parameters (3) in slices.

DeepSpeed gives what a step's datasets do not use a gradient of zero, where torch gives none, and flattens each group of
the optimiser. The groups are the parameters that the same datasets use, so those of other datasets can rest in a step.

Which way a model is spread over processes, as the launch configuration asks.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.files import UserError
from fm.config import AdaptSettings, TrainSettings
from fm.distributed import asked_for, fsdp_reshards
from fm.training.objective import Unroll
from fm.training.optim import GroupedAdamW, parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class Parallel(ABC):
    """An objective, its optimiser, and what each process holds of them.

    Parameters go by their names in the model, and their whole tensors do not depend on the number of processes: that
    is what checkpoints hold. Methods marked collective are called by all processes together.
    """

    name: str  # for people
    holds_whole_model = True  # False where a forward pass needs the other processes
    can_halt = False  # whether `move` takes a verdict that nobody has read

    def __init__(self, objective: Unroll, optimizer: GroupedAdamW) -> None:
        self.model, self.optimizer = objective.model, optimizer
        self.objective: torch.nn.Module = objective  # its forward is what is trained

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a piece: processes exchange gradients at a step's last piece."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to that of the pieces before."""
        loss.backward()

    def _drop_resting_gradients(self) -> None:
        """So that they count neither in the norm nor in the step."""
        for group in self.optimizer.param_groups:
            if group["rests"]:
                for parameter in group["params"]:
                    parameter.grad = None

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients of what does not rest to a norm of at most `max_norm`; returns the norm before, a scalar.

        Collective.
        """

    def let_rest(self, datasets: Collection[str], alone: bool = False) -> None:
        """Before a step's gradient: what stays as it is in it, see `GroupedAdamW.let_rest`."""
        self.optimizer.let_rest(datasets, alone)

    def move(self, halted: Tensor | None = None) -> None:
        """An optimiser step, unless `halted`, one number on the device, is 1. Collective."""
        self.optimizer.step_unless(halted)

    def forget(self) -> None:
        """Drop the gradients. Collective."""
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def shards(self) -> dict[str, Tensor]:
        """What this process holds of each parameter; averaged weights follow these."""

    @abstractmethod
    def shard(self, name: str, whole: Tensor) -> Tensor:
        """A copy of what this process would hold of the named parameter if its value were `whole`."""

    @abstractmethod
    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of parameters, or of what follows them, on the main process; {} on others. Collective."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Optimiser state as "<parameter>/<moment>", whole, on the main process; {} on others. Collective.

        A parameter that no step has moved has none.
        """

    @abstractmethod
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take up what `moments` gave, on all processes. Collective."""


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


class Zero(Parallel):
    """ZeRO by accelerate's DeepSpeed plugin, whose configuration runtime.py completes from the recipe."""

    def __init__(self, accelerator: Accelerator, objective: Unroll, optimizer: GroupedAdamW) -> None:
        super().__init__(objective, optimizer)
        self._is_main = accelerator.is_main_process
        self._silence_what_rests()
        self._engine = self.objective = accelerator.prepare(objective, optimizer)[0]
        self._stage = int(self._engine.zero_optimization_stage())
        self.name, self.holds_whole_model = f"DeepSpeed ZeRO-{self._stage}", self._stage < 3
        self._has_gradients = False
        self._prepare_state()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._has_gradients = True

    def clip(self, max_norm: float) -> Tensor:
        """DeepSpeed clips, to the same norm, when it moves."""
        zero = self._engine.optimizer
        norms = zero._get_norm_groups() if self._stage == 3 else [zero.scaled_global_norm()]
        norms = torch.stack([torch.as_tensor(norm) for norm in norms])
        # -1 stands for a group whose norm is not finite
        return torch.linalg.vector_norm(torch.where(norms < 0, torch.nan, norms))

    def move(self, halted: Tensor | None = None) -> None:
        assert halted is None  # can_halt
        self._engine.step()
        self.optimizer.wake()  # whoever else asks for gradients gets all
        self._has_gradients = False
        if self._stage == 3:
            # It keeps the last gradient of what a step does not use, and would count it in the next step's norm.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def forget(self) -> None:
        if self._has_gradients:
            self.let_rest(())
            self.move()

    def shards(self) -> dict[str, Tensor]:
        if self.holds_whole_model:
            return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return {name: parameter.ds_tensor.detach() for name, parameter in self._parameters().items()}

    def shard(self, name: str, whole: Tensor) -> Tensor:
        if self.holds_whole_model:
            return whole.detach().clone()
        slot = self._parameters()[name].ds_tensor
        flat = nn.functional.pad(whole.detach().flatten(), (0, slot.numel() * self._engine.world_size - whole.numel()))
        return flat.narrow(0, slot.numel() * self._engine.global_rank, slot.numel()).to(slot, copy=True).view_as(slot)

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.holds_whole_model:
            return dict(shards) if self._is_main else {}
        whole = {}
        for name, shard in shards.items():
            parameter = self._parameters()[name]
            parts = [torch.empty_like(shard) for _ in range(self._engine.world_size)]
            torch.distributed.all_gather(parts, shard.contiguous())
            if self._is_main:
                whole[name] = torch.cat(parts).flatten()[: parameter.ds_numel].view(parameter.ds_shape).cpu()
        return whole

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps, moments = self._steps(), {}
        for name, parameter in self.model.named_parameters():
            if steps[name] == 0:
                continue
            moments[f"{name}/step"] = torch.tensor(steps[name], dtype=torch.float32)
            for moment in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, moment)
                if self._is_main:
                    moments[f"{name}/{moment}"] = whole.cpu()
        return moments if self._is_main else {}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameters, flat in self._flat_groups():
            step = moments.get(f"{names[id(parameters[0])]}/step")
            if step is not None:
                self.optimizer.state[flat]["step"].copy_(step)
        for name, parameter in self.model.named_parameters():
            for moment in MOMENTS:
                if f"{name}/{moment}" in moments:
                    whole = moments[f"{name}/{moment}"].to(self._engine.device)
                    safe_set_full_optimizer_state(parameter, whole, moment)

    def _silence_what_rests(self) -> None:
        """Make the gradient of a shared parameter zero in steps in which it rests, before DeepSpeed takes it."""
        for group in self.optimizer.param_groups:
            if group["of"].rate == 0 or not group["of"].moves_alone:
                for parameter in group["params"]:
                    parameter.register_hook(partial(_unless_at_rest, group))

    def _parameters(self) -> dict[str, Any]:
        """By name; DeepSpeed gives those of stage 3 attributes."""
        return dict(self.model.named_parameters())

    def _prepare_state(self) -> None:
        """Make the moments of all groups, zero, which DeepSpeed would leave to their first step."""
        for _, flat in self._flat_groups():
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            self.optimizer.state[flat] = {"step": step, **{name: torch.zeros_like(flat) for name in MOMENTS}}
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_groups(self) -> list[tuple[list[Tensor], Tensor]]:
        """Parameters that are flattened together, and this process's part of them, as the optimiser knows it."""
        zero = self._engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        groups = zero.fp16_groups if self._stage == 3 else zero.bit16_groups
        return list(zip(groups, flat, strict=True))

    def _steps(self) -> dict[str, float]:
        """How often each parameter was moved."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            names[id(parameter)]: float(self.optimizer.state[flat]["step"])
            for parameters, flat in self._flat_groups()
            for parameter in parameters
        }


def _unless_at_rest(group: Mapping[str, Any], gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient) if group["rests"] else gradient


def spread(
    accelerator: Accelerator, objective: Unroll, settings: TrainSettings, adapt: AdaptSettings | None = None
) -> Parallel:
    """The objective, on its device, and a new optimiser, spread over the processes. Collective.

    UserError where the model's own code does not allow what the launch configuration asks for.
    """
    if not len(objective.model.blocks) and (asked_for("FSDP") or asked_for("DEEPSPEED")):
        raise UserError(
            "baselines train in one process or under DDP (launch/ddp.yaml, launch/cpu2.yaml): their networks cannot be "
            "sharded; the launch configuration asks for FSDP or DeepSpeed"
        )
    if asked_for("FSDP"):
        reshard = fsdp_reshards()
        if accelerator.num_processes > 1:
            return FullySharded(accelerator, objective, settings, adapt, reshard)
        accelerator.print("FSDP has nothing to spread over one process; it trains as without.")
    optimizer = GroupedAdamW(parameter_groups(objective.model, adapt), settings)
    if asked_for("DEEPSPEED"):
        return Zero(accelerator, objective, optimizer)
    return Replicated(accelerator, objective, optimizer)
