"""FLOPs of a model, counted by torch's FlopCounterMode in one call.

A model of torch's fake tensors, which have a shape and no memory, computes nothing: a grid of 1024 x 256 takes as long
as one of 64 x 64. A real model is called on one window, which takes a tenth of the time that fake tensors take.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fm.config import FinetuneSettings
from fm.model.surrogate import Surrogate

# torch has the formula of softmax attention for its kernels on a GPU only.
ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
BACKWARD = 2  # FLOPs of a backward pass over those of its forward pass: gradients of the inputs and of the weights


def forward_flops(model: Surrogate, dataset: str, grid: tuple[int, int]) -> int:
    """Return the FLOPs of products and convolutions in a model call on one window, two per multiply-add."""
    with fake_mode(model), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        frames, constants = zero_fields(model, dataset, grid, windows=1, frames=model.context)
        model(frames, constants, dataset)
    return int(counter.get_total_flops())


def forward_passes(calls: int, finetune: FinetuneSettings | None) -> int:
    """Return the work of training on one window of `calls` model calls, in forward passes.

    A backward pass counts as two forward passes. Each call has one; with pushforward only the last call has one.
    Activation checkpointing repeats the forward pass of each call with a backward pass.
    """
    backward = 1 if finetune and finetune.objective == "pushforward" else calls
    repeated = backward if finetune and finetune.checkpoint_activations else 0
    return calls + repeated + BACKWARD * backward


def held_calls(calls: int, finetune: FinetuneSettings | None) -> int:
    """Return the number of model calls, out of `calls`, whose activations are held at once for the backward pass."""
    holds_one = finetune is not None and (finetune.checkpoint_activations or finetune.objective == "pushforward")
    return 1 if holds_one else calls


def fake_mode(model: Surrogate) -> AbstractContextManager[object]:
    """Return the mode of the model's fake parameters, in which new tensors are fake; no mode for a real model."""
    return getattr(next(model.parameters()), "fake_mode", None) or nullcontext()


def zero_fields(
    model: Surrogate, dataset: str, grid: tuple[int, int], windows: int, frames: int
) -> tuple[Tensor, Tensor]:
    """Return zeros as state (windows, frames, C, H, W) and constants (windows, K, H, W)."""
    spec, device = model.specs[dataset], next(model.parameters()).device
    state = torch.zeros(windows, frames, len(spec.state_channels), *grid, device=device)
    return state, torch.zeros(windows, len(spec.constant_channels), *grid, device=device)
