"""The stored errors of one evaluation: one for each trajectory, step and channel. Every score is made from them.

    VRMSE = sqrt(mean over x, y of (prediction - truth)^2 / (variance of the truth over x, y + eps))

with the unbiased variance, as The Well defines it. The model is compared with `persistence`, which repeats the input of
a one-step window or the initial frame of a rollout; with `mean_field`, the target frame's own spatial mean, whose VRMSE
is about 1; and with `linear_stencil`, a linear map of a small neighborhood (fm/evaluation/stencil.py). In shapes, R
stands for trajectories, S for steps, and C for state channels.
"""

import json
import math
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError, brief
from data_pipeline.files import atomic_file, inside
from fm.evaluation.protocol import Protocol

FORMAT = 3  # 3: the linear stencil; 2: the grid of each dataset
READABLE = (2, 3)  # errors of format 2 have no linear stencil
ERRORS_FILE = "errors.npz"
BASELINES = ("persistence", "mean_field", "linear_stencil")
PREDICTORS = ("model", *BASELINES)
ERROR_NAMES = ("variance", *PREDICTORS)  # the fields of Errors, in their order
TASKS = ("one_step", "rollout")
PICTURES = ("overview", "growth", "spectra")  # of all datasets; a picture of one dataset has its name
# Raised by numpy, zipfile, and the functions that unpack their arrays, when a file is damaged.
DAMAGED: tuple[type[Exception], ...] = (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError)
DAMAGED += (ValueError, zipfile.BadZipFile, zlib.error)
SPARE_BYTES = 2**28  # that the arrays of an .npz may have beyond twice its size: fields are compressed
MAX_EMPTY_SIDE = 2**20  # of an array without numbers
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class StencilChoice:
    """Frames and ridge strength of a dataset's linear stencils (fm/evaluation/stencil.py)."""

    one_step_frames: int
    one_step_ridge: float
    rollout_frames: int
    rollout_ridge: float

    def describe(self) -> str:
        """Return frames, ridge of the one-step stencil / frames, ridge of the rollout stencil."""
        one_step = f"{self.one_step_frames}, {self.one_step_ridge:g}"
        return f"{one_step} / {self.rollout_frames}, {self.rollout_ridge:g}"


@dataclass(frozen=True)
class Errors:
    """Errors of one task (one-step or rollout) on one dataset, float64, squared physical units, each (R, S, C).

    Step index t is the window that predicts frame t + 1 from frame t, or prediction number t + 1 of a rollout. All are
    NaN at a step that was not measured: beyond the end of a trajectory, or a window that is not in the subset.
    """

    variance: np.ndarray  # of the target over x, y, unbiased; always finite where measured
    model: np.ndarray  # mean squared error over x, y, as are the next three
    persistence: np.ndarray
    mean_field: np.ndarray
    linear_stencil: np.ndarray  # NaN where there was no stencil; +inf where a prediction was not finite

    @classmethod
    def empty(cls, num_trajectories: int, num_steps: int, num_channels: int) -> "Errors":
        """Return arrays (R, S, C) of NaN, to be filled in."""
        return cls(*(np.full((num_trajectories, num_steps, num_channels), np.nan) for _ in ERROR_NAMES))

    @property
    def present(self) -> np.ndarray:
        """(R, S) bool: the steps that were measured."""
        return ~np.isnan(self.variance).any(axis=-1)

    @property
    def steps(self) -> np.ndarray:
        """(R,) int64: how many steps of each trajectory were measured."""
        return self.present.sum(axis=1)

    def until(self, num_steps: int | None) -> "Errors":
        """Return the first `num_steps` steps, or all for None."""
        return Errors(*(getattr(self, name)[:, :num_steps] for name in ERROR_NAMES))

    def vrmse(self, predictor: str, eps: float) -> np.ndarray:
        """Return VRMSE (R, S, C): +inf if a prediction was not finite, NaN if there is no such step or no stencil."""
        error = np.sqrt(getattr(self, predictor) / (self.variance + eps))
        if predictor == "linear_stencil":
            return error
        return np.where(self.present[..., None] & ~np.isfinite(error), np.inf, error)

    def first_failures(self) -> np.ndarray:
        """Return the first 1-based step at which the model was not finite, (R,) int64; 0 if it always was."""
        failed = self.present & ~np.isfinite(self.model).all(axis=-1)
        return np.where(failed.any(axis=1), failed.argmax(axis=1) + 1, 0) if failed.size else np.zeros_like(self.steps)


