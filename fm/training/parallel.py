"""How one training objective and its optimizer are spread over processes.

Parallel      the interface that fm/training/step.py uses, whatever the launch configuration
Replicated    every process holds the whole model: one process, or DistributedDataParallel (DDP)
Zero          DeepSpeed ZeRO: slices of the moments (stage 1), gradients (2) and parameters (3)
FullySharded  FSDP2, in fm/training/sharded.py: every process holds a slice of each parameter

`fm.training.state.spread` chooses one of them from the launch configuration.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from typing_extensions import override

from fm.training.objective import Unroll
from fm.training.optim import GroupedAdamW, GroupedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
NUMBER, NUMBERS = "#", {"bool": bool, "int": int, "float": float}  # moments that are numbers of Python


class Parallel(ABC):
    """An objective and its optimizer, and this process's share of both.

    The methods here are those of a process that holds the whole model; the subclasses override what they divide.
    Parameters are named as in the model, and their whole tensors do not depend on the number of processes. Checkpoints
    hold these whole tensors. All processes must call the methods marked "Collective" together.
    """

    name: str  # for messages
    holds_whole_model = True  # False if a forward pass needs the other processes
    takes_found_inf = False  # whether `step` accepts a flag on the device

    def __init__(self, accelerator: Accelerator, objective: Unroll, optimizer: GroupedOptimizer) -> None:
        self.model, self.optimizer, self._accelerator = objective.model, optimizer, accelerator
        self.objective: nn.Module = objective  # its forward computes the loss

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Return the context for forward and backward of a micro-batch; gradients are exchanged at the `last` one."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the gradients of the step's earlier micro-batches."""
        loss.backward()

    def grad_norm(self) -> Tensor:
        """Return the norm of the gradient without skipped parameters, a scalar on the device. Collective."""
        for group in self.optimizer.param_groups:
            if group["skipped"]:
                for parameter in group["params"]:
                    parameter.grad = None
        return get_total_norm([one.grad for one in self.model.parameters() if one.grad is not None])

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradient, whose norm is `norm`, to a norm of at most `max_norm`. Collective."""
        clip_grads_with_norm_(self.model.parameters(), max_norm, norm)

    def step(self, found_inf: Tensor | None = None) -> None:
        """Take an optimizer step unless `found_inf`, a scalar on the device, is 1. Collective."""
        self.optimizer.step(found_inf=found_inf)

    def zero_grad(self) -> None:
        """Drop the gradients. Collective."""
        self.optimizer.zero_grad(set_to_none=True)

    def shards(self) -> dict[str, Tensor]:
        """Return this process's part of each parameter, detached; the averaged weights have the same parts."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def shard(self, name: str, whole: Tensor) -> Tensor:
        """Return a copy of this process's part of `whole`, a tensor of the shape of parameter `name`."""
        return whole.detach().clone()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of `shards` on the main process, {} on the others. Collective."""
        return dict(shards) if self._accelerator.is_main_process else {}

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's state as {"<parameter>/<moment>": whole tensor} on the main process, {} on the others.

        A parameter that no step has changed yet has no entry. Collective.
        """
        return named_state(self.model, self.optimizer) if self._accelerator.is_main_process else {}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Load what `moments` returned, on all processes. Collective."""
        parameters = dict(self.model.named_parameters())
        for key, tensor in moments.items():
            name, _, moment = key.rpartition("/")
            moment, _, number = moment.partition(NUMBER)
            self.optimizer.load_moment(parameters[name], moment, NUMBERS[number](tensor) if number else tensor)


class Replicated(Parallel):
    """The whole model on every process; DDP averages the gradients during the last backward pass of a step."""

    def __init__(self, accelerator: Accelerator, objective: Unroll, optimizer: GroupedOptimizer) -> None:
        super().__init__(accelerator, objective, optimizer)
        self.takes_found_inf = optimizer.takes_found_inf
        self.name = "DDP" if accelerator.num_processes > 1 else "one process"
        self.objective = accelerator.prepare_model(objective)
        if isinstance(self.objective, DistributedDataParallel):
            # The buffers are constants. torch 2.13 warns if this is passed to the constructor.
            self.objective.broadcast_buffers = False

    @override
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._accelerator.no_sync(self.objective)


def named_state(model: nn.Module, optimizer: GroupedOptimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as {"<parameter>/<moment>": tensor}.

    Numbers of Python, which some optimizers keep, become tensors, and their type is added to their name.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is not None:
                tensors[f"{name}/{key}{NUMBER}{type(value).__name__}"] = torch.tensor(value, dtype=torch.float64)
    return tensors


class Zero(Parallel):
    """DeepSpeed ZeRO through accelerate's plugin; fm/distributed.py completes its configuration from the recipe.

    DeepSpeed gives parameters that a step does not use a zero gradient, where torch gives none, and it flattens each
    group of the optimizer. The groups are the parameters that the same datasets use, so whole groups can be skipped.
    """

    def __init__(self, accelerator: Accelerator, objective: Unroll, optimizer: GroupedAdamW) -> None:
        super().__init__(accelerator, objective, optimizer)
        for group in optimizer.param_groups:
            if group["rate"] == 0 or not group["learns_alone"]:
                for parameter in group["params"]:  # DeepSpeed has no way to skip a group
                    parameter.register_hook(partial(_zero_if_skipped, group))
        self._engine = self.objective = accelerator.prepare(objective, optimizer)[0]
        self._stage = int(self._engine.zero_optimization_stage())
        self.name, self.holds_whole_model = f"DeepSpeed ZeRO-{self._stage}", self._stage < 3
        self._has_gradients = False
        self._make_moments()

    @override
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    @override
    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._has_gradients = True

    @override
    def grad_norm(self) -> Tensor:
        zero = self._engine.optimizer
        norms = zero._get_norm_groups() if self._stage == 3 else [zero.scaled_global_norm()]
        norms = torch.stack([torch.as_tensor(norm) for norm in norms])
        # DeepSpeed writes -1 for a group whose norm is not finite.
        return torch.linalg.vector_norm(torch.where(norms < 0, torch.nan, norms))

    @override
    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Do nothing: DeepSpeed clips to the same norm within its own step."""

    @override
    def step(self, found_inf: Tensor | None = None) -> None:
        assert found_inf is None  # takes_found_inf
        self._engine.step()
        self.optimizer.clear_skips()  # code that computes gradients outside of steps must get all of them
        self._has_gradients = False
        if self._stage == 3:
            # ZeRO-3 keeps the last gradient of what a step does not use, and would count it in the next step's norm.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    @override
    def zero_grad(self) -> None:
        if self._has_gradients:  # only its own step makes DeepSpeed drop gradients
            self.optimizer.skip_unused(())
            self.step()

    @override
    def shards(self) -> dict[str, Tensor]:
        if self.holds_whole_model:
            return super().shards()
        return {name: parameter.ds_tensor.detach() for name, parameter in self._parameters().items()}

    @override
    def shard(self, name: str, whole: Tensor) -> Tensor:
        if self.holds_whole_model:
            return super().shard(name, whole)
        slot = self._parameters()[name].ds_tensor
        flat = nn.functional.pad(whole.detach().flatten(), (0, slot.numel() * self._engine.world_size - whole.numel()))
        return flat.narrow(0, slot.numel() * self._engine.global_rank, slot.numel()).to(slot, copy=True).view_as(slot)

    @override
    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.holds_whole_model:
            return super().gather(shards)
        whole = {}
        for name, shard in shards.items():
            parameter = self._parameters()[name]
            parts = [torch.empty_like(shard) for _ in range(self._engine.world_size)]
            torch.distributed.all_gather(parts, shard.contiguous())
            if self._accelerator.is_main_process:
                whole[name] = torch.cat(parts).flatten()[: parameter.ds_numel].view(parameter.ds_shape).cpu()
        return whole

    @override
    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {}
        for parameters, flat in self._flat_groups():
            step = float(self.optimizer.state[flat]["step"])
            for name, parameter in parameters.items() if step else ():
                moments[f"{name}/step"] = torch.tensor(step, dtype=torch.float32)
                for moment in MOMENTS:
                    whole = safe_get_full_optimizer_state(parameter, moment)
                    if self._accelerator.is_main_process:
                        moments[f"{name}/{moment}"] = whole.cpu()
        return moments if self._accelerator.is_main_process else {}

    @override
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for parameters, flat in self._flat_groups():
            for name, parameter in parameters.items():
                if f"{name}/step" not in moments:
                    continue
                self.optimizer.state[flat]["step"].copy_(moments[f"{name}/step"])
                for moment in MOMENTS:
                    whole = moments[f"{name}/{moment}"].to(self._engine.device)
                    safe_set_full_optimizer_state(parameter, whole, moment)

    def _parameters(self) -> dict[str, Any]:
        """Return the parameters by name; DeepSpeed gives those of stage 3 attributes of its own (`ds_...`)."""
        return dict(self.model.named_parameters())

    def _make_moments(self) -> None:
        """Make the moments of all groups; DeepSpeed would make a group's at its first step, after `load_moments`."""
        for _, flat in self._flat_groups():
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            self.optimizer.state[flat] = {"step": step, **{name: torch.zeros_like(flat) for name in MOMENTS}}
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_groups(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Return each group's parameters by name, and the flat tensor that holds this process's part of them."""
        zero, names = self._engine.optimizer, {id(one): name for name, one in self.model.named_parameters()}
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        groups = zero.fp16_groups if self._stage == 3 else zero.bit16_groups
        named = [{names[id(parameter)]: parameter for parameter in group} for group in groups]
        return list(zip(named, flat, strict=True))


def _zero_if_skipped(group: Mapping[str, Any], gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient) if group["skipped"] else gradient
