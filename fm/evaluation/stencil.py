"""The linear stencil: ridge regression of the next frame on a small neighborhood, a baseline that is fitted in seconds.

    u[t+1](x) = u[t](x) + b + sum over frames j < n and offsets d in 5 x 5 of w[j, d] u[t-j](x + d) + constant fields

The w are matrices over the channels, the constant fields enter with weights of their own in the same 5 x 5 points, and
all fields are normalized by the statistics of the train split. Neighbors wrap around on periodic axes and repeat the
last grid point elsewhere. The weights minimize, in float64 over a bounded sample of grid points of the train split,

    mean |u[t+1] - prediction|^2 + ridge * s * |W|^2,    s the mean variance of the inputs,    W = w + 1 at j = 0, d = 0

W maps the frames to the next frame. A ridge equals white noise on the inputs of the regression (Bishop 1995, "Training
with noise is equivalent to Tikhonov regularization"), and a strong one predicts the mean field. Least squares has the
lowest one-step errors, but its rollouts grow without bound. A penalty on W damps the noise of a rollout; a penalty on
the change w would keep it, and gives higher errors in the last third of mini-Well rollouts.

A stencil of n frames needs n frames of the past. Where fewer are given, the stencil of fewer frames with the same
ridge predicts.

Array legend: B trajectories or windows, C state channels, K constant fields, n frames, H W grid, F inputs, P points.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import UserError
from data_pipeline.hashing import splitmix64, stream_key
from data_pipeline.shards.format import Manifest
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.samples import evenly_spaced
from fm.model.block import pad_fields

RADIUS = 2
SIDE = 2 * RADIUS + 1
MAX_FRAMES = 3
RIDGES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Bounds of time and memory, whatever the size of a dataset.
TRAIN_POINTS = 2**16  # grid points that are fitted
TRAIN_WINDOWS, TRAIN_BYTES = 256, 2**30  # windows that the points are taken from; bytes of the windows' frames
ROWS = 4096  # points that are added to the normal equations at a time


@dataclass(frozen=True)
class StencilScales:
    """Mean and scale of the state (C, 1, 1) and of the constant fields (K, 1, 1), float32."""

    mean: Tensor
    scale: Tensor
    constant_mean: Tensor
    constant_scale: Tensor

    @classmethod
    def of(cls, manifest: Manifest) -> "StencilScales":
        """Return the moments of a manifest; the scale of a channel without variation is its size, or 1."""
        tensors = []
        for names in (manifest.state_channels, manifest.constant_channels):
            mean, std, rms = (
                np.array([manifest.stats[key][name] for name in names]).reshape(-1, 1, 1)
                for key in ("mean", "std", "rms")
            )
            scale = np.where(std > 1e-6 * rms, std, np.where(rms > 0, rms, 1.0))
            tensors += [torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(scale.astype(np.float32))]
        return cls(*tensors)

    def inputs(self, frames: Tensor, constants: Tensor) -> Tensor:
        """Return normalized constant fields, then the frames, newest first: (B, K + n C, H, W).

        frames (B, n, C, H, W), the newest last, and constants (B, K, H, W) are in physical units.
        """
        state = (frames.flip(1) - self.mean) / self.scale
        return torch.cat([(constants - self.constant_mean) / self.constant_scale, state.flatten(1, 2)], dim=1)


@dataclass(frozen=True)
class Stencil:
    """A linear stencil of n frames for one dataset, float32."""

    weights: tuple[Tensor, ...]  # [a - 1] is used with a frames, a <= n: (C, K + a C, SIDE, SIDE)
    biases: tuple[Tensor, ...]  # (C,) each
    moments: StencilScales
    periodic: tuple[bool, bool]  # x, y

    @property
    def num_frames(self) -> int:
        """The frames n that it sees."""
        return len(self.weights)

    def to(self, device: torch.device) -> "Stencil":
        """Return the same stencil on another device."""
        weights, biases = (tuple(one.to(device) for one in some) for some in (self.weights, self.biases))
        moments = StencilScales(*(one.to(device) for one in vars(self.moments).values()))
        return Stencil(weights, biases, moments, self.periodic)

    def iterate(self, frames: Tensor, constants: Tensor) -> Iterator[Tensor]:
        """Yield the next states (B, C, H, W) in physical units, without end.

        frames (B, T, C, H, W), the newest last, and constants (B, K, H, W) are in physical units.
        """
        while True:
            frames = frames[:, -self.num_frames :]
            used = frames.shape[1] - 1
            padded = pad_fields(self.moments.inputs(frames, constants), RADIUS, self.periodic)
            change = functional.conv2d(padded, self.weights[used], self.biases[used])
            state = frames[:, -1] + change * self.moments.scale
            yield state
            frames = torch.cat([frames, state[:, None]], dim=1)

    def predict(self, reader: ShardReader, trajectories: Sequence[int], given: Sequence[int]) -> Iterator[Tensor]:
        """Yield the predictions (B, C, H, W) of the frames after frame `given[i]` of each trajectory, without end.

        The true frames up to `given[i]` are read, as many as the stencil sees and the segment has.
        """
        counts = [frames_until(reader, *place, self.num_frames) for place in zip(trajectories, given, strict=True)]
        device, groups = self.moments.mean.device, []
        for count in sorted(set(counts)):
            rows = [row for row, other in enumerate(counts) if other == count]
            frames = [reader.trajectory_frames(trajectories[row], given[row] - count + 1, count) for row in rows]
            constants = [reader.constants(trajectories[row]) for row in rows]
            stacked = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in (frames, constants))
            groups.append((rows, self.iterate(*stacked)))
        while True:
            predictions = [(rows, next(states)) for rows, states in groups]
            state = predictions[0][1].new_empty((len(counts), *reader.manifest.frame_shape))
            for rows, part in predictions:
                state[rows] = part
            yield state


def periodic_axes(manifest: Manifest) -> tuple[bool, bool]:
    """Return whether x and y are periodic."""
    return manifest.boundary[0][0] == "PERIODIC", manifest.boundary[1][0] == "PERIODIC"


def frames_until(reader: ShardReader, trajectory: int, frame: int, most: int) -> int:
    """Return how many frames end with `frame` in its segment, at most `most`; 1 if it is in no segment."""
    segments = reader.manifest.trajectories[trajectory].segments
    first = next((first for first, stop in segments if first <= frame < stop), frame)
    return min(most, frame - first + 1)


def fit(train: ShardReader) -> list[list[Stencil]]:
    """Return the stencils of 1, 2, ... frames, one for each of RIDGES; UserError if the data are not finite.

    With W = (G + r)^-1 (B + G e), where G are the covariances of the inputs, B those with the change, e selects the
    newest frame's center and r = ridge * s, the weights of the change are w = W - e = (G + r)^-1 (B - r e).
    """
    manifest, moments, sums = train.manifest, StencilScales.of(train.manifest), _normal_equations(train)
    channels, constants = len(manifest.state_channels), len(manifest.constant_channels)
    solved: list[list[tuple[Tensor, Tensor]]] = []  # by frames and ridge
    for frames in range(1, min(MAX_FRAMES, len(sums)) + 1):
        size = 1 + SIDE**2 * (constants + channels * frames)
        products = torch.stack([one[:size, :size] for one in sums[frames - 1 :]]).sum(0)
        targets = torch.stack([one[:size, one.shape[0] :] for one in sums[frames - 1 :]]).sum(0)
        number = products[0, 0]
        means, target_mean = products[0, 1:] / number, targets[0] / number
        covariance = products[1:, 1:] / number - torch.outer(means, means)
        center = torch.zeros((size - 1, channels), dtype=torch.float64)
        places = SIDE**2 * (constants + torch.arange(channels)) + SIDE**2 // 2
        center[places, torch.arange(channels)] = 1.0
        values, vectors = torch.linalg.eigh(covariance)
        with_change = vectors.T @ (targets[1:] / number - torch.outer(means, target_mean))
        variance, with_center = covariance.diagonal().mean(), vectors.T @ center
        solved.append([])
        for ridge in RIDGES:
            strength = ridge * variance
            weights = vectors @ ((with_change - strength * with_center) / (values.clamp_min(0) + strength)[:, None])
            bias = target_mean - means @ weights
            kernel = weights.T.reshape(channels, -1, SIDE, SIDE)
            solved[-1].append((kernel.float(), bias.float()))
    stencils = []
    for frames in range(1, len(solved) + 1):
        by_ridge = [tuple(zip(*(one[index] for one in solved[:frames]), strict=True)) for index in range(len(RIDGES))]
        stencils.append([Stencil(weights, biases, moments, periodic_axes(manifest)) for weights, biases in by_ridge])
    return stencils


def _normal_equations(reader: ShardReader) -> list[Tensor]:
    """Return sums of products over sampled grid points, float64 (1 + F, 1 + F + C): inputs by inputs and changes.

    Input 0 is the constant 1. Item a - 1 is the sum over the points with exactly a frames of the past (the last item:
    or more). Points with more frames count for the stencils of fewer frames too, whose inputs are the first ones.
    """
    manifest, moments = reader.manifest, StencilScales.of(reader.manifest)
    channels, constants = len(manifest.state_channels), len(manifest.constant_channels)
    sizes = [1 + SIDE**2 * (constants + channels * (a + 1)) for a in range(MAX_FRAMES)]
    sums = [torch.zeros((size, size + channels), dtype=torch.float64) for size in sizes]
    windows = train_windows(reader)
    num_points = min(-(-TRAIN_POINTS // len(windows)), manifest.grid[0] * manifest.grid[1])
    rows: list[list[Tensor]] = [[] for _ in sums]

    def add(index: int) -> None:
        block = torch.cat(rows[index]).double()
        sums[index] += block[:, : sizes[index]].T @ block
        rows[index].clear()

    for window, trajectory, first in zip(windows.tolist(), *reader.index(2).locate(windows), strict=True):
        count = frames_until(reader, trajectory, first, MAX_FRAMES)
        frames = torch.from_numpy(reader.trajectory_frames(trajectory, first - count + 1, count + 1))
        inputs = moments.inputs(frames[None, :-1], torch.from_numpy(reader.constants(trajectory))[None])[0]
        points = sampled_points(reader, window, num_points)
        change = ((frames[-1] - frames[-2]) / moments.scale).flatten(1)[:, points]
        neighbors = neighborhoods(inputs, points, manifest)
        rows[count - 1].append(torch.cat([torch.ones(len(points), 1), neighbors, change.T], dim=1))
        if sum(map(len, rows[count - 1])) >= ROWS:
            add(count - 1)
    for index in range(len(sums)):
        if rows[index]:
            add(index)
    found = [one for one in sums if one[0, 0] > 0]
    if not all(torch.isfinite(one).all() for one in found):
        raise UserError(f"{reader.folder}: expected finite data to fit on; `data-pipeline audit SHARDS` lists the rest")
    return sums[: max(index + 1 for index, one in enumerate(sums) if one[0, 0] > 0)]


def train_windows(reader: ShardReader) -> np.ndarray:
    """Return ascending ids of evenly spaced windows of two frames, as many as TRAIN_WINDOWS and TRAIN_BYTES allow."""
    total = len(reader.index(2))
    fitting = TRAIN_BYTES // ((MAX_FRAMES + 1) * reader.manifest.frame_bytes)
    return np.array(evenly_spaced(total, max(1, min(TRAIN_WINDOWS, fitting))), np.int64)


def sampled_points(reader: ShardReader, window: int, count: int) -> Tensor:
    """Return `count` grid points of a window, flat indices (P,) int64, by hashes of dataset and window; some twice."""
    hashes = splitmix64(stream_key("stencil", reader.dataset, window), np.arange(count, dtype=np.uint64))
    height, width = reader.manifest.grid
    return torch.from_numpy((hashes % np.uint64(height * width)).astype(np.int64))


def neighborhoods(fields: Tensor, points: Tensor, manifest: Manifest) -> Tensor:
    """Return the neighborhoods (P, C * SIDE^2) of points (P,) of fields (C, H, W), in the order of a conv2d kernel."""
    places = []
    for axis, index in enumerate((points // manifest.grid[1], points % manifest.grid[1])):
        around, size = index[:, None] + torch.arange(-RADIUS, RADIUS + 1), manifest.grid[axis]
        places.append(around % size if periodic_axes(manifest)[axis] else around.clamp(0, size - 1))
    return fields[:, places[0][:, :, None], places[1][:, None, :]].transpose(0, 1).flatten(1)