@dataclass(frozen=True)
class DatasetErrors:
    """All errors of one dataset."""

    channels: tuple[str, ...]
    trajectories: np.ndarray  # ids (R,)
    one_step: Errors
    rollout: Errors
    data_digest: str  # of the manifest of the shards
    grid: tuple[int, int]  # (H, W)
    stencil: StencilChoice | None = None  # None: there is no linear stencil

    def rollout_vrmse(self, trajectory: int, channel: str, steps: Sequence[int], eps: float) -> np.ndarray:
        """Return the model's VRMSE (n,) of one channel at n 1-based steps of one rollout."""
        row = self.trajectories.tolist().index(trajectory)
        return self.rollout.vrmse("model", eps)[row, np.array(steps) - 1, self.channels.index(channel)]


@dataclass(frozen=True)
class ErrorFile:
    """The errors of one evaluation, its protocol and, as plain JSON, whose errors they are."""

    protocol: Protocol
    datasets: dict[str, DatasetErrors]
    origin: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write an .npz without pickled objects, whole or not at all; UserError when the disk is full."""
        facts = {"protocol": self.protocol.to_json(), "datasets": sorted(self.datasets), "origin": self.origin}
        head = {"format": FORMAT, **facts}
        arrays: dict[str, Any] = {"head": np.array(json.dumps(head))}  # windows keep their order
        for name, errors in sorted(self.datasets.items()):
            arrays[f"{name}/channels"] = np.array(errors.channels, np.str_)
            arrays[f"{name}/data_digest"] = np.array(errors.data_digest)
            arrays[f"{name}/grid"] = np.array(errors.grid, np.int64)
            arrays[f"{name}/trajectories"] = np.asarray(errors.trajectories, np.int64)
            if errors.stencil is not None:
                arrays[f"{name}/stencil"] = np.array(astuple(errors.stencil), np.float64)
            for task in TASKS:
                for part in ERROR_NAMES:
                    arrays[f"{name}/{task}/{part}"] = getattr(getattr(errors, task), part)
        with atomic_file(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "ErrorFile":
        """Read a file of `save`; UserError if it is missing, damaged, or of another format."""
        with stored_arrays(path, ERRORS_FILE, READABLE) as (head, arrays):
            if head["format"] == 2:
                for place in [f"{name}/{task}" for name in head["datasets"] for task in TASKS]:
                    arrays[f"{place}/linear_stencil"] = np.full_like(arrays[f"{place}/variance"], np.nan)
            datasets = {name: _unpack(arrays, name) for name in head["datasets"]}
            if not isinstance(head["origin"], dict):
                raise ValueError(f"origin: expected a mapping, got {head['origin']!r}")
            return cls(Protocol.from_json(head["protocol"]), datasets, head["origin"])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz by name; one of DAMAGED if it is another file, or declares more than it holds.

    The sizes in the headers are compared before memory is allocated: NumPy allocates what a header says.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    arrays: dict[str, np.ndarray] = {}
    room = 2 * path.stat().st_size + SPARE_BYTES
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            room -= entry.file_size
            name = entry.filename.removesuffix(".npy")
            if name in arrays or room < 0:
                raise ValueError(f"{brief(entry.filename)}: it is there twice, or larger than its file")
            with file.open(entry) as member:
                if np.lib.format.read_magic(member) != (1, 0):
                    raise ValueError(f"{brief(entry.filename)}: expected an array in NPY format 1.0")
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                size = entry.file_size - member.tell()
                if math.prod(shape) * dtype.itemsize != size or max(shape, default=0) > size + MAX_EMPTY_SIDE:
                    raise ValueError(f"{brief(entry.filename)}: {shape} of {dtype} is not what the file holds")
            with file.open(entry) as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


@contextmanager
def stored_arrays(
    path: Path, name: str, versions: Collection[int]
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Give the head and the arrays of an .npz of these formats; UserError if it is damaged, as the block may find."""
    try:
        arrays = read_arrays(path)
        head = json.loads(str(arrays["head"]))
        if head["format"] not in versions:
            raise ValueError(f"format {head['format']}, not {' or '.join(map(str, versions))}")
        yield head, arrays
    except FileNotFoundError:
        raise UserError(
            f"{path}: expected the {name} of an evaluation, found none: `fm evaluate RUN` writes it"
        ) from None
    except PermissionError:
        raise  # the file may be whole
    except DAMAGED as error:
        raise UserError(f"{path}: expected the {name} of an evaluation, got {error!r}; evaluate again") from None


