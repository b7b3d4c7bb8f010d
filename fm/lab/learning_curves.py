"""The learning curves of runs, and two of them compared: after equal numbers of windows, and after equal FLOPs.

A joint run, of several datasets, and a bespoke run, of one of them, are compared twice: at the largest number of
training windows of that dataset that both have reached, and at the largest number of FLOPs. After as many windows the
joint run has also trained on the other datasets; after as many FLOPs the bespoke run has seen more of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from fm.checkpoint import load_pretrained, read_state, use_checkpoint
from fm.config import Recipe, resolve
from fm.evaluation.cosines import Cosines
from fm.model.surrogate import Surrogate
from fm.training.flops import forward_flops, forward_passes
from fm.training.objective import unroll_length
from fm.training.runlog import parse_lines

HELPS, HURTS = 0.97, 1.03  # joint VRMSE / bespoke VRMSE; a ratio between them counts as equal
VERDICTS = ("helps", "equal", "hurts", "neither finite", "not comparable")


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """One-step VRMSE of a dataset's validations, and what the run had done by then."""

    windows: np.ndarray  # (n,), of the dataset that it had trained on, ascending, above 0
    flops: np.ndarray  # (n,), of its training, all datasets included, ascending; NaN if a grid is not known
    vrmse: np.ndarray  # (n,); inf if a prediction was not finite


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The training of a run, as its directory records it."""

    path: Path
    recipe: Recipe
    shards: Mapping[str, str]  # dataset -> digest of its training shards
    parameters: int
    curves: Mapping[str, LearningCurve]  # by dataset, of those with a validation after their first windows
    cosines: Sequence[tuple[int, Cosines]]  # step and measurement

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.recipe.run.seed


def read_run(path: Path) -> TrainedRun:
    """Read a run directory. Raises UserError if it is none, its logs have gaps, or it was never validated."""
    for name in ("log.jsonl", "events.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path}: not a run directory, it has no {name}. Expected one such as runs/quickstart")
    state, model = use_checkpoint(path, lambda found: (read_state(found), load_pretrained(found)))
    recipe = resolve(state["recipe"], f"state.json of the newest checkpoint in {path}")
    events, _ = parse_lines((path / "events.jsonl").read_text(errors="replace"))
    validations = {line["step"]: line for line in events if line.get("kind") == "validation"}
    if not validations:
        raise UserError(
            f"{path}: expected validations in events.jsonl, found none; train it with validation.every > 0, several "
            "times smaller than train.steps"
        )
    seen, flops = _training_until(path / "log.jsonl", max(validations), recipe, model)
    try:
        curves = _curves(validations, seen, flops)
        cosines = [(line["step"], Cosines.from_json(line)) for line in events if line.get("kind") == "cosine"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'events.jsonl'}: a damaged line ({type(error).__name__}: {error}); remove it"
        ) from error
    return TrainedRun(path, recipe, state["shards"], model.num_parameters(), curves, cosines)


def _training_until(log: Path, last: int, recipe: Recipe, model: Surrogate) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the number of windows drawn, by dataset, and the FLOPs, after 0, 1, ... `last` steps, (last + 1,) each.

    FLOPs are of the products of forward and backward passes; the optimizer's are not counted.
    """
    lines, _ = parse_lines(log.read_text(errors="replace"))
    lines = lines[:last]
    if [line["step"] for line in lines] != list(range(1, last + 1)):
        raise UserError(
            f"{log}: expected a line for each of the steps 1 to {last}, the last validation's; lines are missing, so "
            "what the run has seen cannot be counted. Restore the file from a copy"
        )
    batch, finetune = recipe.train.batch, recipe.finetune
    forward = {
        name: math.nan if spec.grid is None else float(forward_flops(model, name, spec.grid))
        for name, spec in model.specs.items()
    }
    drawn: dict[str, np.ndarray] = {}
    flops = np.zeros(last + 1)
    for line in lines:
        step = line["step"]
        for name in line["dataset"].split("+"):  # one name per draw
            drawn.setdefault(name, np.zeros(last + 1, np.int64))[step] += batch
            calls = unroll_length(step - 1, recipe.train.steps, finetune, name)
            flops[step] += batch * forward[name] * forward_passes(calls, finetune)
    return {name: np.cumsum(counts) for name, counts in drawn.items()}, np.cumsum(flops)


def _curves(
    validations: Mapping[int, Mapping[str, Any]], seen: Mapping[str, np.ndarray], flops: np.ndarray
) -> dict[str, LearningCurve]:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for step, line in sorted(validations.items()):
        for name, cell in line["datasets"].items():
            if name in seen and seen[name][step]:
                vrmse = math.inf if cell["vrmse"] is None else float(cell["vrmse"])
                points.setdefault(name, []).append((seen[name][step], flops[step], vrmse))
    return {name: LearningCurve(*np.array(found, np.float64).T) for name, found in points.items()}


