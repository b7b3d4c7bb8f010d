"""What training costs, counted and not measured: FLOPs, kernels, bytes moved and bytes kept for the backward pass.

Counting runs the model on torch's fake tensors, which have shapes and no memory: 1024 x 256 takes as long as 64 x 64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fm.config import FinetuneSettings
from fm.model.surrogate import Surrogate
from fm.training.objective import Unroll

BACKWARD = 2  # FLOPs of a backward pass over those of its forward pass: gradients of the inputs and of the weights


def forward_flops(model: Surrogate, dataset: str, grid: tuple[int, int]) -> int:
    """FLOPs of the matrix products and convolutions of one model call on one window, two a multiply-add.

    The model may be real or of fake tensors; either way nothing is computed.
    """
    with _fake_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        state, constants = _fields(model, dataset, grid, 1)
        model(state[:, 0], constants, dataset)
    return int(counter.get_total_flops())


def forward_passes(calls: int, finetune: FinetuneSettings | None) -> int:
    """The work of training on one window of `calls` model steps, in forward passes.

    A backward pass counts as two. Each call has one, but with pushforward only the last; activation checkpointing takes
    another forward pass for each.
    """
    backward = 1 if finetune and finetune.objective == "pushforward" else calls
    again = backward if finetune and finetune.checkpoint_activations else 0
    return calls + again + BACKWARD * backward


def held_calls(calls: int, finetune: FinetuneSettings | None) -> int:
    """Of how many of the `calls` model steps activations are held at once for the backward pass."""
    holds_one = finetune is not None and (finetune.checkpoint_activations or finetune.objective == "pushforward")
    return 1 if holds_one else calls


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution, or both that its backward pass takes.

    `kind` is linear (all channels with all), attention (batches of products) or depthwise (each channel with itself).
    """

    kind: str
    dtype: torch.dtype  # in which it is taken
    flops: int  # two a multiply-add
    bytes: int  # of operands and results, each once


@dataclass(frozen=True)
class Footprint:
    """Forward and backward pass of some windows, without the weights themselves."""

    kept_bytes: int  # held for the backward pass
    moved_bytes: int  # read and written by operations that are no matrix products, none fused with another
    operations: int  # kernels, about
    products: tuple[Product, ...]  # depthwise convolutions, which count among the moved bytes too, included


def kept_bytes(objective: Unroll, dataset: str, grid: tuple[int, int], windows: int = 1, calls: int = 1) -> int:
    """Bytes that the forward pass of the objective keeps for its backward pass, beside parameters.

    `objective` holds a model of fake tensors or a real one, of which nothing is computed.
    """
    kept = _Kept(objective.model)
    with _fake_mode(objective.model), kept.hooks:
        _forward(objective, dataset, grid, windows, calls)
    return kept.bytes


def footprint(objective: Unroll, dataset: str, grid: tuple[int, int], windows: int = 1, calls: int = 1) -> Footprint:
    """What `calls` model steps compute, move and keep.

    The objective holds a model of fake tensors, whose gradients stay unset.
    """
    parameters = list(objective.model.parameters())
    kept = _Kept(objective.model)
    with _fake_mode(objective.model), kept.hooks, _Traffic() as traffic:
        loss = _forward(objective, dataset, grid, windows, calls)
        torch.autograd.grad(loss, parameters, allow_unused=True)
    return Footprint(kept.bytes, traffic.bytes, traffic.operations, tuple(traffic.products))


class _Kept:
    """Counts the storages that autograd keeps, each once; `hooks` is the context in which it does."""

    def __init__(self, model: Surrogate) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given twice
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage
        return tensor


class _Traffic(TorchDispatchMode):
    """Counts operations that compute, lists matrix products and convolutions, and adds up what the others move."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0
        self.products: list[Product] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view:
            self.operations += 1
            moved = sum(_size(leaf) for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
            product = _product(function._schema.name.removeprefix("aten::"), args, result, moved)
            if product is not None:
                self.products.append(product)
            if product is None or product.kind == "depthwise":  # bound by what it moves, as all that are none
                self.bytes += moved
        return result


def _product(name: str, args: Any, result: Any, moved: int) -> Product | None:
    """The matrix product or convolution that an operation is, if it is one."""
    if name == "convolution":
        return Product(_mixes(args[8]), args[0].dtype, 2 * result.numel() * args[1][0].numel(), moved)
    if name == "convolution_backward":  # args: gradient of the result, input, weight, ..., groups, which are asked for
        once = 2 * args[0].numel() * args[2][0].numel()
        return Product(_mixes(args[9]), args[1].dtype, once * sum(args[10][:2]), moved)
    if name in ("mm", "bmm"):
        left = args[0]
    elif name in ("addmm", "baddbmm"):
        left = args[1]
    else:
        return None
    return Product("attention" if left.dim() == 3 else "linear", left.dtype, 2 * result.numel() * left.shape[-1], moved)


def _mixes(groups: int) -> str:
    return "linear" if groups == 1 else "depthwise"


def _size(tensor: Tensor) -> int:
    """Bytes that a kernel has to touch; an expanded tensor is read from where it is."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _forward(objective: Unroll, dataset: str, grid: tuple[int, int], windows: int, calls: int) -> Tensor:
    fields, constants = _fields(objective.model, dataset, grid, windows, calls + 1)
    forced = torch.ones(windows, calls, dtype=torch.bool)
    loss: Tensor = objective(fields, constants, forced, dataset)["loss"]
    return loss


def _fields(
    model: Surrogate, dataset: str, grid: tuple[int, int], windows: int, frames: int = 1
) -> tuple[Tensor, Tensor]:
    """State (windows, frames, C, H, W) and constants (windows, K, H, W)."""
    spec, device = model.specs[dataset], next(model.parameters()).device
    state = torch.zeros(windows, frames, len(spec.state_channels), *grid, device=device)
    return state, torch.zeros(windows, len(spec.constant_channels), *grid, device=device)


def _fake_mode(model: Surrogate) -> FakeTensorMode:
    """The mode that the model's tensors belong to; for a real model one that takes real tensors as fake."""
    mode = getattr(next(model.parameters()), "fake_mode", None)
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)
