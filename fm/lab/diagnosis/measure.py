"""Takes the measurements of one model on one dataset: rollouts, what its steps do to small errors, scales, floors.

Diagnose one dataset of a run: measure, say what it means, write the page.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.files import UserError, atomic_file
from data_pipeline.miniwell.twins import twin_distance
from data_pipeline.registry import Card
from data_pipeline.windows.reader import ShardReader
from fm.datasets import check_channels
from fm.evaluation.evaluate import Trained
from fm.lab.diagnosis.quantities import (
    Bands,
    Drift,
    PointwiseMap,
    Spectra,
    Step,
    first_step,
    fit_recurrence,
    grid_spacing,
    largest_singular_value,
    measure_bands,
    measure_drifts,
    measure_spectra,
    tangent_growth,
)
from fm.lab.diagnosis.report import DPI, findings, key_numbers, page, sheet
from fm.lab.diagnosis.subject import (
    Diagnosis,
    Floors,
    Growth,
    Stability,
    Subject,
    choose_trajectories,
    sibling_well,
    twins_of,
)
from fm.model.loss import vrmse

NUM_JACOBIANS = 9  # states along a path at which the largest singular value is computed
NUM_SPECTRA = 3
FIT_WINDOWS = 256  # of the train split, evenly spaced, that the pointwise map is fitted to
SCORE_WINDOWS = 128  # of the test split, evenly spaced, that one-step predictors are compared on
BATCH = 16

Advance = Callable[[int], object]
Part = TypeVar("Part", Growth, Stability, Bands, Drift)


@dataclass(frozen=True)
class _Part:
    """What is measured of one trajectory: R = 1. The singular values are those of the first trajectory only."""

    growth: Growth
    stability: Stability
    spectra: Spectra
    bands: Bands
    drifts: tuple[Drift, ...]


def work(num_steps: int, num_trajectories: int) -> int:
    """How often `diagnose` calls `advance`, in all, for so many rollouts of so many steps."""
    return 4 * num_steps * num_trajectories + 2 * len(_jacobian_frames(num_steps)) + 1


def diagnose(
    subject: Subject,
    train: ShardReader,
    card: Card,
    trajectories: Sequence[int],
    twins: np.ndarray | None = None,
    origin: dict[str, object] | None = None,
    advance: Advance = lambda count: None,
) -> Diagnosis:
    """Measure a model on trajectories (R) of one length, from their first frames; states of one are held at a time.

    `train` reads the train split; `twins` (R, 2, T, C, H, W) are the trajectories and their twins, if there are any;
    `origin` says whose numbers these are.
    """
    manifest = subject.reader.manifest
    parts = [
        _measure(subject, card, index, None if twins is None else twins[row : row + 1], row, advance)
        for row, index in enumerate(trajectories)
    ]
    return Diagnosis(
        dataset=subject.dataset,
        origin=dict(origin or {}),
        trajectories=tuple(trajectories),
        dt=manifest.trajectories[trajectories[0]].dt,
        growth=_joined_growth([part.growth for part in parts]),
        stability=_joined_stability([part.stability for part in parts]),
        spectra=_joined_spectra([part.spectra for part in parts]),
        bands=_joined([part.bands for part in parts], "truth", "prediction", "error"),
        drifts=tuple(
            _joined(drifts, "truth", "prediction") for drifts in zip(*(part.drifts for part in parts), strict=True)
        ),
        floors=_floors(subject, train, advance),
    )


def _measure(
    subject: Subject, card: Card, trajectory: int, twins: np.ndarray | None, row: int, advance: Advance
) -> _Part:
    """One trajectory, the `row`-th of those chosen; twins (1, 2, T, C, H, W)."""
    manifest, num_steps = subject.reader.manifest, subject.reader.num_frames(trajectory) - 1
    alone = [trajectory]
    truth = subject.states(alone, num_steps + 1)
    rollout = _roll_out(subject, alone, truth[:, 0], num_steps, advance)
    raw_truth, raw_rollout = subject.physical(truth), subject.physical(rollout)
    std = np.array([manifest.stats["std"][name] for name in manifest.state_channels])
    spacing = grid_spacing(card, manifest.grid) or (1.0, 1.0)
    later = truth[:, 1:].numpy(), rollout[:, 1:].numpy()
    return _Part(
        growth=_growth(subject, alone, truth, rollout, raw_truth, raw_rollout, advance),
        stability=_stability(subject, alone, truth, rollout, twins, std, row, advance),
        spectra=measure_spectra(*later, _shown_steps(num_steps), spacing),
        bands=measure_bands(*later, subject.model.specs[subject.dataset].periodic),
        drifts=measure_drifts(card, manifest.state_channels, raw_truth, raw_rollout, std),
    )


def _joined(parts: Sequence[Part], *names: str) -> Part:
    """The first of the parts, with these arrays (R, ...) of all."""
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **arrays)


def _joined_growth(parts: Sequence[Growth]) -> Growth:
    joined = _joined(parts, "rollout", "one_step", "vrmse")
    return replace(
        joined,
        recurrence=fit_recurrence(joined.rollout, joined.one_step),
        failed=tuple(step for part in parts for step in part.failed),
        not_finite=tuple(step for part in parts for step in part.not_finite),
    )


def _joined_stability(parts: Sequence[Stability]) -> Stability:
    flow = () if parts[0].true_flow is None else ("true_flow",)
    return _joined(parts, "along_truth", "along_rollout", *flow)


def _joined_spectra(parts: Sequence[Spectra]) -> Spectra:
    """Averages over trajectories, which all have the same number of fields."""
    truth, prediction, error = (
        np.mean(part, axis=0) for part in zip(*((one.truth, one.prediction, one.error) for one in parts), strict=True)
    )
    return replace(parts[0], truth=truth, prediction=prediction, error=error)


def _roll_out(
    subject: Subject, trajectories: Sequence[int], initial: Tensor, num_steps: int, advance: Advance
) -> Tensor:
    """The initial state and the next ones, (R, K + 1, C, H, W), normalised, on the CPU."""
    step, states = subject.step(trajectories), [initial]
    state = initial.to(subject.device)
    for _ in range(num_steps):
        with torch.no_grad():
            state = step(state)
        states.append(state.cpu())
        advance(1)
    return torch.stack(states, dim=1)


def _growth(
    subject: Subject,
    trajectories: Sequence[int],
    truth: Tensor,
    rollout: Tensor,
    raw_truth: np.ndarray,
    raw_rollout: np.ndarray,
    advance: Advance,
) -> Growth:
    """Errors of rollouts (R, K + 1, C, H, W), normalised and in physical units, and of single steps."""
    step, single = subject.step(trajectories), []
    for state, following in zip(_inputs(truth), truth[:, 1:].unbind(1), strict=True):
        with torch.no_grad():
            single.append(_rms(step(state.to(subject.device)).cpu() - following))
        advance(1)
    errors, one_step = _rms(rollout[:, 1:] - truth[:, 1:]), np.stack(single, axis=1)
    scores = vrmse(torch.from_numpy(raw_rollout[:, 1:]), torch.from_numpy(raw_truth[:, 1:])).mean(-1).numpy()
    return Growth(
        rollout=errors,
        one_step=one_step,
        vrmse=scores,
        recurrence=fit_recurrence(errors, one_step),
        failed=first_step(~(scores <= 1)),
        not_finite=first_step(~np.isfinite(errors)),
    )


def _stability(
    subject: Subject,
    trajectories: Sequence[int],
    truth: Tensor,
    rollout: Tensor,
    twins: np.ndarray | None,
    std: np.ndarray,
    row: int,
    advance: Advance,
) -> Stability:
    """Growth of one small difference along truth and rollout: the twins', where there are any, else noise.

    The singular values, which are costly, are those of the trajectory in row 0; none elsewhere.
    """
    step, true_flow = subject.step(trajectories), None
    start = torch.randn(truth[:, 0].shape, generator=torch.Generator().manual_seed(row))
    if twins is not None:
        difference = (twins[:, 1, 0] - twins[:, 0, 0]) / std[:, None, None]
        start = torch.from_numpy(difference / np.abs(difference).max()).float()
        distance = np.stack([twin_distance(pair, std) for pair in twins])  # (R, T)
        true_flow = distance[:, 1:] / distance[:, :-1]
    along = [
        tangent_growth(step, (_told(state, advance).to(subject.device) for state in _inputs(path)), start.to(path))
        for path in (truth, rollout)
    ]
    frames = _jacobian_frames(truth.shape[1] - 1) if row == 0 else ()
    largest = [_largest(step, path, frames, subject.device, advance) for path in (truth, rollout)]
    return Stability(along[0], along[1], true_flow, frames, largest[0], largest[1])


def _largest(step: Step, path: Tensor, frames: Sequence[int], device: torch.device, advance: Advance) -> np.ndarray:
    """Largest singular values along the path of one trajectory (1, K + 1, C, H, W)."""
    vector = torch.randn(path[:, 0].shape, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for frame in frames:
        value, vector = largest_singular_value(step, path[:, frame].to(device), vector)
        found.append(value)
        advance(1)
    return np.array(found)


def _floors(subject: Subject, train: ShardReader, advance: Advance) -> Floors:
    """One-step VRMSE of the model and of what is simpler, on the same windows."""
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
    """Ids of up to `count` evenly spaced windows of two frames, in batches."""
    total = len(reader.index(2))
    ids = np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
    return np.array_split(ids, -(-len(ids) // BATCH))


def _inputs(path: Tensor) -> Iterable[Tensor]:
    """The states (R, C, H, W) of a path that a step starts from."""
    return path[:, :-1].unbind(1)


def _told(state: Tensor, advance: Advance) -> Tensor:
    advance(1)
    return state


def _rms(states: Tensor) -> np.ndarray:
    """(..., C, H, W) to the root mean square, (...) float64."""
    return states.double().square().mean((-3, -2, -1)).sqrt().numpy()


def _jacobian_frames(num_steps: int) -> tuple[int, ...]:
    return tuple(np.unique(np.linspace(0, num_steps - 1, NUM_JACOBIANS).round().astype(int)).tolist())


def _shown_steps(num_steps: int) -> tuple[int, ...]:
    """A few steps, evenly in the logarithm: early ones tell how it begins."""
    return tuple(np.unique(np.geomspace(1, num_steps, NUM_SPECTRA).round().astype(int)).tolist())


def diagnose_run(
    run: Path | str,
    dataset: str,
    shards: str | Path | None = None,
    out: Path | None = None,
    trajectories: int = 4,
    well: Path | None = None,
) -> Path:
    """Diagnose the averaged weights of a run's newest checkpoint on one dataset's test split; prints the sentences.

    `shards` defaults to the recipe's, `out` to <run>/report/diagnosis, `well`, the folder of the simulated HDF5 files,
    to the folder `well` beside the shards. Writes <out>/<dataset>.{json,png,html} and returns the HTML file's path.
    UserError where there is no checkpoint, no data, or they do not fit together.
    """
    if trajectories < 1:
        raise UserError(f"--trajectories: expected at least 1, got {trajectories}")
    trained = Trained.open(run)
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
    num_steps = test.num_frames(chosen[0]) - 1
    origin: dict[str, object] = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "data": test.manifest.digest[:12],
    }
    known = well or sibling_well(shards)
    total = work(num_steps, len(chosen)) + (len(chosen) if known else 0)
    with tqdm(total=total, desc=f"diagnose {dataset}", leave=False) as bar:
        twins = _twins(test, known, chosen, bar, required=well is not None)
        diagnosis = diagnose(subject, train, card, chosen, twins, origin, bar.update)
    return _write(diagnosis, out or trained.report / "diagnosis")


def _twins(
    reader: ShardReader, well: Path | None, chosen: tuple[int, ...], bar: tqdm, required: bool
) -> np.ndarray | None:
    """Twins of the chosen trajectories; None where they cannot be made and nobody said that they can."""
    if well is None:
        return None
    try:
        return twins_of(reader, well, chosen, bar.update)
    except UserError as error:
        if required:
            raise
        tqdm.write(f"without twins of the true flow: {error}")
        return None


def _write(diagnosis: Diagnosis, out: Path) -> Path:
    """The three files; prints what they begin with."""
    found = findings(diagnosis)
    content = {**diagnosis.to_json(), "findings": {one.subject: one.text for one in found}}
    with atomic_file(out / f"{diagnosis.dataset}.json") as file:
        file.write(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n")
    with atomic_file(out / f"{diagnosis.dataset}.png") as file:
        sheet(diagnosis).savefig(file, format="png", dpi=DPI)
    with atomic_file(out / f"{diagnosis.dataset}.html") as file:
        file.write(page(diagnosis, found).encode())
    print("\n".join(f"{one.subject}: {one.text}" for one in found), end="\n\n")
    rows = key_numbers(diagnosis)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), end="\n\n")
    print(f"diagnosis: {out / diagnosis.dataset}.html")
    return out / f"{diagnosis.dataset}.html"
