"""What is diagnosed: one model on one dataset."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.windows.reader import ShardReader
from fm.diagnosis.jacobian import Step
from fm.surrogate import Surrogate


class Subject:
    """One model on one dataset, in evaluation mode and without gradients of its parameters.

    States are normalised as the model normalises them, so that every channel counts by its own spread.
    """

    def __init__(self, model: Surrogate, reader: ShardReader, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.reader, self.device, self.dataset = reader, device, reader.dataset

    def states(self, trajectories: Sequence[int], num_frames: int) -> Tensor:
        """The first frames of trajectories, normalised: (R, T, C, H, W) on the CPU."""
        frames = np.stack([self.reader.trajectory_frames(index, 0, num_frames) for index in trajectories])
        return self.model.normalise(torch.from_numpy(frames).to(self.device), self.dataset).cpu()

    def physical(self, states: Tensor) -> np.ndarray:
        """Normalised states (..., C, H, W) in physical units."""
        return self.model.denormalise(states.to(self.device), self.dataset).cpu().numpy()

    def step(self, trajectories: Sequence[int]) -> Step:
        """The map from normalised states of these trajectories, in their order, to the next ones."""
        constants = torch.from_numpy(np.stack([self.reader.constants(index) for index in trajectories]))
        fixed = self.model.normalise_constants(constants.to(self.device), self.dataset)
        return lambda state: self.model(state, fixed, self.dataset)

    def pairs(self, reader: ShardReader, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Normalised states and next states (B, C, H, W) of windows of a reader of the same dataset, on the CPU."""
        fields = self.model.normalise(reader.batch(ids, 2).fields.to(self.device), self.dataset).cpu()
        return fields[:, 0], fields[:, 1]


def choose_trajectories(reader: ShardReader, count: int) -> tuple[int, ...]:
    """Up to `count` of the longest trajectories, evenly spaced: different parameters come in different places."""
    frames = [reader.num_frames(index) for index in range(reader.num_trajectories)]
    longest = [index for index, length in enumerate(frames) if length == max(frames)]
    places = np.unique(np.linspace(0, len(longest) - 1, min(count, len(longest))).round().astype(int))
    return tuple(longest[place] for place in places)
