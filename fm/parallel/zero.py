"""DeepSpeed ZeRO: moments (stage 1), gradients (2) and parameters (3) in slices.

DeepSpeed gives what a step's datasets do not use a gradient of zero, where torch gives none, and flattens each group of
the optimiser. The groups are the parameters that the same datasets use, so those of other datasets can rest in a step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fm.optim import GroupedAdamW
from fm.parallel.base import MOMENTS, Parallel
from fm.unroll import Unroll


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
