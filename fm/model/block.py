"""The block of WaveLiT and its pyramid: Mamba-inspired linear attention (MILA, Han et al. 2024) at several resolutions.

    x = x + CPE(x)
    u = LayerNorm(x);  z = SiLU(DWConv(W_in u));  o = Attention(z) * sigmoid(W_g u) + LePE(z)
    x = x + W_out(o * SiLU(W_act u))
    x = x + CPE2(x);   x = x + MLP(LayerNorm(x))

CPE, CPE2, DWConv and LePE are 3x3 depthwise convolutions. The pyramid applies one block at levels l = 0..L with the
same weights and sums with learned scalars a_l (WaveLiT's multi-scale wrapper):

    y = sum_l a_l Up_{2^l}( Block( AvgPool_{2^l}(x) ) )

AvgPool averages the cells that exist at the upper edges (ceil mode), and Up repeats and crops, so any token grid works.
A dataset's adapter adds low-rank updates to the block's matrices (`BlockAdapter`).

Tokens stay (B, h, w, D) throughout, which is the memory of a channels-last image: the layout in which oneDNN's
depthwise kernels are fastest forward and backward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm.model.attention import Linear, LinearAttention, SoftmaxAttention, rope_table
from fm.model.wavelets import NOT_PERIODIC, Periodic

Updates: TypeAlias = Mapping[str, Tensor]  # matrix of the block -> (D_out, D_in), see BlockAdapter


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of one block, and a switch for each ablation of the paper's Tables 1, 13 and 14."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    ridge: str = "ridge"
    kernel_gate: bool = True
    lepe: bool = True
    cpe: bool = True
    mila: bool = True
    attention: str = "linear"


class _Wrap(torch.autograd.Function):
    """Add a ring of wrapped points around the periodic axes. Plain indexing would cost full-size copies in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, along_x: bool, along_y: bool) -> Tensor:
        ctx.axes = (along_x, along_y)
        b, h, w, d = x.shape
        i, j = int(along_x), int(along_y)
        out = x.new_empty(b, h + 2 * i, w + 2 * j, d)
        out[:, i : h + i, j : w + j] = x
        if along_x:
            out[:, 0, j : w + j] = x[:, -1]
            out[:, -1, j : w + j] = x[:, 0]
        if along_y:
            out[:, :, 0] = out[:, :, -2]
            out[:, :, -1] = out[:, :, 1]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        along_x, along_y = ctx.axes
        i, j = int(along_x), int(along_y)
        h, w = grad.shape[1] - 2 * i, grad.shape[2] - 2 * j
        inner = grad[:, i : h + i, j : w + j].clone()
        if along_y:
            inner[:, :, -1] += grad[:, i : h + i, 0]
            inner[:, :, 0] += grad[:, i : h + i, -1]
        for target, source in ((-1, 0), (0, -1)) if along_x else ():
            row = grad[:, source]  # (B, w or w + 2, D)
            inner[:, target] += row[:, j : w + j]
            if along_y:
                inner[:, target, -1] += row[:, 0]
                inner[:, target, 0] += row[:, -1]
        return inner, None, None


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution of tokens (B, h, w, D), circular on periodic axes and zero-padded on the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, periodic: Periodic = NOT_PERIODIC) -> Tensor:
        """Convolve tokens (B, h, w, D)."""
        if any(periodic):
            x = _Wrap.apply(x, *periodic)
        padding = (int(not periodic[0]), int(not periodic[1]))
        # A view gives the gradient the parameter's strides; with other strides DDP would copy it.
        weight = self.weight.flatten(1, 2)[:, None]
        image = F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, padding=padding, groups=len(weight))
        return image.permute(0, 2, 3, 1)


def pad_fields(fields: Tensor, radius: int, periodic: Periodic) -> Tensor:
    """Return fields (B, C, H, W) with `radius` points more on each side.

    They wrap around on periodic axes and repeat the last value at the others.
    """
    along_x, along_y = ("circular" if wraps else "replicate" for wraps in periodic)
    return F.pad(F.pad(fields, (0, 0, radius, radius), along_x), (radius, radius, 0, 0), along_y)


