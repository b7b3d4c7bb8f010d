"""What a run has learnt of each dataset, against how much of it the run has seen: read from its directory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from fm.checkpoint import find_checkpoint, load_pretrained, read_state
from fm.recipe_file import resolve
from fm.report.cosines import Cosines
from fm.settings import Recipe
from fm.tracking.logs import parse_lines


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """One-step VRMSE of a dataset's validations, against the windows of it that the run was trained on by then."""

    windows: np.ndarray  # (n,), ascending, above 0
    vrmse: np.ndarray  # (n,); inf where a prediction was not finite

    def at(self, windows: float) -> float:
        """VRMSE at a number of windows between the first and the last; linear in its logarithm between validations."""
        assert self.windows[0] <= windows <= self.windows[-1]
        before = int(np.searchsorted(self.windows, windows, side="right")) - 1
        if self.windows[before] == windows:
            return float(self.vrmse[before])
        start, stop = self.vrmse[before : before + 2].tolist()
        first, last = np.log(self.windows[before : before + 2]).tolist()
        share = (math.log(windows) - first) / (last - first)
        return start + share * (stop - start) if math.isfinite(start) and math.isfinite(stop) else math.inf


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What a run directory says of its training."""

    path: Path
    recipe: Recipe
    shards: Mapping[str, str]  # dataset -> digest of its training shards
    parameters: int
    curves: Mapping[str, LearningCurve]  # by dataset, of those with a validation after their first windows
    cosines: Sequence[tuple[int, Cosines]]  # step and measurement


def read_run(path: Path) -> TrainedRun:
    """UserError where the directory is no run's, its logs have gaps, or it was never validated."""
    for name in ("log.jsonl", "events.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path}: not a run directory, it has no {name}. Expected one such as runs/quickstart")
    checkpoint = find_checkpoint(path)
    state = read_state(checkpoint)
    recipe = resolve(state["recipe"], str(checkpoint / "state.json"))
    events, _ = parse_lines((path / "events.jsonl").read_text(errors="replace"))
    validations = {line["step"]: line for line in events if line.get("kind") == "validation"}
    if not validations:
        raise UserError(
            f"{path}: expected validations in events.jsonl, found none; train it with validation.every > 0, several "
            "times smaller than train.steps"
        )
    seen = _windows_seen(path / "log.jsonl", max(validations), recipe.train.batch)
    try:
        curves = _curves(validations, seen)
        cosines = [(line["step"], Cosines.from_json(line)) for line in events if line.get("kind") == "cosine"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'events.jsonl'}: a damaged line ({type(error).__name__}: {error}); remove it"
        ) from error
    return TrainedRun(path, recipe, state["shards"], load_pretrained(checkpoint).num_parameters(), curves, cosines)


def _windows_seen(log: Path, last: int, batch: int) -> dict[str, np.ndarray]:
    """By dataset, the windows drawn after 0, 1, ... `last` steps, (last + 1,)."""
    lines, _ = parse_lines(log.read_text(errors="replace"))
    lines = lines[:last]
    if [line["step"] for line in lines] != list(range(1, last + 1)):
        raise UserError(
            f"{log}: expected a line for each of the steps 1 to {last}, the last validation's; lines are missing, so "
            "what the run has seen cannot be counted. Restore the file from a copy"
        )
    drawn: dict[str, np.ndarray] = {}
    for line in lines:
        for name in line["dataset"].split("+"):  # one per draw
            drawn.setdefault(name, np.zeros(last + 1, np.int64))[line["step"]] += batch
    return {name: np.cumsum(counts) for name, counts in drawn.items()}


def _curves(validations: Mapping[int, Mapping[str, Any]], seen: Mapping[str, np.ndarray]) -> dict[str, LearningCurve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for step, line in sorted(validations.items()):
        for name, cell in line["datasets"].items():
            if name in seen and seen[name][step]:
                vrmse = cell["vrmse"]
                points.setdefault(name, []).append((int(seen[name][step]), math.inf if vrmse is None else float(vrmse)))
    return {name: LearningCurve(*np.array(found, np.float64).T) for name, found in points.items()}
