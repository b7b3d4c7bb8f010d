"""Lifting of wavelet coefficients to tokens through rows owned by canonical channels (WaveLiT-FM, section 3.5).

x_n = sum over the present channels c and subbands s of W[c][s] * coefficient[c, s, n], no bias. Gathering the rows of
the present channels equals padding absent channels with zeros, without the work; a channel is known by its name alone.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fm.nn.linear import linear


class Lifting(nn.Module):
    """Rows (S, D) for each canonical channel."""

    def __init__(self, channels: Iterable[str], subbands: int, width: int) -> None:
        super().__init__()
        names = sorted(set(channels))
        self.rows = nn.ParameterDict({name: nn.Parameter(torch.zeros(subbands, width)) for name in names})

    def forward(self, coefficients: Tensor, channels: Sequence[str]) -> Tensor:
        """Coefficients (B, C, S, h, w) of the named channels to tokens (B, h, w, D)."""
        weight = torch.cat([self.rows[name] for name in channels])  # (C * S, D)
        return linear(coefficients.flatten(1, 2).permute(0, 2, 3, 1), weight.t())
