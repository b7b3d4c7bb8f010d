"""Roll a model out from the frames of a file into another file, frame by frame.

In Python, without files, on fields by name (fm/model/fields.py lists the forms of the fields):

    model = fm.WaveLiTFM.from_pretrained("hf://organization/name")
    state = xarray.open_dataset("states.nc").isel(time=0)
    model.predict(state, "shear_flow", steps=20).to_netcdf("predicted.nc")

Array legend: n trajectories, T input frames, C state channels, K constant channels, X Y grid.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UserError, disk_full_error, is_disk_full
from data_pipeline.files import atomic_path
from data_pipeline.progress import progress_bar
from data_pipeline.registry import Card, load_registry
from data_pipeline.well.write import WellWriter
from fm.distributed import StopSignal, precision
from fm.evaluation.trained import TrainedModel
from fm.model.fields import FieldsWarning, GivenFields, given_fields
from fm.model.scalars import TIME_STEP
from fm.model.surrogate import MIN_GRID, Surrogate
from fm.share.rollout_files import (
    ENGINES,
    WELL_SUFFIXES,
    InitialStates,
    NetcdfWriter,
    ZarrWriter,
    import_xarray,
    open_writer,
    read_initial,
)

BATCH = 8  # trajectories that the model predicts at once


@dataclass(frozen=True)
class RolloutRequest:
    """What to predict, and where to."""

    source: Path
    out: Path
    steps: int
    dataset: str | None = None  # None: the one that the file names
    trajectories: tuple[int, ...] | None = None  # None: all
    start: int | None = None  # last frame of the source that the model is given; None: the first that is possible
    force: bool = False  # replace a file at `out`
    scalars: Mapping[str, float] = field(default_factory=dict)  # PDE parameters, in place of those in the file


def predict_file(model: str, request: RolloutRequest, registry: str | None = None, progress: bool = True) -> Path:
    """Roll `model` out from the states of a file; write initial states and predictions to `request.out`, and return it.

    `model` is a run, a checkpoint or an exported model. `registry`, folders of cards, replaces the model's own. Doubts
    are printed to stderr as `warning: ...`. A rollout that stops being finite is written as predicted, with a warning.
    Raises UserError, and writes nothing, if model, file and request do not fit together.
    """
    _check_request(request)
    out, trained = request.out, TrainedModel.open(model)
    cards = trained.registry() if registry is None else load_registry(registry)
    context = trained.model.context
    initial = read_initial(request.source, cards, request.dataset, request.trajectories, request.start, context)
    given = _checked_fields(trained.model, initial, request)
    initial = _with_scalars(initial, request.scalars)
    times = initial.predicted_times(request.steps, trained.model.specs[initial.setting.card.name].dt or 1.0)
    if out.suffix in ENGINES and not (times == times[0]).all():
        raise UserError(f"--out {out}: the trajectories have times of their own; write {WELL_SUFFIXES[0]}")
    frames = _frames(trained.model, initial.setting.card, given, request.steps)
    try:
        with (
            StopSignal().listen() as stop,
            atomic_path(out) as path,
            open_writer(out.suffix, path, initial, times, cards) as file,
        ):
            failures = _write(file, initial, frames, stop, request.steps, progress)
            file.describe(_attributes(model, trained, request, initial, failures))
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(out, error) from error
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    for trajectory, (step, channel) in failures.items():
        print(
            f"warning: trajectory {trajectory} is not finite from step {step} on, first in {channel}: what follows in "
            f"{out} is no prediction",
            file=sys.stderr,
        )
    return out


def parse_scalars(texts: Sequence[str]) -> dict[str, float]:
    """Return the numbers that NAME=VALUE texts give. UserError for another text, or a name that comes twice."""
    scalars: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = np.nan
        if not (name and np.isfinite(number)) or name in scalars:
            raise UserError(
                f"--scalar {text}: expected NAME=VALUE with a finite number, such as F=0.03, each name once"
            )
        scalars[name] = number
    return scalars


def _check_request(request: RolloutRequest) -> None:
    source, out = request.source, request.out
    if out.suffix not in (*WELL_SUFFIXES, *ENGINES):
        raise UserError(f"--out {out}: expected a name that ends in {', '.join((*WELL_SUFFIXES, *ENGINES))}")
    if request.steps < 1:
        raise UserError(f"--steps: expected at least 1 step to predict, got {request.steps}")
    one, other = source.resolve(), out.resolve()
    same_file = one.exists() and other.exists() and one.samefile(other)
    if one.is_relative_to(other) or other.is_relative_to(one) or same_file:
        raise UserError(f"--out {out}: expected another file than the input, and none around or inside it")
    if out.exists() and not request.force:
        raise UserError(f"--out {out}: is there already; --force replaces it")
    if out.is_dir() and out.suffix != ".zarr":
        raise UserError(f"--out {out}: expected a file to write, got a folder")
    if out.is_file() and out.suffix == ".zarr":
        raise UserError(f"--out {out}: expected a folder to write, got a file")
    if {source.suffix, out.suffix} & ENGINES.keys():
        import_xarray()


def _checked_fields(model: Surrogate, initial: InitialStates, request: RolloutRequest) -> GivenFields:
    """Return frames (n, T, C, X, Y), constants (n, K, X, Y) and scalars for the model; print doubts to stderr.

    Raises UserError for a dataset that the model was not trained on, fields of another form, scalars that it does not
    take, and values that are not finite.
    """
    source, card, grid = request.source, initial.setting.card, initial.setting.grid
    if card.name not in model.specs:
        raise UserError(
            f"{source}: expected a dataset that the model knows ({', '.join(model.specs)}), got {card.name}: --dataset "
            "names another"
        )
    if any(size % 2 or size < MIN_GRID for size in grid):
        raise UserError(
            f"{source}: expected an even number of at least {MIN_GRID} points along x and y, got {grid[0]} x {grid[1]}"
        )
    frames, constants = torch.from_numpy(initial.frames), torch.from_numpy(initial.setting.constants)
    states = (frames[:, 0] if model.context == 1 else frames).unbind(-3)
    fields = dict(zip(card.state_channels, states, strict=True))
    fields |= zip(card.constant_channels, constants.unbind(1), strict=True)
    for doubt in initial.doubts():
        print(f"warning: {source}: {doubt}", file=sys.stderr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FieldsWarning)
        spec, stored = model.specs[card.name], initial.setting.scalars
        scalars = {**{name: stored[name] for name in stored if name in spec.scalars}, **request.scalars}
        try:
            given = given_fields(fields, spec, initial.dt, model.context, initial.spacing, scalars)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    for one in caught:
        print(f"warning: {source}: {one.message}", file=sys.stderr)
    return given


def _with_scalars(initial: InitialStates, scalars: Mapping[str, float]) -> InitialStates:
    """Return the states with these scalars of all trajectories, which the prediction's file then holds.

    The time step is none of the file's scalars: its times are.
    """
    numbers = {name: np.full(len(initial.trajectories), value) for name, value in scalars.items() if name != TIME_STEP}
    setting = replace(initial.setting, scalars={**initial.setting.scalars, **numbers})
    return replace(initial, setting=setting)


def _frames(model: Surrogate, card: Card, given: GivenFields, steps: int) -> Iterator[np.ndarray]:
    """Yield the predicted states (n, C, X, Y) step by step, channels in the card's order; on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    order = [model.specs[card.name].state_channels.index(channel) for channel in card.state_channels]
    batches = zip(given.frames.to(device).split(BATCH), given.constants.to(device).split(BATCH), strict=True)
    rollouts = []
    for number, (frames, fixed) in enumerate(batches):
        rows = slice(number * BATCH, number * BATCH + len(frames))
        scalars = {name: values[rows] if values.ndim else values for name, values in given.scalars.items()}
        rollouts.append(model.iterate(frames, fixed, card.name, steps, scalars))
    for parts in zip(*rollouts, strict=True):
        yield torch.cat([part[:, order].cpu() for part in parts]).numpy()


