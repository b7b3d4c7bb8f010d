"""The windows of one dataset as a map-style torch Dataset, for a DataLoader and a training loop of your own.

The project's own training does not use this class: its steps draw from several datasets by a schedule (schedule.py),
and threads read ahead (loader.py).
"""

import os
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader


class WindowTensors(TypedDict):
    """Consecutive frames of a trajectory, in the dataset's channels and physical units."""

    fields: torch.Tensor  # (T, C, H, W) float32
    constants: torch.Tensor  # (K, H, W) float32; K may be 0


class Windows(Dataset[WindowTensors]):
    """All windows of `length` consecutive frames of one dataset and split, by number.

    `shards` is a folder or a URL. A DataLoader may use any number of worker processes, forked or spawned: each of them
    opens the shards by itself. UserError if there are no such shards, or no trajectory has `length` frames.
    """

    def __init__(self, shards: Path | str, dataset: str, length: int, split: str = "train") -> None:
        self.shards, self.dataset, self.length, self.split = str(shards), dataset, length, split
        self._opened: tuple[int, ShardReader] | None = None  # process that opened the shards, and its reader
        self._count = len(self._reader().index(length))
        manifest = self._reader().manifest
        self.state_channels: tuple[str, ...] = tuple(manifest.state_channels)  # the C of fields
        self.constant_channels: tuple[str, ...] = tuple(manifest.constant_channels)  # the K of constants
        self.grid: tuple[int, int] = manifest.grid  # (H, W)
        # mean, std, mean_delta, std_delta (the last two of the change to the next frame) -> channel -> value
        self.stats = manifest.stats

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> WindowTensors:
        """Return window `number`. IndexError outside of 0 ... len - 1."""
        batch = self._reader().batch(np.array([number]), self.length)
        return {"fields": batch.fields[0], "constants": batch.constants[0]}

    def moment(self, statistic: str) -> torch.Tensor:
        """Return one of `stats` of the state channels, float32 (C, 1, 1)."""
        values = [self.stats[statistic][name] for name in self.state_channels]
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)

    def _reader(self) -> ShardReader:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_readers(self.shards, [self.dataset], self.split)[self.dataset]
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory maps out, for a process that is spawned."""
        return {**self.__dict__, "_opened": None}
