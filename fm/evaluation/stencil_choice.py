"""The best linear stencil of each dataset: frames and ridge chosen on the valid split, kept in a cache of the user's.

The candidates (fm/evaluation/stencil.py) see 1 to 3 frames, and their ridges reach from least squares to the mean
field. One is chosen for one-step predictions and one for rollouts: least squares has the lowest one-step errors, but
its rollouts grow. The fitted weights are kept in CACHE/stencils/<dataset>-<key>.npz, where the key is a digest of
the manifests of both splits, the protocol and all settings below. The files hold no pickled objects.

Array legend: B trajectories or windows, S steps, C state channels, K constant fields, n frames, H W grid.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file, sha256
from data_pipeline.progress import progress_bar, write_above
from data_pipeline.windows.reader import ShardReader
from fm.distributed import precision
from fm.evaluation.errors import DAMAGED, StencilChoice, read_arrays
from fm.evaluation.protocol import Protocol
from fm.evaluation.samples import evenly_spaced
from fm.evaluation.scores import aggregate
from fm.evaluation.stencil import (
    MAX_FRAMES,
    RADIUS,
    RIDGES,
    SIDE,
    TRAIN_BYTES,
    TRAIN_POINTS,
    TRAIN_WINDOWS,
    Stencil,
    StencilScales,
    fit,
    frames_until,
    periodic_axes,
)

VERSION = 1  # raised whenever the same data would give other stencils
FOLDER = "stencils"
# Bounds of time and memory, whatever the size of a dataset.
VALID_WINDOWS, VALID_WINDOW_POINTS = (8, 32), 2**17  # least and most windows; grid points of all windows together
VALID_ROLLOUTS, VALID_ROLLOUT_POINTS, VALID_STEPS = 4, 2**16, 60
ERROR_LIMITS = (1e-8, 10.0)  # of a VRMSE in the choice for rollouts


@dataclass(frozen=True)
class DatasetStencils:
    """The best linear stencils of one dataset, and how they were chosen."""

    one_step: Stencil
    rollout: Stencil
    choice: StencilChoice
    key: str  # of the data, the protocol and the settings that they were made from

    def to(self, device: torch.device) -> "DatasetStencils":
        """Return the same stencils on another device."""
        return DatasetStencils(self.one_step.to(device), self.rollout.to(device), self.choice, self.key)


@dataclass(frozen=True)
class StencilTrial:
    """True frames that predictions start from, and the S frames that they are compared with."""

    frames: Tensor  # (B, n, C, H, W)
    constants: Tensor  # (B, K, H, W)
    truth: Tensor  # (B, S, C, H, W)
    variance: Tensor  # (B, S, C) of the truth over x, y, float64

    @classmethod
    def read(
        cls, reader: ShardReader, starts: Sequence[tuple[int, int]], steps: int, device: torch.device
    ) -> "StencilTrial":
        """Read the trial that starts after frame `given` of each (trajectory, given)."""
        count = min(frames_until(reader, one, given, MAX_FRAMES) for one, given in starts)
        arrays = [reader.trajectory_frames(one, given - count + 1, count + steps) for one, given in starts]
        frames = torch.from_numpy(np.stack(arrays)).to(device)
        constants = torch.from_numpy(np.stack([reader.constants(one) for one, _ in starts])).to(device)
        if not torch.isfinite(frames).all():
            raise UserError(f"{reader.folder}: expected finite data to choose a stencil on; see `data-pipeline audit`")
        truth = frames[:, count:]
        return cls(frames[:, :count], constants, truth, truth.double().flatten(-2).var(-1))

    def vrmse(self, stencil: Stencil, eps: float) -> np.ndarray:
        """Return VRMSE (B, S, C), +inf where it is not finite and after all rollouts have passed ERROR_LIMITS."""
        errors = np.full(self.variance.shape, np.inf)
        states = stencil.iterate(self.frames, self.constants)
        for step, (truth, state) in enumerate(zip(self.truth.unbind(1), states, strict=False)):
            squared = (state - truth).square().mean((-2, -1)).double()
            found = (squared / (self.variance[:, step] + eps)).sqrt().cpu().numpy()
            errors[:, step] = np.where(np.isfinite(found), found, np.inf)
            if (errors[:, step].mean(axis=-1) > ERROR_LIMITS[1]).all():
                break
        return errors


def one_step_trials(valid: ShardReader, device: torch.device) -> list[StencilTrial]:
    """Return some evenly spaced windows of the valid split, those with as many frames of the past together."""
    least, most = VALID_WINDOWS
    height, width = valid.manifest.grid
    total = len(valid.index(2))
    windows = evenly_spaced(total, max(least, min(most, VALID_WINDOW_POINTS // (height * width))))
    places = list(zip(*(one.tolist() for one in valid.index(2).locate(np.array(windows))), strict=True))
    trials = []
    for count in range(1, MAX_FRAMES + 1):
        starts = [place for place in places if frames_until(valid, place[0], place[1], MAX_FRAMES) == count]
        size = max(1, VALID_ROLLOUT_POINTS // (height * width))
        trials += [StencilTrial.read(valid, starts[at : at + size], 1, device) for at in range(0, len(starts), size)]
    return trials


def rollout_trials(valid: ShardReader, given: int, max_steps: int | None, device: torch.device) -> list[StencilTrial]:
    """Return some rollouts of the valid split from frame `given` to the end of its segment; none if all are shorter."""
    height, width = valid.manifest.grid
    most = max(1, min(VALID_ROLLOUTS, VALID_ROLLOUT_POINTS // (height * width)))
    lengths: dict[tuple[int, int], list[tuple[int, int]]] = {}  # rollouts of one length, from as many frames, together
    for trajectory in evenly_spaced(valid.num_trajectories, most):
        segments = valid.manifest.trajectories[trajectory].segments
        stop = next((stop for first, stop in segments if first <= given < stop), given + 1)
        steps = min(stop - given - 1, max_steps or VALID_STEPS, VALID_STEPS)
        count = frames_until(valid, trajectory, given, MAX_FRAMES)
        lengths.setdefault((steps, count), []).append((trajectory, given))
    return [StencilTrial.read(valid, starts, steps, device) for (steps, _), starts in lengths.items() if steps > 0]


def one_step_score(stencil: Stencil, trials: Sequence[StencilTrial], protocol: Protocol) -> float:
    """Return VRMSE over all windows by the protocol's statistics; inf if it is not finite."""
    errors = np.concatenate([trial.vrmse(stencil, protocol.eps) for trial in trials])
    score = aggregate(errors, protocol, protocol.trajectories)
    return float("inf") if score is None else score