def find_errors(place: Path) -> Path:
    """Return the error file of a run, of a report's folder, or the file itself; UserError if there is none."""
    if place.is_file():
        return place
    candidates = [inside(place, name) for name in (ERRORS_FILE, f"report/{ERRORS_FILE}")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{place}: expected a run that was evaluated, a report's folder or an {ERRORS_FILE}; looked for "
        f"{' and '.join(map(str, candidates))}: `fm evaluate RUN` writes it"
    )


def check_names(dataset: str, channels: Sequence[str]) -> None:
    """ValueError if a dataset or a channel has a name that a file cannot have."""
    for name in (dataset, *channels):
        if not _NAME.fullmatch(name):
            raise ValueError(f"expected a name of letters, digits, _, - and . (not first), got {name!r}")
    if dataset in PICTURES:
        raise ValueError(f"expected another name for a dataset than {', '.join(PICTURES)}, got {dataset!r}")


def _unpack(arrays: Mapping[str, np.ndarray], name: str) -> DatasetErrors:
    tasks = {task: Errors(*(arrays[f"{name}/{task}/{part}"] for part in ERROR_NAMES)) for task in TASKS}
    channels = tuple(str(channel) for channel in arrays[f"{name}/channels"])
    check_names(name, channels)
    ids, grid = arrays[f"{name}/trajectories"], arrays[f"{name}/grid"]
    for task, errors in tasks.items():
        _check_errors(errors, len(channels), f"{name}/{task}")
        if ids.shape != errors.variance.shape[:1]:
            raise ValueError(f"{name}/{task}: {ids.shape} trajectory ids for {len(errors.variance)} trajectories")
    if ids.dtype != np.int64 or (ids < 0).any() or len(set(ids.tolist())) < len(ids):
        raise ValueError(f"{name}: expected trajectory ids from 0 on, each once")
    if len(set(channels)) < len(channels) or not channels:
        raise ValueError(f"{name}: expected channels, each once")
    if grid.shape != (2,) or grid.dtype != np.int64 or (grid < 1).any():
        raise ValueError(f"{name}: expected a grid of two sizes")
    choice = _stencil_choice(arrays[f"{name}/stencil"], name) if f"{name}/stencil" in arrays else None
    height, width = grid.tolist()
    digest = str(arrays[f"{name}/data_digest"])
    return DatasetErrors(channels, ids, **tasks, data_digest=digest, grid=(height, width), stencil=choice)


def _check_errors(errors: Errors, num_channels: int, where: str) -> None:
    """Raise ValueError unless these can be the errors of a measurement."""
    parts = [getattr(errors, part) for part in ERROR_NAMES]
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or errors.variance.ndim != 3 or errors.variance.shape[2] != num_channels:
        raise ValueError(f"{where}: arrays of {sorted(shapes)} for {num_channels} channels")
    if any(part.dtype != np.float64 or (part < 0).any() for part in parts) or np.isinf(errors.variance).any():
        raise ValueError(f"{where}: expected float64 errors of at least 0, and finite variances")
    missing = np.isnan(errors.variance)
    measured = [getattr(errors, part) for part in ("model", "persistence", "mean_field")]
    if (missing.any(-1) != missing.all(-1)).any() or any((missing & ~np.isnan(part)).any() for part in parts):
        raise ValueError(f"{where}: expected no errors where nothing was measured")
    if any(np.isnan(part[~missing]).any() for part in measured[1:]):
        raise ValueError(f"{where}: expected the errors of each step that was measured")


def _stencil_choice(stored: np.ndarray, name: str) -> StencilChoice:
    frames, ridge, rollout_frames, rollout_ridge = stored.tolist()
    whole = all(float(count).is_integer() and count >= 1 for count in (frames, rollout_frames))
    if not whole or not all(np.isfinite(one) and one >= 0 for one in (ridge, rollout_ridge)):
        raise ValueError(f"{name}: expected frames and ridges of linear stencils, got {stored.tolist()}")
    return StencilChoice(int(frames), ridge, int(rollout_frames), rollout_ridge)
