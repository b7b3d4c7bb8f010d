"""The output head of one dataset: a linear map from tokens to the wavelet coefficients of its own state channels."""

import torch
from torch import Tensor, nn

from fm.nn.linear import Linear

# AdamW moves every number by about the learning rate; with this factor a pointwise map, whose entries are about 1 where
# it matters, gets there in hundreds of steps.
POINTWISE_GAIN = 10.0


class Head(nn.Module):
    """Tokens (B, h, w, D) to coefficients (B, C, S, h, w); `pointwise` adds a map of the state itself."""

    def __init__(self, width: int, channels: int, subbands: int, pointwise: bool = False) -> None:
        super().__init__()
        self.subbands = subbands
        self.linear = Linear(width, channels * subbands)
        self.pointwise = nn.Parameter(torch.zeros(channels, channels)) if pointwise else None

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).permute(0, 3, 1, 2).unflatten(1, (-1, self.subbands))

    def of_points(self, state: Tensor) -> Tensor:
        """The pointwise map of a state (B, C, H, W), float32: the same C x C matrix, with the gain, at every point."""
        assert self.pointwise is not None
        with torch.autocast(state.device.type, enabled=False):
            return torch.einsum("ij,bjhw->bihw", POINTWISE_GAIN * self.pointwise, state.float())
