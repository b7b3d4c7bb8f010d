"""Rotary position embedding in two dimensions (Su et al. 2021, axial form).

A head of width m has m/2 channel pairs (2p, 2p + 1). The first half of the pairs turns with the token's x index, the
second half with its y index, pair i of an axis by the angle index * base**(-i / (m/4)). Turning queries and keys makes
their product depend on the difference of positions only.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

BASE = 10_000.0


def rope_table(height: int, width: int, head_width: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosine and sine of each pair at each token of an h x w grid: float32 (N, m/2, 2), N = h*w, y running fastest.

    Shared by whoever asks for the same one: do not write into it. ValueError if m is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(f"2D RoPE needs a head width that is a multiple of 4, got {head_width}")
    # What traces or fakes tensors must neither leave its own in the cache nor find others there.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _make_table(height, width, head_width, torch.device(device))
    return _kept_table(height, width, head_width, torch.device(device))


@lru_cache(maxsize=64)
def _kept_table(height: int, width: int, head_width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else training could not use what a prediction has left
        return _make_table(height, width, head_width, device)


def _make_table(height: int, width: int, head_width: int, device: torch.device) -> Tensor:
    quarter = head_width // 4
    frequencies = BASE ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    along_x = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies  # (h, m/4)
    along_y = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies  # (w, m/4)
    tables = [torch.stack([angles.cos(), angles.sin()], dim=-1) for angles in (along_x, along_y)]  # (h or w, m/4, 2)
    on_grid = tables[0][:, None].expand(-1, width, -1, -1), tables[1][None].expand(height, -1, -1, -1)
    return torch.cat(on_grid, dim=2).flatten(0, 1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (B, N, A, m) to (a cos - b sin, a sin + b cos), `table` (N, m/2, 2)."""
    pairs = x.unflatten(-1, (-1, 2))  # (B, N, A, m/2, 2)
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic but not complex numbers
        (a, b), (cosine, sine) = pairs.unbind(-1), table[:, None].unbind(-1)
        return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2)
    # One complex product: less than half the time of the six real ones, forward and backward.
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None]
    return torch.view_as_real(turned).flatten(-2)
