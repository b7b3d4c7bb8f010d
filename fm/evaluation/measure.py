"""Run the model over one dataset and measure its errors, window by window and rollout by rollout.

The predictors beside the model, persistence and the mean field (fm/evaluation/errors.py), are measured on the same
frames. Everything is in physical units and float32, in whatever precision the model was trained, and without a GPU's
TF32. Windows, and the rollouts of different trajectories, run in batches, since all grids of a dataset are equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from data_pipeline.files import UserError
from data_pipeline.registry import Domain
from data_pipeline.windows.reader import ShardReader
from fm.distributed import precision
from fm.evaluation.errors import ERROR_NAMES, Errors
from fm.evaluation.protocol import Protocol
from fm.evaluation.samples import Sample, evenly_spaced
from fm.model.loss import squared_error_and_variance
from fm.model.surrogate import Surrogate

SHOWN_STEPS = 24  # of the longest rollout, for the pictures of a report

# Called once for each batch of rollouts and step: trajectory ids, 1-based step, prediction and truth (B, C, H, W).
Watcher: TypeAlias = Callable[[Sequence[int], int, Tensor, Tensor], None]
# Called with the number of predictions that were made since the last call, for a progress bar.
Advance: TypeAlias = Callable[[int], object]


@dataclass(frozen=True)
class FrameErrors:
    """Errors of N predicted frames, and their places in the `Errors` of a dataset and task."""

    trajectories: np.ndarray  # ids (N,) int64
    steps: np.ndarray  # index on the step axis (N,) int64
    values: np.ndarray  # (N, 4, C) float64: the fields of `Errors`, in their order

    @classmethod
    def joined(cls, parts: Sequence["FrameErrors"]) -> "FrameErrors":
        """Return the errors of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def collect_errors(
    parts: Sequence[FrameErrors], trajectories: Sequence[int], num_steps: int, num_channels: int
) -> Errors:
    """Return the errors of these trajectories, (number of them, num_steps, C); NaN where nothing was measured."""
    errors = Errors.empty(len(trajectories), num_steps, num_channels)
    row_of = {trajectory: row for row, trajectory in enumerate(trajectories)}
    for part in parts:
        rows = np.array([row_of[trajectory] for trajectory in part.trajectories.tolist()], np.int64)
        for index, name in enumerate(ERROR_NAMES):
            getattr(errors, name)[rows, part.steps] = part.values[:, index]
    return errors