def rollout_score(stencil: Stencil, trials: Sequence[StencilTrial], protocol: Protocol) -> float:
    """Return the geometric mean over steps and rollouts of the VRMSE, which is limited to ERROR_LIMITS.

    The limit, since a rollout that grows ends at 1e30 and is as useless at 10. The geometric mean, since errors span
    decades along a rollout, and an arithmetic mean would be decided by the last steps alone.
    """
    means = [trial.vrmse(stencil, protocol.eps).mean(axis=-1) for trial in trials]  # (B, S) each
    return float(np.exp(np.concatenate([np.log(np.clip(one, *ERROR_LIMITS)).mean(axis=1) for one in means]).mean()))


@precision(exact=True)
@torch.no_grad()
def choose(
    candidates: Sequence[Sequence[Stencil]], valid: ShardReader, protocol: Protocol, given: int, device: torch.device
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return frames - 1 and the index of the ridge of the best candidates: one for one-step, one for rollouts.

    `given` is the last frame that a rollout of the protocol starts from. Without a rollout in the valid split, the
    one-step choice counts for rollouts too.
    """
    one_step, rollouts = one_step_trials(valid, device), rollout_trials(valid, given, protocol.max_steps, device)
    scores: list[dict[tuple[int, int], float]] = [{}, {}]
    for frames, some in enumerate(candidates):
        for index, candidate in enumerate(some):
            stencil = candidate.to(device)
            scores[0][frames, index] = one_step_score(stencil, one_step, protocol)
            scores[1][frames, index] = rollout_score(stencil, rollouts, protocol) if rollouts else 0.0
    best = [min(found, key=lambda key: found[key]) for found in scores]
    return best[0], best[1] if rollouts else best[0]


def fit_and_choose(
    train: ShardReader, valid: ShardReader, protocol: Protocol, given: int, device: torch.device
) -> DatasetStencils:
    """Fit on the train split and choose on the valid split; UserError if they do not fit together."""
    ours, theirs = ((m.state_channels, m.constant_channels, m.boundary) for m in (train.manifest, valid.manifest))
    if ours != theirs:
        raise UserError(f"{valid.folder}: expected the channels and boundaries of {train.folder}, {ours}; got {theirs}")
    candidates = fit(train)
    (frames, ridge), (rollout_frames, rollout_ridge) = choose(candidates, valid, protocol, given, device)
    choice = StencilChoice(frames + 1, RIDGES[ridge], rollout_frames + 1, RIDGES[rollout_ridge])
    one_step, rollout = candidates[frames][ridge], candidates[rollout_frames][rollout_ridge]
    return DatasetStencils(one_step, rollout, choice, cache_key(train, valid, protocol, given))


def cache_key(train: ShardReader, valid: ShardReader, protocol: Protocol, given: int) -> str:
    """Return the digest of all that the stencils of a dataset depend on."""
    fitted_by = (VERSION, RADIUS, MAX_FRAMES, RIDGES, TRAIN_POINTS, TRAIN_WINDOWS, TRAIN_BYTES)
    bounds = (VALID_WINDOWS, VALID_WINDOW_POINTS, VALID_ROLLOUTS, VALID_ROLLOUT_POINTS, VALID_STEPS, ERROR_LIMITS)
    chosen_by = (given, protocol.max_steps, protocol.eps, protocol.channels, protocol.trajectories)
    data = (train.manifest.digest, valid.manifest.digest)
    return sha256(json.dumps([fitted_by, bounds, chosen_by, data]).encode())


def save(stencils: DatasetStencils, file: Path) -> None:
    """Write the stencils whole or not at all. OSError or UserError if the folder cannot be written."""
    arrays: dict[str, Any] = {"head": np.array(json.dumps({"key": stencils.key, "choice": asdict(stencils.choice)}))}
    for task in ("one_step", "rollout"):
        stencil: Stencil = getattr(stencils, task)
        for frames, (weights, bias) in enumerate(zip(stencil.weights, stencil.biases, strict=True), start=1):
            arrays |= {f"{task}/{frames}/weights": weights.numpy(), f"{task}/{frames}/bias": bias.numpy()}
    with atomic_file(file, durable=False) as opened:  # a torn file is fitted again
        np.savez(opened, **arrays)


def load(file: Path, key: str, train: ShardReader) -> DatasetStencils | None:
    """Return the stencils of a file of `save`; None if it is missing, damaged or has another key."""
    manifest = train.manifest
    channels, constants = len(manifest.state_channels), len(manifest.constant_channels)

    def stencil(arrays: Mapping[str, np.ndarray], task: str, num_frames: int) -> Stencil:
        weights, biases = [], []
        for frames in range(1, num_frames + 1):
            weight, bias = arrays[f"{task}/{frames}/weights"], arrays[f"{task}/{frames}/bias"]
            if weight.shape != (channels, constants + channels * frames, SIDE, SIDE) or bias.shape != (channels,):
                raise ValueError(f"weights of shape {weight.shape}, biases of shape {bias.shape}")
            weights.append(torch.from_numpy(weight.astype(np.float32)))
            biases.append(torch.from_numpy(bias.astype(np.float32)))
        return Stencil(tuple(weights), tuple(biases), StencilScales.of(manifest), periodic_axes(manifest))

    try:
        arrays = read_arrays(file)
        head = json.loads(str(arrays["head"]))
        found, choice = head["key"], StencilChoice(**head["choice"])
        tasks = {
            "one_step": stencil(arrays, "one_step", choice.one_step_frames),
            "rollout": stencil(arrays, "rollout", choice.rollout_frames),
        }
    except DAMAGED:
        return None
    return DatasetStencils(**tasks, choice=choice, key=key) if found == key else None


def fitted_stencils(
    train: ShardReader, valid: ShardReader, protocol: Protocol, given: int, device: torch.device, cache: Path
) -> DatasetStencils:
    """Return the stencils from the cache folder, or fit, choose and store them."""
    key = cache_key(train, valid, protocol, given)
    file = cache / FOLDER / f"{train.dataset}-{key[:16]}.npz"
    stored = load(file, key, train)
    if stored is not None:
        return stored
    stencils = fit_and_choose(train, valid, protocol, given, device)
    try:
        save(stencils, file)
    except (OSError, UserError) as error:
        write_above(f"{file}: the linear stencils cannot be kept ({error}); the next evaluation will fit them again")
    return stencils


def linear_stencils(
    splits: Mapping[str, tuple[ShardReader, ShardReader]],
    protocol: Protocol,
    given: int,
    device: torch.device,
    cache: Path,
    progress: bool = False,
) -> dict[str, DatasetStencils]:
    """Return the stencils of each dataset, from readers of its train and valid split.

    `given` is the last frame that a rollout starts from. A dataset whose data cannot be used is left out, with a note.
    """
    found = {}
    for name, (train, valid) in progress_bar(
        splits.items(), desc="fit linear stencils", unit="dataset", disable=not progress, leave=False
    ):
        try:
            found[name] = fitted_stencils(train, valid, protocol, given, device, cache)
        except UserError as error:
            write_above(f"{name}: no linear stencil: {error}")
    return found
