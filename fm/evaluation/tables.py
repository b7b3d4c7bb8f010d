"""The tables of one evaluation: one step, rollout, summary.

Where predictions were not finite the cell says so and counts them.

How much of a score is eps: the same errors under two values of it.

eps is added to the target's variance, so it tells where a field is all but constant. active_matter's concentration is
1 +- 0.003, a variance of 9e-6: eps 1e-5 instead of 1e-7 lowers its VRMSE by almost a third.

Several evaluations side by side, all scored anew under one protocol.

Stored errors scored again, under another protocol or another eps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from data_pipeline.files import UserError, atomic_file
from data_pipeline.tables import Cell, Document, Marked, Table, format_number, render
from fm.evaluation.errors import ErrorFile, find_errors
from fm.evaluation.protocol import STATISTICS, Protocol, load_protocol
from fm.evaluation.scores import geometric_mean, mean_ranks, score, wins

COLUMNS = ("median", "mean", "persistence", "mean_field", "ratio_to_persistence")


def score_table(scores: Mapping[str, Any]) -> str:
    """Markdown of `scoring.score`'s result: the protocol, the one-step table, the rollout table, the summary.

    Without one-step scores there is no table of them.
    """
    return render(score_document(scores), "md")


def score_document(scores: Mapping[str, Any]) -> Document:
    """`scoring.score`'s result as tables, to be rendered in any format."""
    protocol = Protocol.from_json(scores["protocol"])
    lead = protocol.trajectories
    columns = ["median", "mean", "persistence", "mean field", f"{lead} / persistence"]
    measured = {name: part["one_step"] for name, part in scores["datasets"].items() if part["one_step"] is not None}
    one_step = [[name, cell["count"], *_cells(cell, lead)] for name, cell in measured.items()]
    rollout = [
        [name, window, window_steps(part["horizon"], cell), cell["count"] if cell else 0, *_cells(cell, lead)]
        for name, part in scores["datasets"].items()
        for window, cell in part["windows"].items()
    ]
    tables = [Table("Rollout", ["dataset", "window", "steps", "trajectories", *columns], rollout)]
    if one_step:
        tables.insert(0, Table("One step", ["dataset", "windows", *columns], one_step))
    return Document(about(protocol), tables, _summary(scores))


def about(protocol: Protocol) -> str:
    """The sentence that stands above every table."""
    return f"VRMSE, lower is better. {protocol.describe()}."


def marked(cell: Mapping[str, Any] | None, lead: str) -> Cell:
    """The protocol's own statistic, with the mark of a divergence; None where a window is not covered."""
    if cell is None:
        return None
    if not cell["diverged"]:
        value: float | None = cell[lead]
        return value
    return Marked(cell[lead], f"{cell['diverged']} of {cell['count']} diverged")


def window_steps(horizon: int, cell: Mapping[str, Any] | None) -> str:
    """Which steps a window is, or why there is no score."""
    return f"horizon is {horizon}" if cell is None else f"{cell['first']}-{cell['last']}"


def _cells(cell: Mapping[str, Any] | None, lead: str) -> Sequence[Cell]:
    """The columns of one row of the score table."""
    if cell is None:
        return [None] * len(COLUMNS)
    return [marked(cell, lead) if name == lead else cell[name] for name in COLUMNS]


def _summary(scores: Mapping[str, Any]) -> list[str]:
    means = dict(scores["geometric_mean_ratio_to_persistence_windows"])
    alone = [name for name, part in scores["datasets"].items() if part["one_step"] is None]
    if len(alone) < len(scores["datasets"]):
        means = {"one step": scores["geometric_mean_ratio_to_persistence"], **means}
    listed = ", ".join(f"{name} {format_number(value)}" for name, value in means.items())
    lines = [f"Geometric mean over datasets of the ratio to persistence: {listed}."]
    if alone:
        lines.append(f"Only rollouts were measured, no one-step predictions: {', '.join(alone)}.")
    if scores["origin"]:
        lines.append("Origin: " + ", ".join(f"{key} {value}" for key, value in scores["origin"].items()) + ".")
    for name, part in scores["datasets"].items():
        if part["diverged"]:
            failures = ", ".join(f"trajectory {key} at step {step}" for key, step in part["diverged"].items())
            lines.append(f"Diverged on {name}: {failures}.")
    return lines