def one_step_windows(reader: ShardReader, protocol: Protocol) -> np.ndarray:
    """Return the ascending ids of the one-step windows that the protocol scores: all, or some evenly spaced ones."""
    total = len(reader.index(2))
    count = total if protocol.one_step_windows is None else min(protocol.one_step_windows, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def one_step_length(reader: ShardReader) -> int:
    """Return the length of the step axis of the one-step errors: the windows of the longest trajectory."""
    return max(reader.num_frames(index) for index in range(reader.num_trajectories)) - 1


def rollout_steps(reader: ShardReader, trajectory: int, protocol: Protocol) -> int:
    """Return the steps of a rollout of this trajectory; 0 if the trajectory ends before the first prediction.

    A rollout ends before the first frame that the shards leave out of all windows (`shard --skip nonfinite`, or
    stationary).
    """
    stop = protocol.start
    for first, last in reader.manifest.trajectories[trajectory].segments:
        stop = max(stop, last) if first <= stop else stop
    steps = max(0, stop - protocol.start - protocol.context)
    return steps if protocol.max_steps is None else min(steps, protocol.max_steps)


def rollout_batches(
    reader: ShardReader, trajectories: Sequence[int], protocol: Protocol, batch_size: int
) -> list[list[int]]:
    """Return batches of the trajectories that have a rollout, longest first, so a batch has rollouts of one length."""
    steps = {trajectory: rollout_steps(reader, trajectory, protocol) for trajectory in trajectories}
    order = sorted((one for one in trajectories if steps[one]), key=lambda trajectory: -steps[trajectory])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def one_step_errors(
    model: Surrogate, reader: ShardReader, windows: np.ndarray, device: torch.device, batch_size: int = 8
) -> Errors:
    """Return the errors of the one-step windows with these ids: (R, longest trajectory - 1, C), NaN elsewhere."""
    measured = measure_windows(model, reader, windows, device, batch_size)
    trajectories = range(reader.num_trajectories)
    return collect_errors([measured], trajectories, one_step_length(reader), len(reader.manifest.state_channels))


def rollout_errors(
    model: Surrogate,
    reader: ShardReader,
    trajectories: Sequence[int],
    protocol: Protocol,
    device: torch.device,
    batch_size: int = 8,
    watch: Watcher = lambda trajectories, step, prediction, truth: None,
) -> Errors:
    """Return the errors of a rollout of each of these trajectories: (number of them, longest rollout, C)."""
    batches = rollout_batches(reader, trajectories, protocol, batch_size)
    measured = [measure_rollouts(model, reader, ids, protocol, device, watch=watch) for ids in batches]
    longest = max((rollout_steps(reader, trajectory, protocol) for trajectory in trajectories), default=0)
    return collect_errors(measured, trajectories, longest, len(reader.manifest.state_channels))


@precision(exact=True)
def measure_windows(
    model: Surrogate,
    reader: ShardReader,
    windows: np.ndarray,
    device: torch.device,
    batch_size: int,
    advance: Advance = lambda count: None,
) -> FrameErrors:
    """Return the errors of one prediction of each one-step window with these ids; UserError if data are not finite."""
    parts = []
    batches = np.array_split(windows, -(-len(windows) // batch_size))
    for number, ids in enumerate(batches):
        if number + 1 < len(batches):
            reader.prefetch(batches[number + 1], 2)  # from a URL it is downloaded while the model works
        batch = reader.batch(ids, 2).to(device)
        source, target = batch.fields[:, 0], batch.fields[:, 1]
        (prediction,) = model.iterate(source, batch.constants, reader.manifest.dataset, 1)
        part = FrameErrors(*reader.index(2).locate(ids), measure_frames(prediction, source, target))
        _check_truth(reader, part, held=part.steps, truth=part.steps + 1)
        parts.append(part)
        advance(len(ids))
    return FrameErrors.joined(parts)


@precision(exact=True)
def measure_rollouts(
    model: Surrogate,
    reader: ShardReader,
    trajectories: Sequence[int],
    protocol: Protocol,
    device: torch.device,
    advance: Advance = lambda count: None,
    watch: Watcher = lambda trajectories, step, prediction, truth: None,
) -> FrameErrors:
    """Return the errors of the rollouts of one of `rollout_batches`; UserError if data are not finite.

    A rollout that stops being finite goes on, and its errors are not finite either.
    """
    steps = [rollout_steps(reader, trajectory, protocol) for trajectory in trajectories]
    first = protocol.start + protocol.context - 1
    initial = _stack([reader.trajectory_frames(index, first, 1)[0] for index in trajectories], device)  # (B, C, H, W)
    constants = _stack([reader.constants(index) for index in trajectories], device)
    parts = []
    predictions = model.iterate(initial, constants, reader.manifest.dataset, steps[0])
    for step, prediction in enumerate(predictions, start=1):
        going = sum(length >= step for length in steps)  # the longest rollouts are the first ones
        ids = trajectories[:going]
        truth = _stack([reader.trajectory_frames(index, first + step, 1)[0] for index in ids], device)
        values = measure_frames(prediction[:going], initial[:going], truth)
        part = FrameErrors(np.array(ids, np.int64), np.full(going, step - 1), values)
        _check_truth(reader, part, held=np.full(going, first), truth=part.steps + first + 1)
        parts.append(part)
        watch(ids, step, prediction[:going], truth)
        advance(going)
    return FrameErrors.joined(parts)


def _check_truth(reader: ShardReader, part: FrameErrors, held: np.ndarray, truth: np.ndarray) -> None:
    """UserError if a frame of the data (N,), the one that persistence holds or the true one, is not finite."""
    for name, frames in (("variance", truth), ("persistence", held)):
        bad = np.flatnonzero(~np.isfinite(part.values[:, ERROR_NAMES.index(name)]).all(axis=1))
        if bad.size:
            raise UserError(
                f"{reader.folder}: {reader.dataset}: expected finite data to score on, got a value that is not in "
                f"trajectory {part.trajectories[bad[0]]}, frame {frames[bad[0]]}: `data-pipeline audit SHARDS` lists "
                "all such frames; make the shards of this split without the files that hold them"
            )


def _stack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


def measure_frames(prediction: Tensor, held: Tensor, truth: Tensor) -> np.ndarray:
    """Return the errors (B, 4, C) of a batch (B, C, H, W); `held` is the frame that persistence predicts."""
    squared, variance = squared_error_and_variance(prediction, truth)  # (B, C)
    persistence, _ = squared_error_and_variance(held, truth)
    cells = truth.shape[-2] * truth.shape[-1]
    columns = {
        "variance": variance,
        "model": squared,
        "persistence": persistence,
        "mean_field": variance * (cells - 1) / cells,  # the biased variance: mean squared distance from the own mean
    }
    return torch.stack([columns[name] for name in ERROR_NAMES], dim=1).cpu().numpy()


class Recorder:
    """A watcher for `measure_rollouts` that keeps one channel of one trajectory's rollout at a few steps."""

    def __init__(self, trajectory: int, channel: int, steps: tuple[int, ...]) -> None:
        self.trajectory, self.channel, self.steps = trajectory, channel, steps
        self.fields: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, trajectories: Sequence[int], step: int, prediction: Tensor, truth: Tensor) -> None:
        """Keep truth and prediction if this is the trajectory and one of the steps."""
        if step in self.steps and self.trajectory in trajectories:
            row = trajectories.index(self.trajectory)
            self.fields.append((truth[row, self.channel].cpu().numpy(), prediction[row, self.channel].cpu().numpy()))

    def stacked(self) -> np.ndarray | None:
        """Return truth and prediction, (2, n, H, W); None if nothing was kept."""
        return np.stack(self.fields, axis=1) if self.fields else None


def make_recorder(reader: ShardReader, trajectory: int, protocol: Protocol, num_steps: int) -> Recorder:
    """Return a recorder of `num_steps` evenly spaced steps of a trajectory, of the channel that pictures show."""
    shown = evenly_spaced(rollout_steps(reader, trajectory, protocol), num_steps)
    names, stats = reader.manifest.state_channels, reader.manifest.stats
    channel = varying_channel([stats["std"][name] for name in names], [stats["rms"][name] for name in names])
    return Recorder(trajectory, channel, tuple(index + 1 for index in shown))


def longest_recorder(reader: ShardReader, protocol: Protocol) -> Recorder:
    """Return the recorder of a report's pictures, which show the longest rollout of each dataset."""
    steps = [rollout_steps(reader, trajectory, protocol) for trajectory in range(reader.num_trajectories)]
    return make_recorder(reader, int(np.argmax(steps)), protocol, SHOWN_STEPS)


def varying_channel(std: Sequence[float], rms: Sequence[float]) -> int:
    """Return the first channel whose std is above a tenth of its rms, else the first channel.

    The Well lists scalar fields first, but active_matter's first field, a concentration, is nearly constant.
    """
    varying = [index for index, (spread, size) in enumerate(zip(std, rms, strict=True)) if spread > 0.1 * size]
    return varying[0] if varying else 0


def make_sample(
    reader: ShardReader, recorder: Recorder, shown: np.ndarray, vrmse: np.ndarray, domain: Domain | None = None
) -> Sample:
    """Return the sample of a recorder from `shown`, truth and prediction (2, n, H, W), and its VRMSE (S, C)."""
    return Sample(
        dataset=reader.dataset,
        channel=reader.manifest.state_channels[recorder.channel],
        trajectory=recorder.trajectory,
        dt=reader.manifest.trajectories[recorder.trajectory].dt,
        steps=recorder.steps,
        truth=shown[0],
        prediction=shown[1],
        vrmse=vrmse[np.array(recorder.steps) - 1, recorder.channel],
        domain=domain,
    )
