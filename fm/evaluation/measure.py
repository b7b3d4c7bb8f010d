"""Run the model over one dataset and measure its errors, window by window and rollout by rollout.

The predictors beside the model (fm/evaluation/errors.py) are measured on the same frames. Everything is in physical
units and float32, in whatever precision the model was trained, and without a GPU's TF32. Windows, and the rollouts of
different trajectories, run in batches, since all grids of a dataset are equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.registry import Domain, Registry
from data_pipeline.windows.reader import ShardReader
from fm.distributed import precision
from fm.evaluation.errors import ERROR_NAMES, DatasetErrors, Errors, StencilChoice
from fm.evaluation.protocol import Protocol
from fm.evaluation.samples import Sample, evenly_spaced
from fm.evaluation.stencil import Stencil
from fm.model.loss import squared_error_and_variance
from fm.model.surrogate import Surrogate

SHOWN_STEPS = 24  # of the longest rollout, for the pictures of a report

# Called with the number of predictions that were made since the last call, for a progress bar.
Advance: TypeAlias = Callable[[int], object]


@dataclass(frozen=True)
class ShownRollout:
    """What pictures show of a dataset: one channel of one trajectory's rollout, at a few 1-based steps."""

    trajectory: int
    channel: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class FrameErrors:
    """Errors of N predicted frames, and their places in the `Errors` of a dataset and task."""

    trajectories: np.ndarray  # ids (N,) int64
    steps: np.ndarray  # index on the step axis (N,) int64
    values: np.ndarray  # (N, 5, C) float64: the fields of `Errors`, in their order
    shown: np.ndarray | None = None  # (2, n, H, W): truth and prediction of the `ShownRollout`, if it is among them

    @classmethod
    def joined(cls, parts: Sequence["FrameErrors"], shown: np.ndarray | None = None) -> "FrameErrors":
        """Return the errors of all parts, one after the other."""
        trajectories = np.concatenate([part.trajectories for part in parts])
        steps = np.concatenate([part.steps for part in parts])
        return cls(trajectories, steps, np.concatenate([part.values for part in parts]), shown)


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
    """Return the ascending ids of the one-step windows that the protocol scores: all, or some evenly spaced ones.

    The windows have one frame more than the protocol's context.
    """
    total = len(reader.index((protocol.context or 1) + 1))
    count = total if protocol.one_step_windows is None else min(protocol.one_step_windows, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def rollout_steps(reader: ShardReader, trajectory: int, protocol: Protocol) -> int:
    """Return the steps of a rollout, which ends before the first frame that the shards leave out of all windows."""
    given = protocol.last_given
    stop = given + 1 - (protocol.context or 1)  # the first given frame
    for first, last in reader.manifest.trajectories[trajectory].segments:
        stop = max(stop, last) if first <= stop else stop
    steps = max(0, stop - given - 1)
    return steps if protocol.max_steps is None else min(steps, protocol.max_steps)


def rollout_batches(
    reader: ShardReader, trajectories: Sequence[int], protocol: Protocol, batch_size: int
) -> list[list[int]]:
    """Return batches of the trajectories that have a rollout, longest first, so a batch has rollouts of one length."""
    steps = {trajectory: rollout_steps(reader, trajectory, protocol) for trajectory in trajectories}
    order = sorted((one for one in trajectories if steps[one]), key=lambda trajectory: -steps[trajectory])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def dataset_errors(
    reader: ShardReader,
    trajectories: Sequence[int],
    protocol: Protocol,
    one_step: Sequence[FrameErrors],
    rollouts: Sequence[FrameErrors],
    stencil: StencilChoice | None = None,
) -> DatasetErrors:
    """Join the errors of a dataset's one-step windows and the errors of the rollouts of `trajectories`."""
    manifest, everything = reader.manifest, range(reader.num_trajectories)
    num_channels = len(manifest.state_channels)
    longest = max(reader.num_frames(trajectory) for trajectory in everything) - 1
    horizon = max((rollout_steps(reader, trajectory, protocol) for trajectory in trajectories), default=0)
    return DatasetErrors(
        channels=manifest.state_channels,
        trajectories=np.array(trajectories, np.int64),
        one_step=collect_errors(one_step, everything, longest, num_channels),
        rollout=collect_errors(rollouts, trajectories, horizon, num_channels),
        data_digest=manifest.digest,
        grid=manifest.grid,
        stencil=stencil,
    )


@precision(exact=True)
def measure_windows(
    model: Surrogate,
    reader: ShardReader,
    windows: np.ndarray,
    device: torch.device,
    batch_size: int,
    advance: Advance = lambda count: None,
    stencil: Stencil | None = None,
) -> FrameErrors:
    """Return the errors of one prediction of each one-step window with these ids; UserError if data are not finite.

    `windows` are ids of windows of one frame more than the model's context.
    """
    parts, length = [], model.context + 1
    batches = np.array_split(windows, -(-len(windows) // batch_size))
    for number, ids in enumerate(batches):
        if number + 1 < len(batches):
            reader.prefetch(batches[number + 1], length)  # from a URL it is downloaded while the model works
        batch = reader.batch(ids, length).to(device)
        frames, target = batch.fields[:, :-1], batch.fields[:, -1]
        (prediction,) = model.iterate(frames, batch.constants, reader.manifest.dataset, 1, batch.scalars)
        trajectories, first = reader.index(length).locate(ids)
        given = first + model.context - 1  # the last input frame
        linear = next(stencil.predict(reader, trajectories.tolist(), given.tolist())) if stencil else None
        part = FrameErrors(trajectories, given, measure_frames(prediction, frames[:, -1], target, linear))
        _check_truth(reader, part, held=given, truth=given + 1)
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
    shown: ShownRollout | None = None,
    stencil: Stencil | None = None,
) -> FrameErrors:
    """Return the errors of the rollouts of one of `rollout_batches`; UserError if data are not finite.

    A rollout that stops being finite goes on, and its errors are not finite either.
    """
    steps = [rollout_steps(reader, trajectory, protocol) for trajectory in trajectories]
    given, context = protocol.last_given, model.context
    first = given + 1 - context
    initial = _stack([reader.trajectory_frames(index, first, context) for index in trajectories], device)
    constants = _stack([reader.constants(index) for index in trajectories], device)
    parts, fields = [], []
    scalars = reader.scalars(trajectories)
    predictions = model.iterate(initial, constants, reader.manifest.dataset, steps[0], scalars)
    linear = stencil.predict(reader, trajectories, [given] * len(trajectories)) if stencil else None
    for step, prediction in enumerate(predictions, start=1):
        going = sum(length >= step for length in steps)  # the longest rollouts are the first ones
        ids = trajectories[:going]
        truth = _stack([reader.trajectory_frames(index, given + step, 1)[0] for index in ids], device)
        stencils = next(linear)[:going] if linear else None
        values = measure_frames(prediction[:going], initial[:going, -1], truth, stencils)
        part = FrameErrors(np.array(ids, np.int64), np.full(going, step - 1), values)
        _check_truth(reader, part, held=np.full(going, given), truth=part.steps + given + 1)
        parts.append(part)
        if shown is not None and step in shown.steps and shown.trajectory in ids:
            row = ids.index(shown.trajectory)
            fields.append([field[row, shown.channel].cpu().numpy() for field in (truth, prediction)])
        advance(going)
    return FrameErrors.joined(parts, np.stack(fields, axis=1) if fields else None)


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


def measure_frames(prediction: Tensor, held: Tensor, truth: Tensor, linear: Tensor | None = None) -> np.ndarray:
    """Return the ERROR_NAMES (B, 5, C) of a batch (B, C, H, W).

    `held` is the frame that persistence predicts, `linear` the prediction of the linear stencil, None without one.
    """
    squared, variance = squared_error_and_variance(prediction, truth)  # (B, C)
    persistence, _ = squared_error_and_variance(held, truth)
    cells = truth.shape[-2] * truth.shape[-1]
    mean_field = variance * (cells - 1) / cells  # the biased variance: mean squared distance from the own mean
    stencil = torch.full_like(variance, torch.nan)
    if linear is not None:
        stencil, _ = squared_error_and_variance(linear, truth)
        stencil = torch.where(torch.isfinite(stencil), stencil, torch.inf)
    return torch.stack([variance, squared, persistence, mean_field, stencil], dim=1).cpu().numpy()


def choose_shown(
    reader: ShardReader, protocol: Protocol, num_steps: int = SHOWN_STEPS, trajectory: int | None = None
) -> ShownRollout:
    """Return `num_steps` evenly spaced steps of a trajectory, by default of the one with the longest rollout."""
    if trajectory is None:
        trajectory = int(np.argmax([rollout_steps(reader, one, protocol) for one in range(reader.num_trajectories)]))
    steps = evenly_spaced(rollout_steps(reader, trajectory, protocol), num_steps)
    names, stats = reader.manifest.state_channels, reader.manifest.stats
    channel = varying_channel([stats["std"][name] for name in names], [stats["rms"][name] for name in names])
    return ShownRollout(trajectory, channel, tuple(index + 1 for index in steps))


def varying_channel(std: Sequence[float], rms: Sequence[float]) -> int:
    """Return the first channel whose std is above a tenth of its rms, else the first channel.

    The Well lists scalar fields first, but active_matter's first field, a concentration, is nearly constant.
    """
    varying = [index for index, (spread, size) in enumerate(zip(std, rms, strict=True)) if spread > 0.1 * size]
    return varying[0] if varying else 0


def make_sample(
    reader: ShardReader,
    shown: ShownRollout,
    rollouts: Sequence[FrameErrors],
    errors: DatasetErrors,
    eps: float,
    domain: Domain | None = None,
    registry: Registry | None = None,
) -> Sample | None:
    """Return what `rollouts` hold of the shown one, with its VRMSE; None if none of them holds it.

    `domain` and the unit of the channel default to those of the `registry`, as far as it has them.
    """
    fields = next((part.shown for part in rollouts if part.shown is not None), None)
    if fields is None:
        return None
    channel, trajectory = errors.channels[shown.channel], reader.manifest.trajectories[shown.trajectory]
    card = registry.cards.get(reader.dataset) if registry else None
    described = registry.channel_cards.get(channel) if registry else None
    return Sample(
        dataset=reader.dataset,
        channel=channel,
        trajectory=shown.trajectory,
        dt=trajectory.dt,
        steps=shown.steps,
        truth=fields[0],
        prediction=fields[1],
        vrmse=errors.rollout_vrmse(shown.trajectory, channel, shown.steps, eps),
        domain=domain or (card.domain if card else None),
        unit=described.unit if described else "",
        scalars=trajectory.scalars,
    )
