"""Runs the model over one dataset and measures its errors, window by window and rollout by rollout.

Beside the model: persistence and the mean field (fm/scores/errors.py), on the same frames. Everything is in physical
units. Windows, and the rollouts of different trajectories, run in batches: the grids of a dataset are all equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from data_pipeline.windows.reader import ShardReader
from fm.metrics import squared_error_and_variance
from fm.model import WaveLiTFM
from fm.rollout import rollout
from fm.scores.errors import Errors
from fm.scores.protocol import Protocol

# Called once a batch of rollouts and step: trajectory ids, 1-based step, prediction and truth (B, C, H, W).
Watcher = Callable[[Sequence[int], int, Tensor, Tensor], None]


def one_step_windows(reader: ShardReader, protocol: Protocol) -> np.ndarray:
    """Ids of the one-step windows that the protocol scores, ascending: all of them, or so many evenly spaced ones."""
    total = len(reader.index(2))
    count = total if protocol.one_step_windows is None else min(protocol.one_step_windows, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def one_step_errors(
    model: WaveLiTFM,
    reader: ShardReader,
    windows: np.ndarray,
    device: torch.device,
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda count: None,
) -> Errors:
    """Errors of the one-step windows with these ids, of all trajectories: (R, longest trajectory - 1, C).

    Windows left out stay NaN. `advance` is told how many windows were done, batch by batch.
    """
    longest = max(reader.num_frames(index) for index in range(reader.num_trajectories))
    errors = Errors.empty(reader.num_trajectories, longest - 1, len(reader.manifest.state_channels))
    batches = np.array_split(windows, -(-len(windows) // batch_size))
    for number, ids in enumerate(batches):
        if number + 1 < len(batches):
            reader.announce(batches[number + 1], 2)  # from a URL it comes while the model works
        batch = reader.batch(ids, 2).to(device)
        source, target = batch.fields[:, 0], batch.fields[:, 1]
        (prediction,) = rollout(model, reader.manifest.dataset, source, batch.constants, 1)
        _store(errors, reader.index(2).locate(ids), prediction, source, target)
        advance(len(ids))
    return errors


def rollout_steps(reader: ShardReader, trajectory: int, protocol: Protocol) -> int:
    """Steps of a rollout of this trajectory under the protocol; 0 where it ends before the first prediction."""
    steps = max(0, reader.num_frames(trajectory) - protocol.start - protocol.context)
    return steps if protocol.max_steps is None else min(steps, protocol.max_steps)


def rollout_errors(
    model: WaveLiTFM,
    reader: ShardReader,
    trajectories: Sequence[int],
    protocol: Protocol,
    device: torch.device,
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda count: None,
    watch: Watcher = lambda trajectories, step, prediction, truth: None,
) -> Errors:
    """Errors of one rollout of each of these trajectories: (number of them, longest rollout, C), in their order.

    A rollout that stops being finite goes on: its errors say so. `advance` is told how many predictions were done.
    """
    steps = [rollout_steps(reader, trajectory, protocol) for trajectory in trajectories]
    errors = Errors.empty(len(trajectories), max(steps, default=0), len(reader.manifest.state_channels))
    # Longest first, so that rollouts of about one length share a batch.
    order = sorted((row for row in range(len(steps)) if steps[row]), key=lambda row: -steps[row])
    for rows in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
        ids = [trajectories[row] for row in rows]
        first = protocol.start + protocol.context - 1
        initial = _stack([reader.trajectory_frames(index, first, 1)[0] for index in ids], device)  # (B, C, H, W)
        constants = _stack([reader.constants(index) for index in ids], device)
        predictions = rollout(model, reader.manifest.dataset, initial, constants, steps[rows[0]])
        for step, prediction in enumerate(predictions, start=1):
            going = sum(steps[row] >= step for row in rows)  # the first ones: they are the longest
            truth = _stack([reader.trajectory_frames(index, first + step, 1)[0] for index in ids[:going]], device)
            places = (np.array(rows[:going]), np.full(going, step - 1))
            _store(errors, places, prediction[:going], initial[:going], truth)
            watch(ids[:going], step, prediction[:going], truth)
            advance(going)
    return errors


def _stack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


def _store(
    errors: Errors, places: tuple[np.ndarray, np.ndarray], prediction: Tensor, held: Tensor, truth: Tensor
) -> None:
    """Put the errors of a batch (B, C, H, W) where they belong: places = (rows (B,), steps (B,))."""
    squared, variance = squared_error_and_variance(prediction, truth)  # (B, C)
    persistence, _ = squared_error_and_variance(held, truth)
    cells = truth.shape[-2] * truth.shape[-1]
    columns = {
        "variance": variance,
        "model": squared,
        "persistence": persistence,
        "mean_field": variance * (cells - 1) / cells,  # the biased variance: mean squared distance from the own mean
    }
    for part in fields(Errors):
        getattr(errors, part.name)[places] = columns[part.name].cpu().numpy()
