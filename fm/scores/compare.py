"""Several evaluations side by side, all scored anew under one protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from data_pipeline.errors import UserError
from fm.scores.errors import ErrorFile, find_errors
from fm.scores.formats import Cell, Document, Table
from fm.scores.protocol import STATISTICS, Protocol
from fm.scores.ranks import mean_ranks, wins
from fm.scores.scoring import geometric_mean, score
from fm.scores.tables import about, marked, window_steps

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
    tables.append(_summary(runs, blocks, names, lead))
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


def _summary(runs: Scores, blocks: Sequence[str], names: Sequence[str], lead: str) -> Table:
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
