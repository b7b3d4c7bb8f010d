"""The output head of one dataset: a linear map from tokens to the wavelet coefficients of its own state channels."""

from torch import Tensor, nn

from fm.nn.linear import Linear


class Head(nn.Module):
    """Tokens (B, h, w, D) to coefficients (B, C, S, h, w)."""

    def __init__(self, width: int, channels: int, subbands: int) -> None:
        super().__init__()
        self.subbands = subbands
        self.linear = Linear(width, channels * subbands)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).permute(0, 3, 1, 2).unflatten(1, (-1, self.subbands))
