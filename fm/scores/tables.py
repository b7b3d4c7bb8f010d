"""Scores as tables that read the same in a terminal and in Markdown.

A number that does not exist is a dash; where predictions were not finite the cell says so and counts them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import UserError
from fm.scores.protocol import Protocol

DASH = "-"


def score_table(scores: Mapping[str, Any]) -> str:
    """Markdown of `scoring.score`'s result: the protocol, the one-step table, the rollout table, the summary."""
    protocol = Protocol.from_json(scores["protocol"])
    lead = protocol.trajectories
    one_step = [
        [name, str(part["one_step"]["count"]), *_cells(part["one_step"], lead)]
        for name, part in scores["datasets"].items()
    ]
    rollout = [
        [name, *_window_place(part["horizon"], window, cell), *_cells(cell, lead)]
        for name, part in scores["datasets"].items()
        for window, cell in part["windows"].items()
    ]
    columns = ["median", "mean", "persistence", "mean field", f"{lead} / persistence"]
    parts = [
        f"VRMSE, lower is better. {protocol.describe()}.",
        "### One step\n\n" + markdown(["dataset", "windows", *columns], one_step),
        "### Rollout\n\n" + markdown(["dataset", "window", "steps", "trajectories", *columns], rollout),
        "\n".join(f"- {line}" for line in _summary(scores)),
    ]
    return "\n\n".join(parts) + "\n"


def compare_table(
    before: Mapping[str, Any], after: Mapping[str, Any], labels: tuple[str, str] = ("pretrained", "finetuned")
) -> str:
    """Markdown of two evaluations side by side, over the datasets both have, with a summary below.

    UserError where their protocols or their test data differ: the numbers would not be comparable.
    """
    _check_comparable(before, after)
    protocol = Protocol.from_json(before["protocol"])
    lead = protocol.trajectories
    both = [name for name in before["datasets"] if name in after["datasets"]]
    pairs = [(name, before["datasets"][name], after["datasets"][name]) for name in both]
    one_step = [(old["one_step"], new["one_step"]) for _, old, new in pairs]
    rollout = {w: [(old["windows"][w], new["windows"][w]) for _, old, new in pairs] for w in protocol.windows}
    one_step_rows = [[name, *_comparison(*cells, lead)] for (name, *_), cells in zip(pairs, one_step, strict=True)]
    rollout_rows = [
        [name, *_window_place(old["horizon"], window, cells[row][0])[:2], *_comparison(*cells[row], lead)]
        for row, (name, old, _) in enumerate(pairs)
        for window, cells in rollout.items()
    ]
    columns = [*labels, "change", "persistence", "mean field"]
    blocks = {"one step": one_step, **rollout}
    summary = [f"{what}: {labels[1]} lower on {_lower(cells, lead)}" for what, cells in blocks.items()]
    parts = [
        f"VRMSE, lower is better. {protocol.describe()}.",
        "### One step\n\n" + markdown(["dataset", *columns], one_step_rows),
        "### Rollout\n\n" + markdown(["dataset", "window", "steps", *columns], rollout_rows),
        "\n".join(f"- {line}" for line in [*summary, _ratio_changes(before, after)]),
    ]
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to equal widths: the first column to the left, the others to the right."""
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def number(value: float | None) -> str:
    """Four decimals up to 100, three digits beyond; a dash for None."""
    if value is None:
        return DASH
    return f"{value:.4f}" if value < 100 else f"{value:.3g}"


def _cells(cell: Mapping[str, Any] | None, lead: str) -> list[str]:
    """The columns of one row of the score table."""
    if cell is None:
        return [DASH] * 5
    names = ("median", "mean", "persistence", "mean_field", "ratio_to_persistence")
    return [_marked(cell, name) if name == lead else number(cell[name]) for name in names]


def _window_place(horizon: int, window: str, cell: Mapping[str, Any] | None) -> list[str]:
    if cell is None:
        return [window, f"horizon is {horizon}", "0"]
    return [window, f"{cell['first']}-{cell['last']}", str(cell["count"])]


def _summary(scores: Mapping[str, Any]) -> list[str]:
    lines = [
        "Geometric mean over datasets of the ratio to persistence: "
        f"one step {number(scores['geometric_mean_ratio_to_persistence'])}"
        + "".join(f", {name} {number(v)}" for name, v in scores["geometric_mean_ratio_to_persistence_windows"].items())
        + "."
    ]
    if scores["origin"]:
        lines.append("Origin: " + ", ".join(f"{key} {value}" for key, value in scores["origin"].items()) + ".")
    for name, part in scores["datasets"].items():
        if part["diverged"]:
            failures = ", ".join(f"trajectory {key} at step {step}" for key, step in part["diverged"].items())
            lines.append(f"Diverged on {name}: {failures}.")
    return lines


def _marked(cell: Mapping[str, Any], lead: str) -> str:
    """The protocol's own statistic, with the mark of a divergence."""
    if not cell["diverged"]:
        return number(cell[lead])
    mark = f"{cell['diverged']} of {cell['count']} diverged"
    return mark if cell[lead] is None else f"{number(cell[lead])} ({mark})"


def _comparison(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, lead: str) -> list[str]:
    if before is None or after is None:
        return [DASH] * 5
    change = _change(before[lead], after[lead])
    return [
        _marked(before, lead),
        _marked(after, lead),
        change,
        number(after["persistence"]),
        number(after["mean_field"]),
    ]


def _change(before: float | None, after: float | None) -> str:
    return f"{100 * (after / before - 1):+.0f}%" if before and after is not None else DASH


def _check_comparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    first, second = (Protocol.from_json(scores["protocol"]) for scores in (before, after))
    if first != second:
        raise UserError(
            "compare: expected two evaluations under one protocol, got "
            f"{first.describe()!r} and {second.describe()!r}: evaluate both with the same --protocol, --split and "
            "--windows"
        )
    for name in before["datasets"].keys() & after["datasets"].keys():
        old, new = (scores["datasets"][name]["data_digest"] for scores in (before, after))
        if old != new:
            raise UserError(
                f"compare: expected two evaluations of the same {name} data, got shards with digests {old[:12]} and "
                f"{new[:12]}: evaluate both with the same --shards"
            )


def _lower(pairs: Sequence[tuple[Any, Any]], lead: str) -> str:
    """On how many datasets the second score is lower, of those where both evaluations cover the window.

    A score that is missing because the model diverged counts as the higher one.
    """
    both = [(a[lead], b[lead]) for a, b in pairs if a is not None and b is not None]
    lower = sum(after is not None and (before is None or after < before) for before, after in both)
    return f"{lower} of {len(both)} datasets"


def _ratio_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    key = "geometric_mean_ratio_to_persistence"
    ratios = {"one step": (before[key], after[key])}
    ratios |= {name: (old, after[f"{key}_windows"][name]) for name, old in before[f"{key}_windows"].items()}
    text = ", ".join(f"{name} {number(old)} -> {number(new)}" for name, (old, new) in ratios.items())
    return f"geometric mean over datasets of the ratio to persistence: {text}"
