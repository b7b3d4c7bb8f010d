"""Score a file of predictions against the file with the truth; frames are matched by their physical time.

Errors, reports and tables have the formats of an evaluation (fm/evaluation), so `fm score` and `fm compare` read them.
There are no one-step scores: they need a prediction from every frame, and a rollout starts from one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.files import sha256_file
from data_pipeline.registry import Registry, load_registry
from data_pipeline.well.hdf5 import SPLITS, WellFile, read_attributes, stored_card
from data_pipeline.well.layout import texts
from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors
from fm.evaluation.measure import SHOWN_STEPS, FrameErrors, collect_errors, measure_frames, varying_channel
from fm.evaluation.protocol import Protocol, load_protocol
from fm.evaluation.report import write_report
from fm.evaluation.samples import Sample, evenly_spaced
from fm.evaluation.scores import score
from fm.evaluation.tables import score_table

DEFAULT_PROTOCOL = "thirds"  # covers rollouts of any length
SAME_TIME = 0.1  # of the time between frames
SAME_STATE = 1e-3  # relative rms difference of initial states


@dataclass(frozen=True)
class Pair:
    """A rollout and the true trajectory that it predicts."""

    row: int  # of the rollout in the prediction's file
    trajectory: int  # number of the true trajectory
    frames: np.ndarray  # (1 + steps,) int64: for each predicted frame the true one's number, the initial frame first

    @property
    def steps(self) -> int:
        """Length of the rollout."""
        return len(self.frames) - 1


def evaluate_prediction(
    prediction: Path, truth: Path | None, protocol: str | None = None, out: Path | None = None
) -> Path:
    """Score a Well file of rollouts against the one with the truth; print the table, write a report, return its folder.

    `protocol` is a name or a file; `out` is by default `<prediction>_report` beside the prediction. Raises UserError if
    the files are missing, damaged or do not fit together, or if the rollouts start from another frame than the
    protocol's.
    """
    if prediction.suffix not in (".hdf5", ".h5"):
        raise UserError(f"{prediction}: expected the rollouts in a Well file: `fm rollout --out PRED.hdf5` writes one")
    if truth is None:
        raise UserError(f"{prediction}: expected --truth FILE, the file that holds what was predicted")
    attributes = read_attributes(prediction)
    context = int(np.atleast_1d(attributes.get("prediction_context", 1))[0])
    chosen = load_protocol(protocol or DEFAULT_PROTOCOL).for_context(context)
    registry = load_registry()
    card = stored_card(prediction, registry, None, attributes)
    with WellFile(prediction, card) as predicted, WellFile(truth, card) as true:
        if predicted.grid != true.grid:
            raise UserError(f"{prediction} has a grid of {predicted.grid}, {truth} of {true.grid}: expected the same")
        pairs = _match(predicted, true, attributes)
        chosen = _adapt_protocol(chosen, predicted, true, pairs)
        pairs = [replace(pair, frames=pair.frames[: 1 + (chosen.max_steps or pair.steps)]) for pair in pairs]
        trajectories = [pair.trajectory for pair in pairs]
        origin = {"prediction": str(prediction), "truth": str(truth)}
        for name in ("model", "weights"):
            if (value := attributes.get(f"prediction_{name}")) is not None:
                origin[name] = texts(value)[0]
        num_channels, longest = len(card.state_channels), max(pairs, key=lambda pair: pair.steps)
        frames = [_measure(predicted, true, pair) for pair in pairs]
        errors = DatasetErrors(
            channels=card.state_channels,
            trajectories=np.array(trajectories, np.int64),
            one_step=Errors.empty(len(pairs), 0, num_channels),
            rollout=collect_errors(frames, trajectories, longest.steps, num_channels),
            data_digest=sha256_file(truth, repr(trajectories).encode()),  # of what was to be predicted
            grid=true.grid,
        )
        measured = ErrorFile(chosen, {card.name: errors}, origin)
        sample = _sample(predicted, true, longest, measured, registry)
    scores = score(measured)
    out = out or prediction.with_name(f"{prediction.stem}_report")
    write_report(out, measured, scores, [sample])
    print(f"{prediction} beside {truth}:\n\n{score_table(scores)}\nreport: {out}")
    return out


def _match(predicted: WellFile, true: WellFile, attributes: Mapping[str, Any]) -> list[Pair]:
    """Find the true trajectory and frames of each rollout."""
    ids = np.atleast_1d(attributes.get("prediction_trajectories", np.arange(predicted.num_trajectories))).tolist()
    if len(ids) != predicted.num_trajectories or not all(0 <= one < true.num_trajectories for one in ids):
        raise UserError(
            f"{predicted.path}: its {predicted.num_trajectories} rollouts are of the trajectories "
            f"{' '.join(map(str, ids))}, expected numbers below {true.num_trajectories}, those of {true.path}"
        )
    start = attributes.get("prediction_start")
    first = None if start is None else int(np.atleast_1d(start)[0])
    return [Pair(row, one, _match_times(predicted, row, true, one, first)) for row, one in enumerate(ids)]


def _match_times(predicted: WellFile, row: int, true: WellFile, trajectory: int, start: int | None) -> np.ndarray:
    """Return the true frames at the times of a rollout, (1 + steps,), up to the end of the truth.

    Where the rollout has the times of the frames from `start` on, they are those frames: times may not increase.
    """
    times, known = predicted.times(row), true.times(trajectory)
    own = known[start:] if start is not None else known[:0]
    count = min(len(own), len(times))
    if count > 1 and np.allclose(times[:count], own[:count], rtol=1e-6, atol=0):
        return np.arange(len(known) - len(own), len(known) - len(own) + count)
    apart = np.abs(np.diff(known))
    slack = SAME_TIME * (predicted.dt(row) or float(apart[apart > 0].min(initial=np.inf)))
    times = times[times <= known[-1] + slack]
    frames = np.abs(known[None] - times[:, None]).argmin(axis=1)
    fits = (np.abs(known[frames] - times) <= slack).all() and (np.diff(frames) > 0).all()
    if len(times) < 2 or not fits:
        raise UserError(
            f"{predicted.path}: expected frames at times of {true.path}, trajectory {trajectory}, which go from "
            f"{known[0]:g} to {known[-1]:g}, {apart.min(initial=np.inf):g} apart or more; got an initial state and "
            f"predictions from {predicted.times(row)[0]:g} to {predicted.times(row)[-1]:g}"
        )
    return frames


def _adapt_protocol(protocol: Protocol, predicted: WellFile, true: WellFile, pairs: Sequence[Pair]) -> Protocol:
    """Return the protocol with the files' split, and without steps and windows beyond the rollouts' end.

    Raises UserError if the rollouts start from another frame or cover none of its windows.
    """
    for pair in pairs:
        if pair.frames[0] != protocol.last_given:
            raise UserError(
                f"{predicted.path}: its rollouts start from frame {pair.frames[0]} of {true.path}; protocol "
                f"{protocol.name} starts from frame {protocol.last_given}: roll out with `fm rollout "
                f"--start {protocol.last_given}`, or score under a protocol with start: {pair.frames[0]}"
            )
    folder = true.path.parent.name if isinstance(true.path, Path) else ""
    split = folder if folder in SPLITS else protocol.split
    possible = true.num_frames - 1 - protocol.last_given
    wanted = possible if protocol.max_steps is None else min(possible, protocol.max_steps)
    steps = min(pair.steps for pair in pairs)
    if steps >= wanted:
        return replace(protocol, split=split)
    # The rollouts are shorter than the truth. The limit is stored with the errors, so that they are not compared with
    # those of longer rollouts: a third of five steps is not a third of fifty.
    windows = {name: window for name, window in protocol.windows.items() if window.parts or window.last <= steps}
    if not windows:
        raise UserError(
            f"{predicted.path}: its rollouts of {steps} steps cover no window of protocol {protocol.name} "
            f"({', '.join(protocol.windows)}): choose another --protocol, or roll "
            f"out with `fm rollout --steps {wanted}`"
        )
    return replace(protocol, split=split, windows=windows, max_steps=steps)


def _measure(predicted: WellFile, true: WellFile, pair: Pair) -> FrameErrors:
    """Measure one rollout, one frame in memory at a time.

    Raises UserError if the truth is not finite, or differs from the rollout's initial state.
    """
    held = true.read(pair.trajectory, int(pair.frames[0]), int(pair.frames[0]) + 1)
    initial = predicted.read(pair.row, 0, 1)
    true.check_finite(held, pair.trajectory, int(pair.frames[0]))
    difference, size = (np.sqrt(np.square(one.astype(np.float64)).mean((2, 3))) for one in (initial - held, held))
    if not (difference <= SAME_STATE * size).all():
        raise UserError(
            f"{predicted.path}: expected rollout {pair.row} to start from frame {pair.frames[0]} of trajectory "
            f"{pair.trajectory} of {true.path}; its initial state is another"
        )
    values = []
    for step, frame in enumerate(pair.frames[1:].tolist(), start=1):
        truth = true.read(pair.trajectory, frame, frame + 1)
        true.check_finite(truth, pair.trajectory, frame)
        prediction = predicted.read(pair.row, step, step + 1)
        values.append(measure_frames(*map(torch.from_numpy, (prediction, held, truth))))
    return FrameErrors(np.full(pair.steps, pair.trajectory), np.arange(pair.steps), np.concatenate(values))


def _sample(predicted: WellFile, true: WellFile, pair: Pair, measured: ErrorFile, registry: Registry) -> Sample:
    """Return what the pictures show: one channel of one rollout at some of its steps."""
    steps = tuple(index + 1 for index in evenly_spaced(pair.steps, SHOWN_STEPS))
    frames = [int(pair.frames[step]) for step in steps]
    first = true.read(pair.trajectory, frames[0], frames[0] + 1)[0]
    std, rms = first.std((1, 2)), np.sqrt(np.square(first).mean((1, 2)))
    channel = varying_channel(std.tolist(), rms.tolist())
    name = true.card.state_channels[channel]
    errors, described = measured.datasets[true.card.name], registry.channel_cards.get(name)
    return Sample(
        dataset=true.card.name,
        channel=name,
        trajectory=pair.trajectory,
        dt=predicted.dt(pair.row),
        steps=steps,
        truth=np.stack([true.read(pair.trajectory, frame, frame + 1)[0, channel] for frame in frames]),
        prediction=np.stack([predicted.read(pair.row, step, step + 1)[0, channel] for step in steps]),
        vrmse=errors.rollout_vrmse(pair.trajectory, name, steps, measured.protocol.eps),
        domain=true.card.domain,
        unit=described.unit if described else "",
        scalars=true.scalars(pair.trajectory),
    )
