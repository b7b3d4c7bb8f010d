"""Tables of scores: of one evaluation, and of several side by side.

A cell of a model with predictions that are not finite has a mark that counts them.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from data_pipeline.errors import UserError
from data_pipeline.tables import Cell, Document, Marked, Table, format_number, render
from fm.evaluation.errors import BASELINES, ErrorFile, find_errors
from fm.evaluation.protocol import STATISTICS, Protocol
from fm.evaluation.scores import ONE_STEP, BlockScores, Scores, WindowScores, mean_ranks, mean_ratio, score, wins

BASELINE_HEADS = tuple(name.replace("_", " ") for name in BASELINES)
FIXED_COLUMNS = ("dataset", "steps", "change", *BASELINE_HEADS)  # no run may have such a label
STENCIL_TEXT = (
    "Linear stencil: ridge regression of the next frame on 5 x 5 points of the last frames, fitted to the train split; "
    "frames and ridge strength are those with the lowest error on the valid split."
)
Runs: TypeAlias = Mapping[str, Scores]  # by label


def score_table(scores: Scores) -> str:
    """Return the tables of one evaluation as Markdown."""
    return render(score_document(scores), "md")


def score_document(scores: Scores) -> Document:
    """Return the one-step table, if one step was measured, the rollout table and a summary."""
    statistic = scores.statistic
    columns = ["median", "mean", *BASELINE_HEADS, f"{statistic} / persistence"]
    one_step: list[list[Cell]] = []
    rollout: list[list[Cell]] = []
    for name, part in scores.datasets.items():
        if part.one_step is not None:
            one_step.append([name, part.one_step.count, *_columns(part.one_step, statistic)])
        for window, block in part.windows.items():
            steps, count = window_steps(block), block.count if block else 0
            rollout.append([name, window, steps, count, *_columns(block, statistic)])
    tables = [Table("One step", ["dataset", "windows", *columns], one_step)] if one_step else []
    tables.append(Table("Rollout", ["dataset", "window", "steps", "trajectories", *columns], rollout))
    return Document(about(scores.protocol), tables, _summary(scores))


def about(protocol: Protocol) -> str:
    """Return the sentence above every table of scores."""
    return f"VRMSE, lower is better. {protocol.describe()}."


def vrmse_cell(block: BlockScores | None, statistic: str) -> Cell:
    """Return the model's VRMSE, marked if predictions are not finite; None for a window that is not covered."""
    if block is None:
        return None
    value = block.vrmse(statistic)
    return Marked(value, f"{block.diverged} of {block.count} diverged") if block.diverged else value


def window_steps(block: WindowScores | None) -> str:
    """Return the steps of a window, or why it has no score; `short_windows` says more."""
    return "too short" if block is None else f"{block.first}-{block.last}"


def short_windows(runs: Iterable[Scores]) -> list[str]:
    """Return which windows are longer than some trajectories of a dataset, and what was scored instead."""
    notes: dict[str, None] = {}  # each once: the data are the same in all runs
    for scores in runs:
        for name, part in scores.datasets.items():
            for window, block in part.windows.items():
                place, wanted = f"{name}, {window}", scores.protocol.windows[window]
                if block is None:
                    which = "shortest" if scores.protocol.short == "cut" else "longest"
                    notes[f"{place}: not scored, the {which} trajectory is too short."] = None
                elif not wanted.parts and block.last < wanted.last:
                    notes[f"{place}: cut to steps {block.first}-{block.last}, the shortest trajectory's end."] = None
                if block is not None and block.count < part.trajectories:
                    left_out = f"{part.trajectories - block.count} of {part.trajectories} trajectories"
                    notes[f"{place}: {left_out} are left out, they end before step {block.last}."] = None
    return list(notes)


def _columns(block: BlockScores | None, statistic: str) -> list[Cell]:
    if block is None:
        return [None] * (len(BASELINES) + 3)
    model = [vrmse_cell(block, name) if name == statistic else block.vrmse(name) for name in ("median", "mean")]
    return [*model, *(getattr(block, name) for name in BASELINES), block.ratio_to_persistence]


