"""What the model is fed: windows of one dataset, in raw units."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Batch:
    """B windows of T frames of one dataset, in its own channels and physical units."""

    dataset: str
    fields: torch.Tensor  # (B, T, C, H, W) float32
    constants: torch.Tensor  # (B, K, H, W) float32; K may be 0
    windows: torch.Tensor  # (B,) int64, the window ids
    draw: int = -1  # index of the schedule's draw; -1 if it came from none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        fields = self.fields.to(device, non_blocking=non_blocking)
        constants = self.constants.to(device, non_blocking=non_blocking)
        return replace(
            self, fields=fields, constants=constants, windows=self.windows.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return replace(
            self,
            fields=self.fields.pin_memory(),
            constants=self.constants.pin_memory(),
            windows=self.windows.pin_memory(),
        )
