"""Measure why the rollouts of one model on one dataset diverge: errors, stability, scales, conservation, one step.

`diagnose_run` opens a run and writes the results; `diagnose` measures. Array legend as in quantities.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.files import inside
from data_pipeline.miniwell.twins import twin_distance
from data_pipeline.progress import progress_bar
from data_pipeline.registry import Card
from data_pipeline.windows.reader import ShardReader
from fm.datasets import check_channels, grid_spacing
from fm.evaluation.samples import evenly_spaced
from fm.evaluation.trained import TrainedModel
from fm.lab.diagnosis.growth import Growth, Stability, largest_singular_value, tangent_growth
from fm.lab.diagnosis.quantities import (
    Bands,
    Diagnosis,
    Drift,
    Floors,
    PointwiseMap,
    Spectra,
    measure_bands,
    measure_drifts,
    measure_spectra,
)
from fm.lab.diagnosis.report import write_diagnosis
from fm.lab.diagnosis.subject import Subject, choose_trajectories, sibling_well, twins_of
from fm.model.loss import vrmse

NUM_JACOBIANS = 9  # states along a path at which the largest singular value is computed
NUM_SPECTRA = 3
FIT_WINDOWS = 256  # of the train split, evenly spaced, for the fit of the pointwise map
SCORE_WINDOWS = 128  # of the test split, evenly spaced, for the comparison of one-step predictors
BATCH = 16

Part = TypeVar("Part", Stability, Bands, Drift)


def diagnose_run(
    run: Path | str,
    dataset: str,
    shards: str | Path | None = None,
    out: Path | None = None,
    trajectories: int = 4,
    well: Path | None = None,
) -> Path:
    """Diagnose the averaged weights of a run's newest checkpoint on one dataset's test split; print the findings.

    `shards` defaults to the recipe's, `out` to <run>/report/diagnosis, and `well`, the folder of the simulated HDF5
    files, to the folder `well` beside the shards. Writes <out>/<dataset>.{json,png,html} and returns the HTML file's
    path. Raises UserError if there is no checkpoint or no data, or if they do not fit together.
    """
    if trajectories < 1:
        raise UserError(f"--trajectories: expected at least 1, got {trajectories}")
    trained = TrainedModel.open(run)
    out = out or inside(trained.report.parent, f"{trained.report.name}/diagnosis")
    model = trained.model
    if dataset not in model.specs:
        raise UserError(f"--dataset: expected one that {run} was trained on, {', '.join(model.specs)}; got {dataset!r}")
    places = shards or trained.recipe.data.shards
    test, train = (trained.readers([dataset], split, places)[dataset] for split in ("test", "train"))
    spec = model.specs[dataset]
    check_channels(test, spec.state_channels, spec.constant_channels, "the model was trained on")
    subject = Subject(model, test, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = choose_trajectories(test, trajectories)
    origin = {"checkpoint": str(trained.checkpoint), "step": trained.step, "data": test.manifest.digest[:12]}
    simulated, twins = well or sibling_well(places), None
    if simulated is not None:
        try:
            twins = twins_of(test, simulated, chosen)
        except UserError as error:
            if well is not None:  # the user named the folder
                raise
            print(f"without twins of the true flow: {error}")
    diagnosis = diagnose(subject, train, trained.registry().card(dataset), chosen, twins, origin)
    return write_diagnosis(diagnosis, out)


def diagnose(
    subject: Subject,
    train: ShardReader,
    card: Card,
    trajectories: Sequence[int],
    twins: np.ndarray | None = None,
    origin: dict[str, object] | None = None,
) -> Diagnosis:
    """Measure a model on trajectories of one length, from their first frames.

    The trajectories are measured one by one, so that memory holds the states of one. `train` reads the train split;
    `twins` (R, 2, T, C, H, W) are the trajectories and their twins, if any; `origin` names the weights and the data.
    """
    # One bar for everything, in model calls: a log gets its lines from bars that stay for more than a minute.
    calls = 3 * (subject.reader.num_frames(trajectories[0]) - subject.context) * len(trajectories)
    with progress_bar(total=calls, desc=f"diagnose {subject.dataset}", unit="call", leave=False) as bar:
        parts = [
            _measure(subject, card, index, None if twins is None else twins[row], row, bar)
            for row, index in enumerate(trajectories)
        ]
    errors, stabilities, spectra, bands, drifts = zip(*parts, strict=True)
    mean_spectra = {
        name: np.mean([getattr(one, name) for one in spectra], axis=0) for name in ("truth", "prediction", "error")
    }
    return Diagnosis(
        dataset=subject.dataset,
        origin=dict(origin or {}),
        trajectories=tuple(trajectories),
        dt=subject.reader.manifest.trajectories[trajectories[0]].dt,
        growth=Growth.of(*(np.concatenate(arrays) for arrays in zip(*errors, strict=True))),
        stability=_joined(stabilities),
        spectra=replace(spectra[0], **mean_spectra),
        bands=_joined(bands),
        drifts=tuple(_joined(of_one_quantity) for of_one_quantity in zip(*drifts, strict=True)),
        floors=_floors(subject, train),
    )


def _joined(parts: Sequence[Part]) -> Part:
    """Concatenate the arrays of results of one trajectory each; the other values are the same in all."""
    first = parts[0]
    names = [one.name for one in fields(first) if isinstance(getattr(first, one.name), np.ndarray)]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **arrays)


def _measure(
    subject: Subject, card: Card, trajectory: int, twins: np.ndarray | None, row: int, bar: Any
) -> tuple[tuple[np.ndarray, ...], Stability, Spectra, Bands, tuple[Drift, ...]]:
    """Measure one trajectory, R = 1, the `row`-th of those chosen; twins (2, T, C, H, W).

    Returns the three error arrays of `Growth` in place of it, because the recurrence is fitted to all trajectories.
    """
    manifest, num_frames, context = subject.reader.manifest, subject.reader.num_frames(trajectory), subject.context
    num_steps = num_frames - context
    step, frames = subject.step([trajectory]), subject.frames([trajectory], num_frames)
    single, predicted, state = [], [], subject.state(frames, 0)
    with torch.no_grad():
        bar.set_postfix_str(f"roll out trajectory {trajectory}")
        for k in range(num_steps):
            single.append(_rms(subject.newest(step(subject.state(frames, k))) - frames[:, context + k]))
            state = step(state)
            predicted.append(subject.newest(state))
            bar.update()
    paths = frames, torch.cat([frames[:, :context], torch.stack(predicted, dim=1)], dim=1)
    truth, rollout = (path[:, context - 1 :] for path in paths)  # (1, K + 1, C, H, W) each
    raw_truth, raw_rollout = subject.physical(truth), subject.physical(rollout)
    scores = vrmse(torch.from_numpy(raw_rollout[:, 1:]), torch.from_numpy(raw_truth[:, 1:])).mean(-1).numpy()
    errors = _rms(rollout[:, 1:] - truth[:, 1:]), np.stack(single, axis=1), scores
    std = np.array([manifest.stats["std"][name] for name in manifest.state_channels])
    spacing = grid_spacing(card, manifest.grid) or (1.0, 1.0)
    later = truth[:, 1:].numpy(), rollout[:, 1:].numpy()
    # A few steps, evenly spaced in the logarithm, because the early ones show how the error begins.
    shown = tuple(np.unique(np.geomspace(1, num_steps, NUM_SPECTRA).round().astype(int)).tolist())
    return (
        errors,
        _stability(subject, trajectory, paths, twins, std, row, bar),
        measure_spectra(*later, shown, spacing),
        measure_bands(*later, subject.model.specs[subject.dataset].periodic),
        measure_drifts(card, manifest.state_channels, raw_truth, raw_rollout, std, manifest.spacing),
    )


def _stability(
    subject: Subject,
    trajectory: int,
    paths: tuple[Tensor, Tensor],
    twins: np.ndarray | None,
    std: np.ndarray,
    row: int,
    bar: Any,
) -> Stability:
    """Measure the growth of one small difference along truth and rollout, `paths` (1, n + K, C, H, W).

    The difference is that of the twins, if any, else noise. The singular values are costly: only row 0 has them.
    """
    context = subject.context
    step, shape, num_steps = subject.step([trajectory]), subject.state(paths[0], 0).shape, paths[0].shape[1] - context
    true_flow, start = None, torch.randn(shape, generator=torch.Generator().manual_seed(row))
    if twins is not None:
        difference = (twins[1, :context] - twins[0, :context]) / std[:, None, None]
        start = torch.from_numpy(difference / np.abs(difference).max()).float().flatten(0, 1)[None]
        distance = twin_distance(twins[:, context - 1 :], std)  # (K + 1,)
        true_flow = (distance[1:] / distance[:-1])[None]
    frames = evenly_spaced(num_steps, NUM_JACOBIANS) if row == 0 else []
    growth, largest = [], []
    for path in paths:
        bar.set_postfix_str(f"growth along trajectory {trajectory}")
        growth.append(tangent_growth(step, _states(subject, path, num_steps, bar), start.to(subject.device)))
        bar.set_postfix_str("largest singular values")
        vector, values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(subject.device), []
        for frame in frames:
            value, vector = largest_singular_value(step, subject.state(path, frame), vector)
            bar.refresh()
            values.append(value)
        largest.append(np.array(values))
    return Stability(growth[0], growth[1], true_flow, tuple(frames), largest[0], largest[1])


def _states(subject: Subject, path: Tensor, num_steps: int, bar: Any) -> Iterator[Tensor]:
    """Yield the states of a path (1, n + K, C, H, W) from which a step is taken, and count them."""
    for k in range(num_steps):
        yield subject.state(path, k)
        bar.update()


def _floors(subject: Subject, train: ShardReader) -> Floors:
    """Measure the one-step VRMSE of the model and of simpler predictors on the same windows."""
    length = subject.context + 1
    pairs = (subject.pairs(train, ids) for ids in _window_batches(train, FIT_WINDOWS, length))
    pointwise = PointwiseMap.fit((source.numpy(), target.numpy()) for source, target in pairs)
    scores: dict[str, list[np.ndarray]] = {"model": [], "pointwise": [], "persistence": []}
    for ids in _window_batches(subject.reader, SCORE_WINDOWS, length):
        source, target = subject.pairs(subject.reader, ids)
        step = subject.step(subject.reader.index(subject.context + 1).locate(ids)[0].tolist())
        with torch.no_grad():
            model = subject.newest(step(source.to(subject.device)))
        predicted = {"model": model, "persistence": subject.newest(source)}
        predicted["pointwise"] = torch.from_numpy(pointwise(source.numpy()))
        for name, states in predicted.items():
            raw, wanted = (torch.from_numpy(subject.physical(part)) for part in (states, target))
            scores[name].append(vrmse(raw, wanted).mean(-1).numpy())
    medians = {name: float(np.median(np.concatenate(parts))) for name, parts in scores.items()}
    return Floors(windows=sum(len(part) for part in scores["model"]), **medians)


def _window_batches(reader: ShardReader, count: int, length: int) -> list[np.ndarray]:
    """Return the ids of up to `count` evenly spaced windows of `length` frames, in batches."""
    ids = np.array(evenly_spaced(len(reader.index(length)), count))
    return np.array_split(ids, -(-len(ids) // BATCH))


def _rms(states: Tensor) -> np.ndarray:
    """Return the root mean square, float64 (...), of states (..., C, H, W)."""
    return states.double().square().mean((-3, -2, -1)).sqrt().numpy()