class Block(nn.Module):
    """One block. Its weights do not depend on the grid, so the pyramid applies it at every level."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        d, hidden = config.width, round(config.width * config.mlp_ratio)
        self.norm = nn.LayerNorm(d)
        self.input = Linear(d, d)
        if config.attention == "softmax":
            self.attention: nn.Module = SoftmaxAttention(d, config.heads)
        else:
            self.attention = LinearAttention(d, config.heads, config.ridge)
        self.output = Linear(d, d)
        self.mlp_norm = nn.LayerNorm(d)
        self.expand = Linear(d, hidden)
        self.contract = Linear(hidden, d)
        if config.cpe:
            self.cpe = DepthwiseConv(d)
            self.cpe2 = DepthwiseConv(d)
        if config.mila:
            self.conv = DepthwiseConv(d)
            self.activation = Linear(d, d)
        if config.kernel_gate:
            self.gate = Linear(d, d)
        if config.lepe:
            self.lepe = DepthwiseConv(d)

    def forward(
        self, x: Tensor, rope: Tensor, periodic: Periodic = NOT_PERIODIC, updates: Updates | None = None
    ) -> Tensor:
        """Map tokens (B, h, w, D) to the same shape; `rope` is the table of this grid, (h*w, m/2, 2).

        `updates` are added to the matrices of their names; None: to none.
        """
        updates = updates or {}
        if self.config.cpe:
            x = x + self.cpe(x, periodic)
        x = x + self._mix(self.norm(x), rope, periodic, updates)
        if self.config.cpe:
            x = x + self.cpe2(x, periodic)
        hidden = F.gelu(self.expand(self.mlp_norm(x), updates.get("expand")))
        return x + self.contract(hidden, updates.get("contract"))

    def _mix(self, u: Tensor, rope: Tensor, periodic: Periodic, updates: Updates) -> Tensor:
        z = self.input(u, updates.get("input"))
        if self.config.mila:
            z = F.silu(self.conv(z, periodic))
        o = self.attention(z.flatten(1, 2), rope, updates.get("query_key")).view_as(z)
        if self.config.kernel_gate:
            o = o * torch.sigmoid(self.gate(u, updates.get("gate")))
        if self.config.lepe:
            o = o + self.lepe(z, periodic)
        if self.config.mila:
            o = o * F.silu(self.activation(u, updates.get("activation")))
        return self.output(o, updates.get("output"))


class BlockAdapter(nn.Module):
    """Low-rank updates of one block's matrices for one dataset (LoRA, Hu et al. 2021, arXiv:2106.09685).

        W' = W + B A,   A (r, D_in) drawn,   B (D_out, r) zero at first

    So a model with new adapters starts as the model without them.
    """

    def __init__(self, block: Block, rank: int) -> None:
        super().__init__()
        # All seven linear maps have an update: a low rank in many matrices did better than a higher one in few (LoRA,
        # section 7.1). B A is multiplied out before W meets the tokens, so an adapter costs no product with tokens, and
        # leaving maps out would save parameters only. Convolutions and norms have few numbers, and stay shared.
        matrices = {
            name.rpartition(".")[2]: module.weight
            for name, module in block.named_modules()
            if isinstance(module, Linear)
        }
        self.down = nn.ParameterDict({n: nn.Parameter(torch.zeros(rank, w.shape[1])) for n, w in matrices.items()})
        self.up = nn.ParameterDict({n: nn.Parameter(torch.zeros(w.shape[0], rank)) for n, w in matrices.items()})

    def forward(self) -> dict[str, Tensor]:
        """Return the updates B A (D_out, D_in) by the name of their matrix, float32 under autocast too."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return {name: self.up[name] @ down for name, down in self.down.items()}


def pool(x: Tensor, factor: int) -> Tensor:
    """Average over factor x factor cells: (B, h, w, D) to (B, ceil(h/factor), ceil(w/factor), D)."""
    image = F.avg_pool2d(x.permute(0, 3, 1, 2), factor, ceil_mode=True, count_include_pad=False)
    return image.permute(0, 2, 3, 1)


def upsample(x: Tensor, factor: int, height: int, width: int) -> Tensor:
    """Repeat each cell factor x factor times and crop: (B, h', w', D) to (B, height, width, D)."""
    image = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=factor, mode="nearest")
    return image.permute(0, 2, 3, 1)[:, :height, :width]


def pyramid_tables(height: int, width: int, levels: int, head_width: int, device: torch.device) -> list[Tensor]:
    """Return the RoPE table of each level's grid, finest first."""
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels + 1)]
    return [rope_table(h, w, head_width, device) for h, w in sizes]


class Pyramid(nn.Module):
    """One block applied at levels 0..L with the same weights."""

    def __init__(self, config: BlockConfig, levels: int) -> None:
        super().__init__()
        self.block = Block(config)
        self.level_weights = nn.Parameter(torch.zeros(levels + 1))

    def forward(
        self,
        x: Tensor,
        ropes: Sequence[Tensor],
        periodic: Periodic = NOT_PERIODIC,
        updates: Updates | None = None,
    ) -> Tensor:
        """Map tokens (B, h, w, D) to the same shape; `ropes` are from `pyramid_tables`, `updates` the block's."""
        _, h, w, _ = x.shape
        a = self.level_weights.to(x.dtype).unbind()
        y = a[0] * self.block(x, ropes[0], periodic, updates)
        for level in range(1, len(a)):
            coarse = a[level] * self.block(pool(x, 2**level), ropes[level], periodic, updates)
            y = y + upsample(coarse, 2**level, h, w)
        return y
