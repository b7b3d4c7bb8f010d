"""Who is best over many datasets, and whether two orders agree. Lower scores are better; None is worse than any number.

A score that is missing because a model diverged is None, so a model cannot rise in rank by failing.

From one stored file of errors to every score: any window, average or eps, without the model.

Array legend: R trajectories, S steps, C state channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from fm.evaluation.errors import FORMAT, PREDICTORS, DatasetErrors, ErrorFile, Errors
from fm.evaluation.protocol import Protocol, Window, check_same_rollouts

Scores = Sequence[float | None]


def mean_ranks(rows: Sequence[Scores]) -> list[float]:
    """Of each competitor (column), the mean over datasets (rows) of its rank, 1 the best; equal scores share theirs."""
    return [float(rank) for rank in np.mean([_ranks(row) for row in rows], axis=0)] if rows else []


def wins(rows: Sequence[Scores]) -> list[int]:
    """Of each competitor (column), on how many datasets (rows) its score is lower than all others."""
    columns = range(len(rows[0])) if rows else ()
    return [sum(row[column] is not None and _ranks(row)[column] == 1 for row in rows) for column in columns]


def spearman(ours: Scores, theirs: Scores) -> float | None:
    """Spearman's rank correlation of two lists of scores of the same things; None where either list has one rank only.

    From -1, the opposite order, to 1, the same. Equal scores share their mean rank.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"spearman: expected two lists of one length, got {len(ours)} and {len(theirs)}")
    first, second = _ranks(ours), _ranks(theirs)
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def _ranks(scores: Scores) -> list[float]:
    """1 for the lowest; equal scores share the mean of their places."""
    return [float(rank) for rank in rankdata([math.inf if score is None else score for score in scores])]


_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


def aggregate(values: np.ndarray, protocol: Protocol, statistic: str) -> float | None:
    """One number from VRMSE (R, S, C): `statistic` over trajectories, the protocol's choice for the rest.

    A prediction that was not finite enters as +inf: it raises a median and voids a mean, and is never left out.
    None where the number is not finite, or nothing is there to average.
    """
    if not values.size:
        return None
    frames = _STATISTICS[protocol.channels](values, axis=2)  # (R, S)
    if protocol.order == "per_step":
        value = _STATISTICS[protocol.steps](_STATISTICS[statistic](frames, axis=0))
    else:
        value = _STATISTICS[statistic](_STATISTICS[protocol.steps](frames, axis=1))
    return float(value) if np.isfinite(value) else None


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """exp of the mean log. None where a value is missing or not positive: a mean over the others would flatter."""
    positive = [value for value in values if value is not None and value > 0]
    if not positive or len(positive) < len(values):
        return None
    return math.exp(sum(math.log(value) for value in positive) / len(positive))


def score(errors: ErrorFile, protocol: Protocol | None = None) -> dict[str, Any]:
    """All scores as strict JSON (null for what is not finite or not there), under `protocol` or the file's own.

    `datasets.<name>` has `one_step` and `windows.<window>`, each with the model's `median` and `mean`, `persistence`
    and `mean_field` (by the protocol's statistic), `ratio_to_persistence`, the same under `per_channel`, `count` (of
    one-step windows, of trajectories that cover the whole window) and `diverged` (how many of them were not finite).
    A window that no trajectory covers whole is null, and so is `one_step` where only rollouts were measured.
    `datasets.<name>.diverged`: trajectory id -> first failed step.
    UserError where the protocol needs other rollouts than the file holds.
    """
    protocol = protocol or errors.protocol
    longest = max((int(part.rollout.steps.max(initial=0)) for part in errors.datasets.values()), default=0)
    check_same_rollouts(errors.protocol, protocol, longest)
    datasets = {name: _score_dataset(part, protocol) for name, part in sorted(errors.datasets.items())}
    windows = {
        window: geometric_mean(
            [(part["windows"][window] or {}).get("ratio_to_persistence") for part in datasets.values()]
        )
        for window in protocol.windows
    }
    return {
        "format": FORMAT,
        "origin": errors.origin,
        "protocol": protocol.to_json(),
        "datasets": datasets,
        "geometric_mean_ratio_to_persistence": geometric_mean(
            [(part["one_step"] or {}).get("ratio_to_persistence") for part in datasets.values()]
        ),
        "geometric_mean_ratio_to_persistence_windows": windows,
        "diverged": sum(len(part["diverged"]) for part in datasets.values()),
    }


def _score_dataset(errors: DatasetErrors, protocol: Protocol) -> dict[str, Any]:
    rollout = errors.rollout.until(protocol.max_steps)  # the file may reach further than the protocol looks
    failures = zip(errors.trajectories.tolist(), rollout.first_failures().tolist(), strict=True)
    windows = protocol.windows.items()
    return {
        "data_digest": errors.data_digest,
        "grid": list(errors.grid),
        "channels": list(errors.channels),
        "trajectories": len(errors.trajectories),
        "horizon": int(rollout.steps.max(initial=0)),
        "one_step": _score_one_step(errors, protocol),
        "windows": {name: _score_window(rollout, window, errors.channels, protocol) for name, window in windows},
        "diverged": {str(trajectory): step for trajectory, step in failures if step},
    }


def _score_one_step(errors: DatasetErrors, protocol: Protocol) -> dict[str, Any] | None:
    """Every window counts as one trajectory of one step; None where only rollouts were measured."""
    present = errors.one_step.present
    if not present.any():
        return None
    vrmse = {name: errors.one_step.vrmse(name, protocol.eps)[present][:, None] for name in PREDICTORS}  # (R*S, 1, C)
    return _columns(vrmse, errors.channels, protocol)


def _score_window(
    rollout: Errors, window: Window, channels: Sequence[str], protocol: Protocol
) -> dict[str, Any] | None:
    """Scores over the trajectories that cover the whole window; None where none does."""
    steps = window.steps(int(rollout.steps.max(initial=0)))
    if steps is None:
        return None
    first, last = steps
    covered = rollout.steps >= last
    vrmse = {name: rollout.vrmse(name, protocol.eps)[covered, first - 1 : last] for name in PREDICTORS}
    return {"first": first, "last": last, **_columns(vrmse, channels, protocol)}


def _columns(vrmse: Mapping[str, np.ndarray], channels: Sequence[str], protocol: Protocol) -> dict[str, Any]:
    """The scores of one block of frames, VRMSE (R, S, C) of each predictor: over all channels, then by channel."""
    return {
        **_averages(vrmse, protocol),
        "count": len(vrmse["model"]),
        "diverged": int(np.isinf(vrmse["model"]).any(axis=(1, 2)).sum()),
        "per_channel": {
            channel: _averages({name: values[..., index : index + 1] for name, values in vrmse.items()}, protocol)
            for index, channel in enumerate(channels)
        },
    }


def _averages(vrmse: Mapping[str, np.ndarray], protocol: Protocol) -> dict[str, float | None]:
    """Median and mean of the model, the protocol's statistic of the others, and model over persistence."""
    model = {statistic: aggregate(vrmse["model"], protocol, statistic) for statistic in ("median", "mean")}
    others = {name: aggregate(vrmse[name], protocol, protocol.trajectories) for name in PREDICTORS[1:]}
    ours, persistence = model[protocol.trajectories], others["persistence"]
    ratio = ours / persistence if ours is not None and persistence else None
    return {**model, **others, "ratio_to_persistence": ratio}