def _summary(scores: Scores) -> list[str]:
    ratios = ", ".join(f"{name} {format_number(value)}" for name, value in scores.mean_ratios().items())
    lines = [f"Geometric mean over datasets of the ratio to persistence: {ratios}."]
    if any(part.stencil is not None for part in scores.datasets.values()):
        ratios = ", ".join(f"{name} {format_number(value)}" for name, value in scores.stencil_ratios().items())
        lines += [f"The same mean for the linear stencil: {ratios}.", *stencil_notes(scores)]
    lines += short_windows([scores])
    rollouts_only = [name for name, part in scores.datasets.items() if part.one_step is None]
    if rollouts_only:
        lines.append(f"Only rollouts were measured, no one-step predictions: {', '.join(rollouts_only)}.")
    lines += static_notes([scores])
    if scores.origin:
        lines.append("Origin: " + ", ".join(f"{key} {value}" for key, value in scores.origin.items()) + ".")
    for name, part in scores.datasets.items():
        if part.diverged:
            lines.append(f"Diverged on {name}: {failures(part.diverged)}.")
    return lines


def stencil_notes(scores: Scores) -> list[str]:
    """Return how the linear stencils were fitted, and what was chosen for each dataset; empty if there are none."""
    chosen = [f"{name} {part.stencil.describe()}" for name, part in scores.datasets.items() if part.stencil is not None]
    return [f"{STENCIL_TEXT} Frames, ridge (one step / rollouts): {'; '.join(chosen)}."] if chosen else []


def static_notes(runs: Iterable[Scores]) -> list[str]:
    """Return which channels are not scored, since they never change; empty if there are none."""
    found = {name: part.static for scores in runs for name, part in scores.datasets.items() if part.static}
    listed = "; ".join(f"{', '.join(channels)} of {name}" for name, channels in found.items())
    return [f"Not scored, for they never change in time: {listed}."] if found else []


def failures(diverged: Mapping[int, int]) -> str:
    """Return the trajectories that diverged and their first steps that are not finite, in words."""
    return ", ".join(f"trajectory {trajectory} at step {step}" for trajectory, step in diverged.items())


def load_runs(
    places: Sequence[Path],
    protocol: Protocol | None = None,
    statistic: str | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Scores]:
    """Return by label the scores of evaluations (runs, report folders, error files), all under one protocol.

    The protocol is the first file's by default, `statistic` replaces its own over trajectories, and the labels are the
    names of the runs by default. Where models have different contexts, which also begin their rollouts at different
    frames, the labels name them. UserError if a file does not hold what the protocol needs, or if two files hold
    different data of one dataset.
    """
    files = [find_errors(place) for place in places]
    names = _default_labels(files) if labels is None else list(labels)
    if len(names) != len(files) or len({*names, *FIXED_COLUMNS}) < len(files) + len(FIXED_COLUMNS) or not all(names):
        raise UserError(
            f"labels: expected {len(files)}, each once and none of {', '.join(FIXED_COLUMNS)}; got "
            f"{', '.join(names) or 'none'}"
        )
    loaded = [ErrorFile.load(file) for file in files]
    _check_same_data(files, loaded)
    contexts = [errors.protocol.context or 1 for errors in loaded]
    if len(set(contexts)) > 1:
        names = [f"{name} ({n} frame{'s' if n > 1 else ''})" for name, n in zip(names, contexts, strict=True)]
    protocol = protocol or replace(loaded[0].protocol, context=None)
    if statistic is not None:
        if statistic not in STATISTICS:
            raise UserError(f"statistic: expected one of {', '.join(STATISTICS)}, got {statistic!r}")
        protocol = replace(protocol, trajectories=statistic)
    runs = {}
    for file, name, errors in zip(files, names, loaded, strict=True):
        try:
            runs[name] = score(errors, protocol)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    return runs


def _default_labels(files: Sequence[Path]) -> list[str]:
    """The names of the runs, numbered if several have one name."""
    folders = [Path(os.path.abspath(file)).parent for file in files]  # as typed, even where they are links
    names = [folder.parent.name if folder.name == "report" else folder.name for folder in folders]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 or name in FIXED_COLUMNS else name
        for index, name in enumerate(names)
    ]


def _check_same_data(files: Sequence[Path], loaded: Sequence[ErrorFile]) -> None:
    first: dict[str, tuple[Path, str]] = {}
    for file, errors in zip(files, loaded, strict=True):
        for name, part in errors.datasets.items():
            other, digest = first.setdefault(name, (file, part.data_digest))
            if part.data_digest != digest:
                what, option = ("files", "truth") if "prediction" in errors.origin else ("shards", "shards")
                raise UserError(
                    f"compare: expected evaluations of the same {name} data, got {what} with digests {digest[:12]} in "
                    f"{other} and {part.data_digest[:12]} in {file}: evaluate both with the same "
                    f"`fm evaluate --{option}`"
                )