@precision(exact=True)
def _write(
    file: WellWriter | NetcdfWriter | ZarrWriter,
    initial: InitialStates,
    frames: Iterator[np.ndarray],
    stop: StopSignal,
    steps: int,
    progress: bool,
) -> dict[int, tuple[int, str]]:
    """Write the last given and the predicted states; return, by trajectory, the first step and channel not finite.

    After all rollouts have stopped being finite, the rest is NaN. Raises KeyboardInterrupt between two frames after a
    signal: raised at once, it could be lost in a destructor of h5py's.
    """
    channels = initial.setting.card.state_channels
    failures: dict[int, tuple[int, str]] = {}
    file.write(0, initial.frames[:, -1])
    for step in progress_bar(range(1, steps + 1), desc="rollout", unit="step", disable=not progress, leave=False):
        over = len(failures) == len(initial.trajectories)
        frame = np.full_like(initial.frames[:, -1], np.nan) if over else next(frames)
        if stop.received:
            raise KeyboardInterrupt
        file.write(step, frame)
        finite = np.isfinite(frame).all(axis=(2, 3))  # (n, C)
        for row in np.flatnonzero(~finite.all(axis=1)):
            failures.setdefault(initial.trajectories[row], (step, channels[int(finite[row].argmin())]))
    return failures


def _attributes(
    model: str,
    trained: TrainedModel,
    request: RolloutRequest,
    initial: InitialStates,
    failures: Mapping[int, tuple[int, str]],
) -> dict[str, Any]:
    """Return the attributes that distinguish a prediction from a simulation."""
    first = [failures[one][0] if one in failures else 0 for one in initial.trajectories]
    return {
        "dataset_name": initial.setting.card.name,
        "prediction_model": model,
        "prediction_weights": trained.weights,
        "prediction_source": str(request.source),
        "prediction_trajectories": list(initial.trajectories),
        "prediction_start": trained.model.context - 1 if request.start is None else request.start,
        "prediction_context": trained.model.context,
        "prediction_steps": request.steps,
        "prediction_first_nonfinite_step": first,  # of each trajectory; 0: none
        **{name: float(values[0]) for name, values in initial.setting.scalars.items() if (values == values[0]).all()},
    }
