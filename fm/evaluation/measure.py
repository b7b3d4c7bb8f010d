"""Runs the model over one dataset and measures its errors, window by window and rollout by rollout.

Beside the model: persistence and the mean field (fm/evaluation/errors.py), on the same frames. Everything is in
physical units and float32, whatever the precision of the training and without a GPU's TF32. Windows, and the rollouts
of different trajectories, run in batches: the grids of a dataset are all equal.

What pictures show of an evaluation: one channel of the longest rollout of each dataset, at some of its steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data_pipeline.files import UserError
from data_pipeline.shards.format import Manifest
from data_pipeline.windows.reader import ShardReader
from fm.distributed import precision
from fm.evaluation.errors import Errors
from fm.evaluation.protocol import Protocol
from fm.evaluation.samples import Domain, Sample, evenly_spaced
from fm.model.loss import squared_error_and_variance
from fm.model.surrogate import Surrogate

# Called once a batch of rollouts and step: trajectory ids, 1-based step, prediction and truth (B, C, H, W).
Watcher = Callable[[Sequence[int], int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Measured:
    """Errors of N predicted frames, and their places in the `Errors` of a dataset and task."""

    trajectories: np.ndarray  # ids (N,) int64
    steps: np.ndarray  # index on the step axis (N,) int64
    values: np.ndarray  # (N, 4, C) float64: the parts of `Errors`, in their order

    @classmethod
    def joined(cls, parts: Sequence["Measured"]) -> "Measured":
        return cls(*(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(cls)))


def as_errors(parts: Sequence[Measured], trajectories: Sequence[int], num_steps: int, num_channels: int) -> Errors:
    """All that was measured of these trajectories, (number of them, num_steps, C); what was not stays NaN."""
    errors = Errors.empty(len(trajectories), num_steps, num_channels)
    row_of = {trajectory: row for row, trajectory in enumerate(trajectories)}
    for part in parts:
        rows = np.array([row_of[trajectory] for trajectory in part.trajectories.tolist()], np.int64)
        for index, one in enumerate(fields(Errors)):
            getattr(errors, one.name)[rows, part.steps] = part.values[:, index]
    return errors


def one_step_windows(reader: ShardReader, protocol: Protocol) -> np.ndarray:
    """Ids of the one-step windows that the protocol scores, ascending: all of them, or so many evenly spaced ones."""
    total = len(reader.index(2))
    count = total if protocol.one_step_windows is None else min(protocol.one_step_windows, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def one_step_length(reader: ShardReader) -> int:
    """Step axis of the one-step errors: the windows of the longest trajectory."""
    return max(reader.num_frames(index) for index in range(reader.num_trajectories)) - 1


def rollout_steps(reader: ShardReader, trajectory: int, protocol: Protocol) -> int:
    """Steps of a rollout of this trajectory under the protocol; 0 where it ends before the first prediction.

    It ends before the first frame that the shards leave out of all windows (`shard --skip nonfinite`, or stationary).
    """
    stop = protocol.start
    for first, last in reader.manifest.trajectories[trajectory].segments:
        stop = max(stop, last) if first <= stop else stop
    steps = max(0, stop - protocol.start - protocol.context)
    return steps if protocol.max_steps is None else min(steps, protocol.max_steps)


def rollout_batches(
    reader: ShardReader, trajectories: Sequence[int], protocol: Protocol, batch_size: int
) -> list[list[int]]:
    """The trajectories that have a rollout, longest first, so that rollouts of about one length share a batch."""
    steps = {trajectory: rollout_steps(reader, trajectory, protocol) for trajectory in trajectories}
    order = sorted((trajectory for trajectory in trajectories if steps[trajectory]), key=lambda one: -steps[one])
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def one_step_errors(
    model: Surrogate,
    reader: ShardReader,
    windows: np.ndarray,
    device: torch.device,
    batch_size: int = 8,
) -> Errors:
    """Errors of the one-step windows with these ids, of all trajectories: (R, longest trajectory - 1, C).

    Windows left out stay NaN.
    """
    measured = measure_windows(model, reader, windows, device, batch_size)
    everything = range(reader.num_trajectories)
    return as_errors([measured], everything, one_step_length(reader), len(reader.manifest.state_channels))


def rollout_errors(
    model: Surrogate,
    reader: ShardReader,
    trajectories: Sequence[int],
    protocol: Protocol,
    device: torch.device,
    batch_size: int = 8,
    watch: Watcher = lambda trajectories, step, prediction, truth: None,
) -> Errors:
    """Errors of one rollout of each of these trajectories: (number of them, longest rollout, C), in their order."""
    batches = rollout_batches(reader, trajectories, protocol, batch_size)
    measured = [measure_rollouts(model, reader, ids, protocol, device, watch=watch) for ids in batches]
    longest = max((rollout_steps(reader, trajectory, protocol) for trajectory in trajectories), default=0)
    return as_errors(measured, trajectories, longest, len(reader.manifest.state_channels))


@precision(exact=True)
def measure_windows(
    model: Surrogate,
    reader: ShardReader,
    windows: np.ndarray,
    device: torch.device,
    batch_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Measured:
    """One prediction of each one-step window with these ids. `advance` is told how many were made, batch by batch.

    UserError where the data are not finite.
    """
    parts = []
    batches = np.array_split(windows, -(-len(windows) // batch_size))
    for number, ids in enumerate(batches):
        if number + 1 < len(batches):
            reader.announce(batches[number + 1], 2)  # from a URL it comes while the model works
        batch = reader.batch(ids, 2).to(device)
        source, target = batch.fields[:, 0], batch.fields[:, 1]
        (prediction,) = model.iterate(source, batch.constants, reader.manifest.dataset, 1)
        part = Measured(*reader.index(2).locate(ids), frame_errors(prediction, source, target))
        _check_truth(reader, part, held=part.steps, truth=part.steps + 1)
        parts.append(part)
        advance(len(ids))
    return Measured.joined(parts)


@precision(exact=True)
def measure_rollouts(
    model: Surrogate,
    reader: ShardReader,
    trajectories: Sequence[int],
    protocol: Protocol,
    device: torch.device,
    advance: Callable[[int], object] = lambda count: None,
    watch: Watcher = lambda trajectories, step, prediction, truth: None,
) -> Measured:
    """The rollouts of one of `rollout_batches`. `advance` is told how many predictions were made, step by step.

    A rollout that stops being finite goes on: its errors say so. UserError where the data are not finite.
    """
    steps = [rollout_steps(reader, trajectory, protocol) for trajectory in trajectories]
    first = protocol.start + protocol.context - 1
    initial = _stack([reader.trajectory_frames(index, first, 1)[0] for index in trajectories], device)  # (B, C, H, W)
    constants = _stack([reader.constants(index) for index in trajectories], device)
    parts = []
    predictions = model.iterate(initial, constants, reader.manifest.dataset, steps[0])
    for step, prediction in enumerate(predictions, start=1):
        going = sum(length >= step for length in steps)  # the first ones: they are the longest
        ids = trajectories[:going]
        truth = _stack([reader.trajectory_frames(index, first + step, 1)[0] for index in ids], device)
        values = frame_errors(prediction[:going], initial[:going], truth)
        part = Measured(np.array(ids, np.int64), np.full(going, step - 1), values)
        _check_truth(reader, part, held=np.full(going, first), truth=part.steps + first + 1)
        parts.append(part)
        watch(ids, step, prediction[:going], truth)
        advance(going)
    return Measured.joined(parts)


def _check_truth(reader: ShardReader, part: Measured, held: np.ndarray, truth: np.ndarray) -> None:
    """UserError where a frame of the data (N,), the one held or the true one, is not finite."""
    columns = [one.name for one in fields(Errors)]
    for name, frames in (("variance", truth), ("persistence", held)):
        bad = np.flatnonzero(~np.isfinite(part.values[:, columns.index(name)]).all(axis=1))
        if bad.size:
            raise UserError(
                f"{reader.folder}: {reader.dataset}: expected finite data to score on, got a value that is not in "
                f"trajectory {part.trajectories[bad[0]]}, frame {frames[bad[0]]}: `data-pipeline audit SHARDS` lists "
                "all such frames; make the shards of this split without the files that hold them"
            )


def _stack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


def frame_errors(prediction: Tensor, held: Tensor, truth: Tensor) -> np.ndarray:
    """Errors (B, 4, C) of a batch (B, C, H, W), beside those of a frame that is held."""
    squared, variance = squared_error_and_variance(prediction, truth)  # (B, C)
    persistence, _ = squared_error_and_variance(held, truth)
    cells = truth.shape[-2] * truth.shape[-1]
    columns = {
        "variance": variance,
        "model": squared,
        "persistence": persistence,
        "mean_field": variance * (cells - 1) / cells,  # the biased variance: mean squared distance from the own mean
    }
    return torch.stack([columns[one.name] for one in fields(Errors)], dim=1).cpu().numpy()


SHOWN_STEPS = 24


class Recorder:
    """Keeps one channel of one trajectory's rollout at a few steps: a watcher for `measure_rollouts`."""

    def __init__(self, trajectory: int, channel: int, steps: tuple[int, ...]) -> None:
        self.trajectory, self.channel, self.steps = trajectory, channel, steps
        self.fields: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, trajectories: Sequence[int], step: int, prediction: Tensor, truth: Tensor) -> None:
        if step in self.steps and self.trajectory in trajectories:
            row = trajectories.index(self.trajectory)
            self.fields.append((truth[row, self.channel].cpu().numpy(), prediction[row, self.channel].cpu().numpy()))

    def stacked(self) -> np.ndarray | None:
        """Truth and prediction, (2, n, H, W); None where nothing was kept."""
        return np.stack(self.fields, axis=1) if self.fields else None