def compare_document(runs: Runs) -> Document:
    """Return a one-step table, a table for each window, and a summary.

    A window that a dataset does not cover has no score. In the ranks, a model that diverged comes last, and one that
    was not evaluated on a dataset is left out. Geometric means are over the datasets that all runs have.
    """
    protocol = next(iter(runs.values())).protocol
    if any(scores.protocol.context != protocol.context for scores in runs.values()):
        protocol = replace(protocol, context=None)  # the labels name them
    blocks = [ONE_STEP, *protocol.windows]
    names = sorted({name for scores in runs.values() for name in scores.datasets})
    tables = [_block_table(runs, block, names, protocol.trajectories) for block in blocks]
    tables.append(_comparison(runs, blocks, names, protocol.trajectories))
    alone = [name for name in names if not all(name in scores.datasets for scores in runs.values())]
    notes = [f"Only in mean ranks and wins of the summary, not all runs have it: {', '.join(alone)}."] if alone else []
    notes += short_windows(runs.values())
    notes += static_notes(runs.values())
    stencils = {name: part for scores in runs.values() for name, part in scores.datasets.items() if part.stencil}
    notes += stencil_notes(replace(next(iter(runs.values())), datasets=dict(sorted(stencils.items()))))
    return Document(about(protocol), tables, notes)


def _block_table(runs: Runs, block: str, names: Sequence[str], statistic: str) -> Table:
    """A row for each dataset, a column for each run; of two runs also the change from the first to the second."""
    change = ["change"] if len(runs) == 2 else []
    rows: list[list[Cell]] = []
    for name in names:
        cells = [scores.block(name, block) for scores in runs.values()]
        row: list[Cell] = [name]
        if block != ONE_STEP:
            part = next(scores.datasets[name] for scores in runs.values() if name in scores.datasets)
            row.append(window_steps(part.windows[block]))  # the data are the same in all runs
        row += [vrmse_cell(cell, statistic) for cell in cells]
        if change:
            before, after = (cell.vrmse(statistic) if cell else None for cell in cells)
            row.append(after / before - 1 if before and after is not None else None)
        for baseline in BASELINES:  # equal in all runs, but older evaluations have no linear stencil
            known = (getattr(cell, baseline) for cell in cells if cell is not None)
            row.append(next((value for value in known if value is not None), None))
        rows.append(row)
    title, steps = ("One step", []) if block == ONE_STEP else (f"Rollout, {block}", ["steps"])
    return Table(title, ["dataset", *steps, *runs, *change, *BASELINE_HEADS], rows, percents=change)


def _comparison(runs: Runs, blocks: Sequence[str], names: Sequence[str], statistic: str) -> Table:
    """A row for each block and run: how many diverged, mean rank, wins, and the ratio to persistence."""
    rows: list[list[Cell]] = []
    for block in blocks:
        found = [[scores.block(name, block) for scores in runs.values()] for name in names]
        common = [[cell for cell in cells if cell is not None] for cells in found if None not in cells]
        values = [[_for_ranks(cell, statistic) for cell in cells] for cells in found]
        ranks, won = mean_ranks(values), wins(values)
        for index, label in enumerate(runs):
            rank: list[Cell] = []
            if len(runs) > 1:
                rank = [ranks[index], None if ranks[index] is None else won[index]]
            ratio = mean_ratio([cells[index].ratio_to_persistence for cells in common])
            diverged = sum(cells[index].diverged for cells in common)
            rows.append([block, label, len(common), diverged, *rank, ratio])
    ranks_and_wins = ["mean rank", "wins"] if len(runs) > 1 else []
    head = ["scores", "run", "datasets", "diverged", *ranks_and_wins, "geometric mean of the ratio to persistence"]
    return Table("Summary", head, rows)


def _for_ranks(block: BlockScores | None, statistic: str) -> float | None:
    """Return a score as `mean_ranks` takes it: inf where the model diverged, None where it was not evaluated."""
    value = block.vrmse(statistic) if block else None
    return math.inf if block and value is None else value
