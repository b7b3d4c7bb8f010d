"""The tables of one evaluation: one step, rollout, summary.

Where predictions were not finite the cell says so and counts them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fm.scores.formats import Cell, Document, Marked, Table, number, render
from fm.scores.protocol import Protocol

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
    listed = ", ".join(f"{name} {number(value)}" for name, value in means.items())
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
