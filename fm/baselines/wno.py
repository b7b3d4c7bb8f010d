"""A Wavelet Neural Operator (Tripura and Chakraborty 2022) whose weights do not depend on the grid.

    v_0 = P u,   v_{j+1} = GELU( W^-1[ R_j W v_j ] + K_j v_j ),   output = Q v_n

W is a discrete wavelet transform of several levels, K_j a 1 x 1 convolution, P and Q pointwise networks. R_j acts on
the approximation and the three details of the coarsest level and leaves finer details as they are, as published; there
it has a matrix for each coefficient, which ties it to one grid, here one matrix for each of the four subbands.
"""

import ptwt
import pywt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WAVELET = "db4"  # the paper's, with symmetric extension
PROJECTION = 128  # hidden channels of Q, as published


class WaveletMixing(nn.Module):
    """W^-1[ R W v ] with a channel matrix for each subband of the coarsest level."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.weights = nn.Parameter(torch.randn(4, width, width) / width**0.5)  # of LL, LH, HL, HH

    def forward(self, v: Tensor) -> Tensor:
        """(B, D, H, W) to the same, float32. A grid too small for all levels has as many as it has room for."""
        height, width = v.shape[-2:]
        levels = max(1, min(self.levels, pywt.dwtn_max_level((height, width), WAVELET)))
        approximation, coarsest, *finer = ptwt.wavedec2(v, WAVELET, mode="symmetric", level=levels)
        subbands = torch.stack([approximation, *coarsest])  # (4, B, D, h, w)
        mixed = torch.einsum("sbihw,sio->sbohw", subbands, self.weights).unbind()
        coefficients = (mixed[0], ptwt.WaveletDetailTuple2d(*mixed[1:]), *finer)
        return ptwt.waverec2(coefficients, WAVELET)[..., :height, :width]


class WNO(nn.Module):
    """Fields (B, dim_in, H, W) to (B, dim_out, H, W) on any grid; float32 whatever the autocast state."""

    def __init__(self, dim_in: int, dim_out: int, width: int, depth: int, levels: int) -> None:
        super().__init__()
        self.lifting = nn.Conv2d(dim_in, width, 1)
        self.mixings = nn.ModuleList(WaveletMixing(width, levels) for _ in range(depth))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.projection = nn.Sequential(nn.Conv2d(width, PROJECTION, 1), nn.GELU(), nn.Conv2d(PROJECTION, dim_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        v = self.lifting(x)
        for mixing, pointwise in zip(self.mixings, self.pointwise, strict=True):
            v = F.gelu(mixing(v) + pointwise(v))
        return self.projection(v)
