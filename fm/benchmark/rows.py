"""Rows of a benchmark: trials beside what their steps compute and move, and the mixture of each variant."""

from collections.abc import Sequence

import torch

from fm.benchmark.ceilings import Ceilings
from fm.benchmark.count import Counts
from fm.benchmark.result import MIXTURE, Row, Work, mean_of, medians, spread
from fm.benchmark.trial import Trial
from fm.planning.workload import Workload
from fm.runtime import autocast_dtype
from fm.training.exercise import StepSeconds

DTYPES = {None: "float32", torch.bfloat16: "bfloat16"}


def measured_rows(
    trials: Sequence[Trial], workload: Workload, counts: Counts, ceilings: Ceilings, device: torch.device
) -> list[Row]:
    """A row for each trial, those of a variant together and followed by their mixture."""
    rows = []
    for variant in dict.fromkeys(trial.variant for trial in trials):
        own = [trial for trial in trials if trial.variant == variant]
        found = [_row(trial, workload, counts, ceilings, device) for trial in own]
        rows += [*found, mixture(found, workload, own)]
    return rows


def floor_rows(dtype: torch.dtype | None, workload: Workload, counts: Counts, ceilings: Ceilings) -> list[Row]:
    """Rows that are counted and not measured."""
    rows, name, reason = [], DTYPES[dtype], "counted, not measured"
    for work in workload.datasets.values():
        counted = counts.work(work.name, dtype, workload.recipe, ceilings)
        rows.append(Row(work.name, name, name, work.grid, counted, None, reason=reason))
    return [*rows, mixture(rows, workload)]


def mixture(rows: Sequence[Row], workload: Workload, trials: Sequence[Trial] = ()) -> Row:
    """Expected values at the sampling shares.

    Of a mixture in which a dataset has not been measured, nothing is.
    """
    first, shares = rows[0], workload.mixing().schedule.shares
    weights = [shares[row.dataset] for row in rows]
    work = mean_of([row.work for row in rows], Work, weights)
    missing = [row for row in rows if row.seconds is None]
    if missing:
        alike = len({row.reason for row in rows}) == 1
        reason = first.reason if alike else f"without {', '.join(row.dataset for row in missing)}"
        return Row(MIXTURE, first.variant, first.dtype, None, work, None, reason=reason)
    seconds = mean_of([row.seconds for row in rows], StepSeconds, weights)
    rounds = zip(*([one.whole for one in trial.times] for trial in trials), strict=True)
    whole = [sum(weight * one for weight, one in zip(weights, each, strict=True)) for each in rounds]
    memory = max((row.memory for row in rows if row.memory is not None), default=None)
    steps = sum(row.steps for row in rows)
    return Row(MIXTURE, first.variant, first.dtype, None, work, seconds, spread(whole), steps, memory)


def _row(trial: Trial, workload: Workload, counts: Counts, ceilings: Ceilings, device: torch.device) -> Row:
    dtype = autocast_dtype(trial.recipe.train.precision, device)
    work = counts.work(trial.dataset, dtype, trial.recipe, ceilings)
    grid = workload.datasets[trial.dataset].grid
    if not trial.times:
        return Row(trial.dataset, trial.variant, DTYPES[dtype], grid, work, None, reason=trial.reason)
    noise = spread([one.whole for one in trial.times])
    seconds, steps = medians(trial.times), len(trial.times)
    return Row(trial.dataset, trial.variant, DTYPES[dtype], grid, work, seconds, noise, steps, trial.memory)
