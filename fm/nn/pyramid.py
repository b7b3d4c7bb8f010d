"""A block applied to several resolutions with the same weights (WaveLiT's multi-scale wrapper).

    y = sum_l a_l Up_{2^l}( Block( AvgPool_{2^l}(x) ) ),  l = 0..L, with learned scalars a_l.

AvgPool averages the cells that exist at the upper edges (ceil mode) and Up repeats and crops, so any token grid works.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm.nn.dwt import NOT_PERIODIC, Periodic
from fm.nn.mixer import Block, BlockConfig
from fm.nn.rope import rope_table


def pool(x: Tensor, factor: int) -> Tensor:
    """Mean over factor x factor cells: (B, h, w, D) to (B, ceil(h/factor), ceil(w/factor), D)."""
    image = F.avg_pool2d(x.permute(0, 3, 1, 2), factor, ceil_mode=True, count_include_pad=False)
    return image.permute(0, 2, 3, 1)


def upsample(x: Tensor, factor: int, height: int, width: int) -> Tensor:
    """Each cell repeated factor x factor times, cropped: (B, h', w', D) to (B, height, width, D)."""
    image = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=factor, mode="nearest")
    return image.permute(0, 2, 3, 1)[:, :height, :width]


def pyramid_tables(height: int, width: int, levels: int, head_width: int, device: torch.device) -> list[Tensor]:
    """RoPE table of each level's grid, finest first."""
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels + 1)]
    return [rope_table(h, w, head_width, device) for h, w in sizes]


class Pyramid(nn.Module):
    """One block at levels 0..L of the pyramid."""

    def __init__(self, config: BlockConfig, levels: int) -> None:
        super().__init__()
        self.block = Block(config)
        self.level_weights = nn.Parameter(torch.zeros(levels + 1))

    def forward(self, x: Tensor, ropes: Sequence[Tensor], periodic: Periodic = NOT_PERIODIC) -> Tensor:
        """Tokens (B, h, w, D) to the same; `ropes` from `pyramid_tables`."""
        _, h, w, _ = x.shape
        a = self.level_weights.to(x.dtype).unbind()
        y = a[0] * self.block(x, ropes[0], periodic)
        for level in range(1, len(a)):
            coarse = a[level] * self.block(pool(x, 2**level), ropes[level], periodic)
            y = y + upsample(coarse, 2**level, h, w)
        return y