def longest_recorder(reader: ShardReader, protocol: Protocol) -> Recorder:
    """Keeps what is shown of a dataset, whatever batch its longest rollout is in."""
    steps = [rollout_steps(reader, trajectory, protocol) for trajectory in range(reader.num_trajectories)]
    longest = int(np.argmax(steps))
    shown = tuple(index + 1 for index in evenly_spaced(steps[longest], SHOWN_STEPS))
    return Recorder(longest, shown_channel(reader.manifest), shown)


def shown_channel(manifest: Manifest) -> int:
    """The channel that pictures show."""
    std, rms = manifest.stats["std"], manifest.stats["rms"]
    names = manifest.state_channels
    return varying_channel([std[name] for name in names], [rms[name] for name in names])


def varying_channel(std: Sequence[float], rms: Sequence[float]) -> int:
    """The first channel with std above a tenth of its rms, else the first.

    The Well lists scalar fields first, but active_matter's first, a concentration, is all but constant.
    """
    varying = [index for index, (one, size) in enumerate(zip(std, rms, strict=True)) if one > 0.1 * size]
    return varying[0] if varying else 0


def as_sample(
    reader: ShardReader, kept: Recorder, fields: np.ndarray, vrmse: np.ndarray, domain: Domain | None = None
) -> Sample:
    """What a recorder was to keep: `fields` (2, n, H, W) of truth and prediction, `vrmse` (S, C) of its trajectory."""
    return Sample(
        dataset=reader.dataset,
        channel=reader.manifest.state_channels[kept.channel],
        trajectory=kept.trajectory,
        dt=reader.manifest.trajectories[kept.trajectory].dt,
        steps=kept.steps,
        truth=fields[0],
        prediction=fields[1],
        vrmse=vrmse[np.array(kept.steps) - 1, kept.channel],
        domain=domain,
    )
