"""Measure why the rollouts of one model on one dataset diverge: errors, stability, scales, conservation, one step.

`diagnose_run` opens a run and writes the results; `diagnose` measures. Array legend as in quantities.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.files import UserError
from data_pipeline.miniwell.twins import twin_distance
from data_pipeline.registry import Card
from data_pipeline.windows.reader import ShardReader
from fm.datasets import check_channels
from fm.evaluation.evaluate import TrainedModel
from fm.lab.diagnosis.growth import Growth, Stability, Step, largest_singular_value, tangent_growth
from fm.lab.diagnosis.quantities import (
    Bands,
    Diagnosis,
    Drift,
    Floors,
    PointwiseMap,
    Spectra,
    grid_spacing,
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

Advance = Callable[[int], object]
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
    model = trained.model
    if dataset not in model.specs:
        raise UserError(f"--dataset: expected one that {run} was trained on, {', '.join(model.specs)}; got {dataset!r}")
    shards = shards or trained.recipe.data.shards
    test, train = (trained.readers([dataset], split, shards)[dataset] for split in ("test", "train"))
    spec = model.specs[dataset]
    check_channels(test, spec.state_channels, spec.constant_channels, "the model was trained on")
    card = trained.registry().card(dataset)
    subject = Subject(model, test, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = choose_trajectories(test, trajectories)
    origin = {"checkpoint": str(trained.checkpoint), "step": trained.step, "data": test.manifest.digest[:12]}
    simulated, twins = well or sibling_well(shards), None
    total = work(test.num_frames(chosen[0]) - 1, len(chosen)) + (len(chosen) if simulated else 0)
    with tqdm(total=total, desc=f"diagnose {dataset}", leave=False) as bar:
        if simulated is not None:
            try:
                twins = twins_of(test, simulated, chosen, bar.update)
            except UserError as error:
                if well is not None:  # the user named the folder
                    raise
                tqdm.write(f"without twins of the true flow: {error}")
        diagnosis = diagnose(subject, train, card, chosen, twins, origin, bar.update)
    return write_diagnosis(diagnosis, out or trained.report / "diagnosis")


def diagnose(
    subject: Subject,
    train: ShardReader,
    card: Card,
    trajectories: Sequence[int],
    twins: np.ndarray | None = None,
    origin: dict[str, object] | None = None,
    advance: Advance = lambda count: None,
) -> Diagnosis:
    """Measure a model on trajectories of one length, from their first frames.

    The trajectories are measured one by one, so that memory holds the states of one. `train` reads the train split;
    `twins` (R, 2, T, C, H, W) are the trajectories and their twins, if any; `origin` names the weights and the data.
    """
    parts = [
        _measure(subject, card, index, None if twins is None else twins[row], row, advance)
        for row, index in enumerate(trajectories)
    ]
    errors, stabilities, spectra, bands, drifts = zip(*parts, strict=True)
    return Diagnosis(
        dataset=subject.dataset,
        origin=dict(origin or {}),
        trajectories=tuple(trajectories),
        dt=subject.reader.manifest.trajectories[trajectories[0]].dt,
        growth=Growth.of(*(np.concatenate(arrays) for arrays in zip(*errors, strict=True))),
        stability=_joined(stabilities),
        spectra=_mean(spectra),
        bands=_joined(bands),
        drifts=tuple(_joined(of_one_quantity) for of_one_quantity in zip(*drifts, strict=True)),
        floors=_floors(subject, train, advance),
    )


def work(num_steps: int, num_trajectories: int) -> int:
    """Return how often `diagnose` calls `advance` in all."""
    return 4 * num_steps * num_trajectories + 2 * len(_jacobian_frames(num_steps)) + 1


def _joined(parts: Sequence[Part]) -> Part:
    """Concatenate the arrays of results of one trajectory each; the other values are the same in all."""
    first = parts[0]
    names = [one.name for one in fields(first) if isinstance(getattr(first, one.name), np.ndarray)]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **arrays)


def _mean(spectra: Sequence[Spectra]) -> Spectra:
    """Average over trajectories, which all have the same number of fields."""
    names = ("truth", "prediction", "error")
    return replace(spectra[0], **{name: np.mean([getattr(one, name) for one in spectra], axis=0) for name in names})


def _measure(
    subject: Subject, card: Card, trajectory: int, twins: np.ndarray | None, row: int, advance: Advance
) -> tuple[tuple[np.ndarray, ...], Stability, Spectra, Bands, tuple[Drift, ...]]:
    """Measure one trajectory, R = 1, the `row`-th of those chosen; twins (2, T, C, H, W).

    Returns the three error arrays of `Growth` in place of it, because the recurrence is fitted to all trajectories.
    """
    manifest, num_steps = subject.reader.manifest, subject.reader.num_frames(trajectory) - 1
    step, truth = subject.step([trajectory]), subject.states([trajectory], num_steps + 1)
    single, states = [], [truth[:, 0]]
    for k in range(num_steps):
        with torch.no_grad():
            single.append(_rms(step(truth[:, k].to(subject.device)).cpu() - truth[:, k + 1]))
            states.append(step(states[-1].to(subject.device)).cpu())
        advance(2)
    rollout = torch.stack(states, dim=1)
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
        _stability(step, (truth, rollout), twins, std, row, subject.device, advance),
        measure_spectra(*later, shown, spacing),
        measure_bands(*later, subject.model.specs[subject.dataset].periodic),
        measure_drifts(card, manifest.state_channels, raw_truth, raw_rollout, std),
    )


def _stability(
    step: Step,
    paths: tuple[Tensor, Tensor],
    twins: np.ndarray | None,
    std: np.ndarray,
    row: int,
    device: torch.device,
    advance: Advance,
) -> Stability:
    """Measure the growth of one small difference along truth and rollout, `paths` (1, K + 1, C, H, W).

    The difference is that of the twins, if any, else noise. The singular values are costly: only row 0 has them.
    """
    true_flow, start = None, torch.randn(paths[0][:, 0].shape, generator=torch.Generator().manual_seed(row))
    if twins is not None:
        difference = (twins[1, 0] - twins[0, 0]) / std[:, None, None]
        start = torch.from_numpy(difference / np.abs(difference).max()).float()[None]
        distance = twin_distance(twins, std)  # (T,)
        true_flow = (distance[1:] / distance[:-1])[None]

    def states(path: Tensor) -> Iterator[Tensor]:
        for state in path[:, :-1].unbind(1):
            advance(1)
            yield state.to(device)

    along_truth, along_rollout = (tangent_growth(step, states(path), start.to(device)) for path in paths)
    frames = _jacobian_frames(paths[0].shape[1] - 1) if row == 0 else ()
    largest = []
    for path in paths:
        vector, values = torch.randn(path[:, 0].shape, generator=torch.Generator().manual_seed(0)).to(device), []
        for frame in frames:
            value, vector = largest_singular_value(step, path[:, frame].to(device), vector)
            values.append(value)
            advance(1)
        largest.append(np.array(values))
    return Stability(along_truth, along_rollout, true_flow, frames, *largest)


def _jacobian_frames(num_steps: int) -> tuple[int, ...]:
    return tuple(np.unique(np.linspace(0, num_steps - 1, NUM_JACOBIANS).round().astype(int)).tolist())


def _floors(subject: Subject, train: ShardReader, advance: Advance) -> Floors:
    """Measure the one-step VRMSE of the model and of simpler predictors on the same windows."""
    pairs = (subject.pairs(train, ids) for ids in _window_batches(train, FIT_WINDOWS))
    pointwise = PointwiseMap.fit((source.numpy(), target.numpy()) for source, target in pairs)
    scores: dict[str, list[np.ndarray]] = {"model": [], "pointwise": [], "persistence": []}
    for ids in _window_batches(subject.reader, SCORE_WINDOWS):
        source, target = subject.pairs(subject.reader, ids)
        step = subject.step(subject.reader.index(2).locate(ids)[0].tolist())
        with torch.no_grad():
            predicted = {"model": step(source.to(subject.device)), "persistence": source}
        predicted["pointwise"] = torch.from_numpy(pointwise(source.numpy()))
        for name, states in predicted.items():
            raw, wanted = (torch.from_numpy(subject.physical(part)) for part in (states, target))
            scores[name].append(vrmse(raw, wanted).mean(-1).numpy())
    advance(1)
    medians = {name: float(np.median(np.concatenate(parts))) for name, parts in scores.items()}
    return Floors(windows=sum(len(part) for part in scores["model"]), **medians)


def _window_batches(reader: ShardReader, count: int) -> list[np.ndarray]:
    """Return the ids of up to `count` evenly spaced windows of two frames, in batches."""
    total = len(reader.index(2))
    ids = np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
    return np.array_split(ids, -(-len(ids) // BATCH))


def _rms(states: Tensor) -> np.ndarray:
    """Return the root mean square, float64 (...), of states (..., C, H, W)."""
    return states.double().square().mean((-3, -2, -1)).sqrt().numpy()
