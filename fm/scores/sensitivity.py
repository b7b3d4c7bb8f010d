"""How much of a score is eps: the same errors under two values of it.

eps is added to the target's variance, so it tells where a field is all but constant. active_matter's concentration is
1 +- 0.003, a variance of 9e-6: eps 1e-5 instead of 1e-7 lowers its VRMSE by almost a third.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fm.scores.errors import ErrorFile
from fm.scores.formats import Cell, Table
from fm.scores.scoring import score


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
