"""Hard constraints on predicted states: what the dataset's card says that the equations keep (`model.constraints`).

    mean         a channel has the same mean over the grid as in the frame before
    mean_square  the channels' sum of squares has the same mean over the grid as in the frame before
    divergence   the velocity stays divergence-free: its part that is a gradient is removed (Helmholtz decomposition)
    ranges       a channel stays within its lowest and highest value, as a density that is at least 0

The model trains through the constraints. Derivatives are computed by the Fourier transform. Its fields must
be periodic, so a flow between two walls is continued by its mirror image: the velocity along the wall is even about it,
the velocity through it odd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fm.model.spec import DatasetSpec


def solenoidal(velocity: Tensor, spacing: Sequence[float], walls: Sequence[bool]) -> Tensor:
    """Return the divergence-free part of a velocity (..., 2, H, W), with the same mean.

    `spacing` is the distance of grid points along x and y, in any common unit. `walls` says for x and y whether the
    axis ends at walls half a spacing beyond its first and last point; another axis is periodic.
    """
    height, width = velocity.shape[-2:]
    for axis in (0, 1):
        if walls[axis]:
            signs = velocity.new_ones(2, 1, 1)
            signs[axis] = -1
            velocity = torch.cat([velocity, signs * velocity.flip(axis - 2)], dim=axis - 2)
    rows, columns = velocity.shape[-2:]
    kind = {"dtype": velocity.dtype, "device": velocity.device}
    kx = torch.fft.fftfreq(rows, **kind)[:, None]
    ky = torch.fft.rfftfreq(columns, spacing[1] / spacing[0], **kind)[None]  # only the ratio of wavenumbers matters
    # The shortest wave has no derivative on an even number of points: its sine is 0 at all of them.
    if rows % 2 == 0:
        kx = torch.where(kx.abs() == kx.abs().max(), 0.0, kx)
    if columns % 2 == 0:
        ky = torch.where(ky == ky.max(), 0.0, ky)
    square = kx.square() + ky.square()
    inverse = torch.where(square > 0, 1 / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0)
    u, v = torch.fft.rfft2(velocity).unbind(-3)
    potential = (kx * u + ky * v) * inverse
    spectrum = torch.stack([u - kx * potential, v - ky * potential], dim=-3)
    return torch.fft.irfft2(spectrum, s=(rows, columns))[..., :height, :width]


class Constraints(nn.Module):
    """The constraints of one dataset, on normalized states."""

    mean: Tensor
    std: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, spec: DatasetSpec, mean: Tensor, std: Tensor) -> None:
        """Take mean and std (C, 1, 1), by which the states are normalized."""
        super().__init__()
        self.kinds = [kind for kind, _ in spec.conserved]
        for number, (_, names) in enumerate(spec.conserved):
            channels = torch.tensor([spec.state_channels.index(name) for name in names])
            self.register_buffer(f"channels_{number}", channels, persistent=False)
        self.walls = [ends == ("WALL", "WALL") for ends in spec.boundary]
        self.spacing = spec.spacing
        limits = [spec.ranges.get(name, (None, None)) for name in spec.state_channels]
        self.bounded = any(limit is not None for pair in limits for limit in pair)
        for name, side, missing in (("lowest", 0, -torch.inf), ("highest", 1, torch.inf)):
            values = [missing if pair[side] is None else pair[side] for pair in limits]
            bounds = (torch.tensor(values, dtype=torch.float64, device="cpu").view(-1, 1, 1) - mean) / std
            self.register_buffer(name, bounds.float(), persistent=False)
        self.register_buffer("mean", mean.float(), persistent=False)
        self.register_buffer("std", std.float(), persistent=False)

    def forward(self, state: Tensor, last: Tensor) -> Tensor:
        """Return the next state (B, C, H, W), float32, with the constraints met; `last` (B, C, H, W) came before it."""
        with torch.autocast(state.device.type, enabled=False):
            for number, kind in enumerate(self.kinds):
                channels = self.get_buffer(f"channels_{number}")
                mean, std = self.mean.index_select(0, channels), self.std.index_select(0, channels)
                part, before = (x.index_select(1, channels) for x in (state, last))
                if kind == "mean":
                    part = part + (before - part).mean(dim=(-2, -1), keepdim=True)
                elif kind == "mean_square":
                    raw, raw_before = part * std + mean, before * std + mean
                    squares, wanted = (x.square().mean(dim=(1, 2, 3), keepdim=True) for x in (raw, raw_before))
                    part = (raw * (wanted / squares.clamp_min(torch.finfo(squares.dtype).tiny)).sqrt() - mean) / std
                else:
                    assert self.spacing is not None
                    part = solenoidal(part * std, self.spacing, self.walls) / std
                state = state.index_copy(1, channels, part)
            return state.clamp(self.lowest, self.highest) if self.bounded else state