@dataclass(frozen=True)
class Match:
    """The VRMSE of a joint and of a bespoke run after equal amounts of training."""

    amount: float | None = None  # of windows or FLOPs; None: the two have no amount in common
    joint: float = math.nan  # inf if a prediction was not finite, NaN if there is no common amount
    bespoke: float = math.nan
    reach: float = 0.0  # the amount over the last one of the run that goes on longer: 1 if both end there

    @property
    def ratio(self) -> float:
        """Joint over bespoke; NaN if neither is finite."""
        return self.joint / self.bespoke if self.bespoke else math.inf

    @property
    def verdict(self) -> str:
        """The effect of training together, one of VERDICTS."""
        if self.amount is None:
            return "not comparable"
        if math.isnan(self.ratio):
            return "neither finite"
        return "helps" if self.ratio < HELPS else "hurts" if self.ratio > HURTS else "equal"


def match(joint: tuple[np.ndarray, np.ndarray], bespoke: tuple[np.ndarray, np.ndarray]) -> Match:
    """Compare two curves, each as amounts (n,) and VRMSE (n,), at the largest amount that both have reached.

    Between validations the VRMSE is linear in the logarithm of the amount. Nothing is extrapolated.
    """
    amount = min(amounts[-1] for amounts, _ in (joint, bespoke))
    known = not any(np.isnan(amounts).any() for amounts, _ in (joint, bespoke))
    if not known or amount < max(amounts[0] for amounts, _ in (joint, bespoke)):  # one ends before the other begins
        return Match()
    ours, theirs = (float(np.interp(np.log(amount), np.log(amounts), vrmse)) for amounts, vrmse in (joint, bespoke))
    return Match(float(amount), ours, theirs, float(amount / max(amounts[-1] for amounts, _ in (joint, bespoke))))


@dataclass(frozen=True, eq=False)
class Comparison:
    """One dataset in a joint run and in a bespoke run."""

    dataset: str
    joint: TrainedRun
    bespoke: TrainedRun
    windows: Match  # after equal numbers of windows of the dataset
    flops: Match  # after equal FLOPs


def compare(joints: Sequence[TrainedRun], bespoke: TrainedRun) -> Comparison:
    """Compare the dataset of `bespoke` with the only joint run, or with the joint run of its seed if there are several.

    Raises UserError if the runs do not compare.
    """
    joint = _joint_of(joints, bespoke)
    (dataset,) = bespoke.shards
    if dataset not in joint.shards:
        raise UserError(
            f"transfer: expected a run of one of the datasets of {joint.path} ({', '.join(sorted(joint.shards))}), got "
            f"{bespoke.path} of {dataset}; leave it out"
        )
    for key in ("windows", "protocol"):
        ours, theirs = getattr(joint.recipe.validation, key), getattr(bespoke.recipe.validation, key)
        if ours != theirs:
            raise UserError(
                f"transfer: expected the same validations, got validation.{key}={ours} in {joint.path} and {theirs} in "
                f"{bespoke.path}; train one of them again with the other's"
            )
    if joint.shards[dataset] != bespoke.shards[dataset]:
        raise UserError(
            f"transfer: expected the same {dataset} data, got shards with digests {joint.shards[dataset][:12]} in "
            f"{joint.path} and {bespoke.shards[dataset][:12]} in {bespoke.path}; train both on the same data.shards"
        )
    if dataset not in joint.curves or dataset not in bespoke.curves:
        return Comparison(dataset, joint, bespoke, Match(), Match())
    ours, theirs = joint.curves[dataset], bespoke.curves[dataset]
    windows = match((ours.windows, ours.vrmse), (theirs.windows, theirs.vrmse))
    return Comparison(dataset, joint, bespoke, windows, match((ours.flops, ours.vrmse), (theirs.flops, theirs.vrmse)))


def _joint_of(joints: Sequence[TrainedRun], bespoke: TrainedRun) -> TrainedRun:
    """Return the joint run that a bespoke run is compared with."""
    if len(joints) == 1:
        return joints[0]
    found = [one for one in joints if one.seed == bespoke.seed]
    if not found:
        raise UserError(
            f"transfer: expected a joint run of the seed of each run, got none of run.seed={bespoke.seed} for "
            f"{bespoke.path}; leave it out, or add that joint run"
        )
    return found[0]


def compare_all(first: TrainedRun, others: Sequence[TrainedRun]) -> tuple[list[TrainedRun], list[Comparison]]:
    """Return the joint runs (`first`, and each other run of several datasets) and a comparison for each run of one.

    Raises UserError unless the joint runs are of the same datasets and of different seeds, and for no bespoke run.
    """
    joints = [first, *(run for run in others if len(run.shards) > 1)]
    datasets = ", ".join(sorted(first.shards))
    advice = "make a run of one dataset with 'data.datasets=[NAME]' run.name=bespoke_NAME"
    for place, one in enumerate(joints):
        if one.shards.keys() != first.shards.keys():
            raise UserError(
                f"transfer: expected runs of one dataset, or joint runs of the datasets of {first.path} ({datasets}), "
                f"got {one.path} of {', '.join(sorted(one.shards))}; {advice}"
            )
        same = [other.path for other in joints[:place] if other.seed == one.seed]
        if same:
            raise UserError(
                f"transfer: expected joint runs of different seeds, got run.seed={one.seed} in {same[0]} and in "
                f"{one.path}; leave one of them out"
            )
    if len(joints) > len(others):
        raise UserError(
            f"transfer: expected a run of one of the datasets of {first.path} ({datasets}), got joint runs only; "
            f"{advice}"
        )
    alone = (compare(joints, run) for run in others if len(run.shards) == 1)
    return joints, sorted(alone, key=lambda one: one.dataset)