def eps_effect(errors: ErrorFile, eps: tuple[float, float] = (1e-7, 1e-5)) -> Table:
    """The model's scores under both values and their ratio: over all channels, and of the channel that changes most."""
    first, second = (score(errors, replace(errors.protocol, eps=value))["datasets"] for value in eps)
    lead = errors.protocol.trajectories
    rows: list[list[Cell]] = []
    for name in first:
        cells = {"one step": (first[name]["one_step"], second[name]["one_step"])}
        cells |= {window: (cell, second[name]["windows"][window]) for window, cell in first[name]["windows"].items()}
        for block, (one, other) in cells.items():
            if one is not None:
                rows.append([name, block, "all", *_pair(one[lead], other[lead])])
                rows += [[name, block, channel, *pair] for channel, pair in _most_changed(one, other, lead).items()]
    title = "Effect of eps on the model's VRMSE"
    return Table(title, ["dataset", "scores", "channel", *(f"eps {value:g}" for value in eps), "ratio"], rows)


def _pair(first: float | None, second: float | None) -> tuple[float | None, float | None, float | None]:
    return first, second, second / first if first and second is not None else None


def _most_changed(
    one: Mapping[str, Any], other: Mapping[str, Any], lead: str
) -> dict[str, tuple[float | None, float | None, float | None]]:
    """The one channel whose ratio is farthest from 1, with its pair; empty where there is no ratio."""
    pairs = {name: _pair(cell[lead], other["per_channel"][name][lead]) for name, cell in one["per_channel"].items()}
    changes = {name: abs(math.log(ratio)) for name, (_, _, ratio) in pairs.items() if ratio}
    if not changes:
        return {}
    most = max(changes, key=lambda name: changes[name])
    return {most: pairs[most]}


ONE_STEP = "one step"
FIXED = ("dataset", "steps", "change", "persistence", "mean field")  # columns that no run may be named after

Scores: TypeAlias = Mapping[str, Mapping[str, Any]]  # label of a run -> what `scoring.score` gives


def load_scores(
    places: Sequence[Path],
    protocol: Protocol | None = None,
    statistic: str | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """By label, the scores of the evaluations at `places` (runs, report folders, error files) under one protocol.

    The protocol is the first file's by default, `statistic` replaces its own over trajectories, labels are the runs'
    names by default. UserError where a file does not hold what the protocol needs, or two hold different data of one
    dataset.
    """
    files = [find_errors(place) for place in places]
    names = _checked_labels(_default_labels(files) if labels is None else labels, len(files))
    loaded = [ErrorFile.load(file) for file in files]
    _check_same_data(files, loaded)
    protocol = protocol or loaded[0].protocol
    if statistic is not None:
        if statistic not in STATISTICS:
            raise UserError(f"statistic: expected one of {', '.join(STATISTICS)}, got {statistic!r}")
        protocol = replace(protocol, trajectories=statistic)
    found = {}
    for file, name, errors in zip(files, names, loaded, strict=True):
        try:
            found[name] = score(errors, protocol)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    return found


def compare_document(runs: Scores) -> Document:
    """One-step table, a table per window, and who is best over the datasets that all runs have.

    A window that a dataset does not cover has no score; one that is missing because a model diverged ranks last.
    """
    protocol = Protocol.from_json(next(iter(runs.values()))["protocol"])
    lead = protocol.trajectories
    blocks = [ONE_STEP, *protocol.windows]
    names = sorted({name for scores in runs.values() for name in scores["datasets"]})
    tables = [_block_table(runs, block, names, lead) for block in blocks]
    tables.append(_comparison(runs, blocks, names, lead))
    alone = [name for name in names if not all(name in scores["datasets"] for scores in runs.values())]
    notes = [f"Not in the summary, for not all runs have it: {', '.join(alone)}."] if alone else []
    return Document(about(protocol), tables, notes)


def _block_table(runs: Scores, block: str, names: Sequence[str], lead: str) -> Table:
    """A row for each dataset, a column for each run."""
    steps, change = ["steps"] if block != ONE_STEP else [], ["change"] if len(runs) == 2 else []
    rows = []
    for name in names:
        cells = [find_cell(scores, name, block) for scores in runs.values()]
        place = [_steps(runs, name, block)] if steps else []
        changes = [_change(cells[0], cells[1], lead)] if change else []
        there: Mapping[str, Any] = next((cell for cell in cells if cell is not None), {})
        others = [there.get("persistence"), there.get("mean_field")]
        rows.append([name, *place, *(marked(cell, lead) for cell in cells), *changes, *others])
    title = f"Rollout, {block}" if steps else "One step"
    return Table(title, ["dataset", *steps, *runs, *change, "persistence", "mean field"], rows, percents=change)


def _comparison(runs: Scores, blocks: Sequence[str], names: Sequence[str], lead: str) -> Table:
    """A row for each block and run: how many of its predictions diverged (of one step windows, else rollouts), mean
    rank and wins among the runs, and the ratio to persistence.
    """
    rows: list[list[Cell]] = []
    for block in blocks:
        found = [[find_cell(scores, name, block) for scores in runs.values()] for name in names]
        common = [[cell for cell in cells if cell is not None] for cells in found if None not in cells]
        values = [[cell[lead] for cell in cells] for cells in common]
        ranks, won = mean_ranks(values), wins(values)
        for index, label in enumerate(runs):
            ratio = geometric_mean([cells[index]["ratio_to_persistence"] for cells in common])
            rank: list[Cell] = [ranks[index], won[index]] if common else [None, None]
            diverged = sum(cells[index]["diverged"] for cells in common)
            rows.append([block, label, len(common), diverged, *(rank if len(runs) > 1 else []), ratio])
    ranks_and_wins = ["mean rank", "wins"] if len(runs) > 1 else []
    head = ["scores", "run", "datasets", "diverged", *ranks_and_wins, "geometric mean of the ratio to persistence"]
    return Table("Summary", head, rows)


def find_cell(scores: Mapping[str, Any], dataset: str, block: str) -> Mapping[str, Any] | None:
    """The scores of a dataset in one step or in a window; None where it is not there, or the window not covered."""
    part = scores["datasets"].get(dataset)
    if part is None:
        return None
    cell: Mapping[str, Any] | None = part["one_step"] if block == ONE_STEP else part["windows"][block]
    return cell


def _steps(runs: Scores, name: str, block: str) -> str:
    scores = next(scores for scores in runs.values() if name in scores["datasets"])  # the data are the same in all
    return window_steps(scores["datasets"][name]["horizon"], find_cell(scores, name, block))


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, lead: str) -> float | None:
    if before is None or after is None or not before[lead] or after[lead] is None:
        return None
    return float(after[lead] / before[lead] - 1)


def _default_labels(files: Sequence[Path]) -> list[str]:
    """The names of the runs; those of one name are numbered."""
    folders = [file.resolve().parent for file in files]
    names = [folder.parent.name if folder.name == "report" else folder.name for folder in folders]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 or name in FIXED else name
        for index, name in enumerate(names)
    ]


def _checked_labels(labels: Sequence[str], count: int) -> list[str]:
    if len(labels) != count or len({*labels, *FIXED}) < count + len(FIXED) or not all(labels):
        raise UserError(
            f"labels: expected {count}, each once and none of {', '.join(FIXED)}; got {', '.join(labels) or 'none'}"
        )
    return list(labels)


def _check_same_data(files: Sequence[Path], loaded: Sequence[ErrorFile]) -> None:
    first: dict[str, tuple[Path, str]] = {}
    for file, errors in zip(files, loaded, strict=True):
        for name, part in errors.datasets.items():
            other, digest = first.setdefault(name, (file, part.data_digest))
            if part.data_digest != digest:
                what, same = ("files", "--truth") if "prediction" in errors.origin else ("shards", "--shards")
                raise UserError(
                    f"compare: expected evaluations of the same {name} data, got {what} with digests {digest[:12]} in "
                    f"{other} and {part.data_digest[:12]} in {file}: evaluate both with the same {same}"
                )


TABLES = {"scores.csv": "csv", "scores.tex": "latex"}  # beside the scores.json and scores.md that a report has anyway


def rescore(measured: ErrorFile, protocol: str | None, eps: float | None) -> tuple[ErrorFile, dict[str, Any]]:
    """The same errors under a protocol (a name or a file, their own by default), and their scores.

    UserError where the protocol needs rollouts that were not measured.
    """
    wanted = measured.protocol if protocol is None else load_protocol(protocol)
    if eps is not None:
        if not 0 <= eps < math.inf:
            raise UserError(f"--eps: expected a number of at least 0, got {eps}")
        wanted = replace(wanted, eps=eps)
    scores = score(measured, wanted)
    return replace(measured, protocol=wanted), scores


def write_tables(out: Path, scores: Mapping[str, Any]) -> None:
    """The score tables for programs and for papers, under `out`."""
    document = score_document(scores)
    for name, form in TABLES.items():
        with atomic_file(out / name) as stream:
            stream.write(render(document, form).encode())
