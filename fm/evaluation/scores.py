"""Scores: every number that is made from stored errors, for any window, average or eps, without the model.

Lower scores are better. In a ranking, a model that diverged has the score inf and comes last, so a model cannot rise by
failing; a model that was not evaluated has the score None and is left out.

Array legend: R trajectories, S steps, C state channels.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from data_pipeline.errors import UserError
from data_pipeline.files import write_whole
from fm.evaluation.errors import BASELINES, FORMAT, PREDICTORS, DatasetErrors, ErrorFile, Errors, StencilChoice
from fm.evaluation.protocol import Protocol, check_same_rollouts

ONE_STEP = "one step"
RATIO_FLOOR = 0.01  # of ratios to persistence in a mean, so that a solved dataset does not outweigh the others
SCORES_FILE = "scores.json"
Row: TypeAlias = Sequence[float | None]  # scores of several competitors on one dataset; None: not evaluated
_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


@dataclass(frozen=True)
class Averages:
    """VRMSE over one set of frames; None for a number that is not finite, or where there is nothing to average."""

    median: float | None  # of the model
    mean: float | None  # of the model
    persistence: float | None  # by the protocol's statistic, as are the next three
    mean_field: float | None
    linear_stencil: float | None = field(default=None, kw_only=True)  # None too where there is no stencil
    ratio_to_persistence: float | None

    def vrmse(self, statistic: str) -> float | None:
        """Return the model's `median` or `mean`."""
        value: float | None = getattr(self, statistic)
        return value

    def best_baseline(self) -> float | None:
        """Return the lowest VRMSE of persistence, mean field and linear stencil; None if all are missing."""
        return min((value for name in BASELINES if (value := getattr(self, name)) is not None), default=None)


@dataclass(frozen=True)
class BlockScores(Averages):
    """Scores of the one-step windows or of one rollout window: over all channels, and by channel."""

    count: int  # one-step windows, or trajectories that cover the whole rollout window
    diverged: int  # how many of them are not finite
    per_channel: dict[str, Averages]


@dataclass(frozen=True)
class WindowSteps:
    """The 1-based first and last step of a window."""

    first: int
    last: int


@dataclass(frozen=True)
class WindowScores(BlockScores, WindowSteps):  # in this order, the steps come first in scores.json
    """Scores of one rollout window."""


@dataclass(frozen=True)
class DatasetScores:
    """Scores of one dataset."""

    data_digest: str  # of the manifest of the shards
    grid: tuple[int, int]  # (H, W)
    channels: tuple[str, ...]  # that are scored
    trajectories: int
    horizon: int  # steps of the longest rollout
    one_step: BlockScores | None  # None if only rollouts were measured
    windows: dict[str, WindowScores | None]  # by name; None if no trajectory covers the whole window
    diverged: dict[int, int]  # trajectory id -> first step that is not finite
    stencil: StencilChoice | None = None  # None: there is no linear stencil
    static: tuple[str, ...] = ()  # channels that never change, which are not scored

    def blocks(self) -> dict[str, BlockScores | None]:
        """Return the one-step scores, named ONE_STEP, and those of the windows."""
        return {ONE_STEP: self.one_step, **self.windows}


@dataclass(frozen=True)
class Scores:
    """All scores of one evaluation under one protocol; the content of scores.json."""

    format: int
    origin: dict[str, Any]  # whose errors they are
    protocol: Annotated[Protocol, BeforeValidator(Protocol.from_json)]
    datasets: dict[str, DatasetScores]
    geometric_mean_ratio_to_persistence: float | None  # over the datasets, one step
    geometric_mean_ratio_to_persistence_windows: dict[str, float | None]  # by rollout window
    diverged: int  # rollouts that are not finite, of all datasets

    @property
    def statistic(self) -> str:
        """The protocol's statistic over trajectories."""
        return self.protocol.trajectories

    def block(self, dataset: str, name: str) -> BlockScores | None:
        """Return the scores of a dataset in one step or a window; None if they are missing or it is not covered."""
        return self.datasets[dataset].blocks()[name] if dataset in self.datasets else None

    def mean_ratios(self) -> dict[str, float | None]:
        """Return the geometric means of the ratio to persistence by block, one step only if it was measured."""
        one_step = any(part.one_step is not None for part in self.datasets.values())
        first = {ONE_STEP: self.geometric_mean_ratio_to_persistence} if one_step else {}
        return {**first, **self.geometric_mean_ratio_to_persistence_windows}

    def stencil_ratios(self) -> dict[str, float | None]:
        """Return the geometric means of the linear stencil's VRMSE over persistence's by block, as `mean_ratios`."""
        ratios = {}
        for name in self.mean_ratios():
            blocks = [part.blocks()[name] for part in self.datasets.values()]
            pairs = [(block.linear_stencil, block.persistence) if block else (None, None) for block in blocks]
            ratios[name] = mean_ratio([ours / held if ours is not None and held else None for ours, held in pairs])
        return ratios

    def to_json(self) -> dict[str, Any]:
        """Return the scores as strict JSON."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the scores, whole or not at all."""
        write_whole(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def from_json(cls, content: bytes | str, where: str) -> "Scores":
        """Return the scores in the text of a scores.json; UserError, naming `where` it is from, for anything else."""
        try:
            return _ADAPTER.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            problem = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
            raise UserError(f"{where}: not a report's scores.json ({problem}); remove it and evaluate again") from error

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read a scores.json; UserError if it is missing or damaged."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"no scores at {path} ({error.strerror}); make them with `fm evaluate RUN`") from error
        return cls.from_json(content, str(path))


_ADAPTER = TypeAdapter(Scores)


def score(errors: ErrorFile, protocol: Protocol | None = None) -> Scores:
    """Return all scores of stored errors under `protocol`, or under the protocol that they were measured with."""
    protocol = protocol or errors.protocol
    longest = max((int(part.rollout.steps.max(initial=0)) for part in errors.datasets.values()), default=0)
    check_same_rollouts(errors.protocol, protocol, longest)
    protocol = dataclasses.replace(protocol, context=errors.protocol.context or 1)
    datasets = {name: _score_dataset(part, protocol) for name, part in sorted(errors.datasets.items())}
    ratios = {}
    for name in (ONE_STEP, *protocol.windows):
        blocks = [part.blocks()[name] for part in datasets.values()]
        ratios[name] = mean_ratio([block.ratio_to_persistence if block else None for block in blocks])
    return Scores(
        format=FORMAT,
        origin=errors.origin,
        protocol=protocol,
        datasets=datasets,
        geometric_mean_ratio_to_persistence=ratios.pop(ONE_STEP),
        geometric_mean_ratio_to_persistence_windows=ratios,
        diverged=sum(len(part.diverged) for part in datasets.values()),
    )


def _score_dataset(errors: DatasetErrors, protocol: Protocol) -> DatasetScores:
    rollout = errors.rollout.until(protocol.max_steps)  # the file may hold more steps than the protocol scores
    failures = zip(errors.trajectories.tolist(), rollout.first_failures().tolist(), strict=True)
    moving = _moving_channels(errors)
    channels = {name: index for index, name in enumerate(errors.channels) if moving[index]}
    return DatasetScores(
        data_digest=errors.data_digest,
        grid=errors.grid,
        channels=tuple(channels),
        trajectories=len(errors.trajectories),
        horizon=int(rollout.steps.max(initial=0)),
        one_step=_score_one_step(errors, channels, protocol),
        windows={name: _score_window(rollout, name, channels, protocol) for name in protocol.windows},
        diverged={trajectory: step for trajectory, step in failures if step},
        stencil=errors.stencil,
        static=tuple(name for name in errors.channels if name not in channels),
    )


def _moving_channels(errors: DatasetErrors) -> np.ndarray:
    """Return which channels change in time, (C,) bool; all, where none does.

    Persistence is exact on a static channel, such as a permeability map that is stored as a state. A model is nearly
    exact on it, so it would make every mean over channels look better.
    """
    parts = (errors.one_step.persistence, errors.rollout.persistence)
    moving = np.any([np.nan_to_num(part).any(axis=(0, 1)) for part in parts], axis=0)
    return moving if moving.any() else np.ones_like(moving)


def _score_one_step(errors: DatasetErrors, channels: Mapping[str, int], protocol: Protocol) -> BlockScores | None:
    """Every one-step window counts as one trajectory of one step."""
    present = errors.one_step.present
    if not present.any():
        return None
    vrmse = {name: errors.one_step.vrmse(name, protocol.eps)[present][:, None] for name in PREDICTORS}  # (R*S, 1, C)
    return BlockScores(**_score_block(vrmse, channels, protocol))


def _score_window(rollout: Errors, window: str, channels: Mapping[str, int], protocol: Protocol) -> WindowScores | None:
    """Scores over the trajectories that cover the whole window, perhaps cut; None if there are none."""
    steps = protocol.covered(window, rollout.steps.tolist())
    if steps is None:
        return None
    first, last = steps
    covered = rollout.steps >= last
    vrmse = {name: rollout.vrmse(name, protocol.eps)[covered, first - 1 : last] for name in PREDICTORS}
    return WindowScores(first=first, last=last, **_score_block(vrmse, channels, protocol))


def _score_block(vrmse: Mapping[str, np.ndarray], channels: Mapping[str, int], protocol: Protocol) -> dict[str, Any]:
    """The fields of BlockScores, from the VRMSE (R, S, C) of each predictor; channels: name -> place, if scored."""
    per_channel = {
        channel: _average({name: values[..., index : index + 1] for name, values in vrmse.items()}, protocol)
        for channel, index in channels.items()
    }
    diverged = int(np.isinf(vrmse["model"]).any(axis=(1, 2)).sum())
    scored = {name: values[..., list(channels.values())] for name, values in vrmse.items()}
    return {
        **vars(_average(scored, protocol)),
        "count": len(vrmse["model"]),
        "diverged": diverged,
        "per_channel": per_channel,
    }


def _average(vrmse: Mapping[str, np.ndarray], protocol: Protocol) -> Averages:
    model = {statistic: aggregate(vrmse["model"], protocol, statistic) for statistic in ("median", "mean")}
    others = {name: aggregate(vrmse[name], protocol, protocol.trajectories) for name in BASELINES}
    ours, persistence = model[protocol.trajectories], others["persistence"]
    ratio = ours / persistence if ours is not None and persistence else None
    return Averages(**model, **others, ratio_to_persistence=ratio)


def aggregate(values: np.ndarray, protocol: Protocol, statistic: str) -> float | None:
    """Return one number from VRMSE (R, S, C): `statistic` over trajectories, the protocol's choice for the rest.

    A prediction that was not finite is +inf here. It raises a median and makes a mean infinite, and is never left out.
    None if the number is not finite or there is nothing to average.
    """
    if not values.size:
        return None
    frames = _STATISTICS[protocol.channels](values, axis=2)  # (R, S)
    if protocol.order == "per_step":
        value = _STATISTICS[protocol.steps](_STATISTICS[statistic](frames, axis=0))
    else:
        value = _STATISTICS[statistic](_STATISTICS[protocol.steps](frames, axis=1))
    return float(value) if np.isfinite(value) else None


def geometric_mean(values: Row) -> float | None:
    """Return exp of the mean log; None if a value is missing or not positive, since the others' mean would flatter."""
    positive = [value for value in values if value is not None and value > 0]
    if not positive or len(positive) < len(values):
        return None
    return math.exp(sum(math.log(value) for value in positive) / len(positive))


def mean_ratio(ratios: Row) -> float | None:
    """Return the geometric mean of datasets' ratios to persistence, each at least RATIO_FLOOR; None as above."""
    return geometric_mean([None if ratio is None else max(ratio, RATIO_FLOOR) for ratio in ratios])


def mean_ranks(rows: Sequence[Row]) -> list[float | None]:
    """Return for each competitor (column) its mean rank over the datasets (rows) where it was evaluated.

    1 is the best, and equal scores share. A dataset counts where two were evaluated; None for who was in no such.
    """
    columns = zip(*(_ranks(row) for row in rows if _compares(row)), strict=True)
    ranks = [[rank for rank in column if not math.isnan(rank)] for column in columns]
    return [sum(one) / len(one) if one else None for one in ranks] or [None] * len(rows[0] if rows else [])


def wins(rows: Sequence[Row]) -> list[int]:
    """Return for each competitor (column) on how many datasets (rows) its score is lower than all others."""
    first = [(row, _ranks(row)) for row in rows if _compares(row)]
    columns = range(len(rows[0]) if rows else 0)
    return [sum(ranks[column] == 1 and row[column] != math.inf for row, ranks in first) for column in columns]


def spearman(ours: Row, theirs: Row) -> float | None:
    """Return Spearman's rank correlation, from -1 to 1, over the pairs without None; None if a list is all equal."""
    pairs = [pair for pair in zip(ours, theirs, strict=True) if None not in pair]
    first, second = (list(values) for values in zip(*pairs, strict=True)) if pairs else ([], [])
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr  # here, since scipy.stats takes a second to import, as below

    return float(spearmanr(_ranks(first), _ranks(second)).statistic)


def _compares(row: Row) -> bool:
    return sum(score is not None for score in row) > 1


def _ranks(scores: Row) -> list[float]:
    """1 for the lowest; equal scores share the mean of their places, and None has the place NaN."""
    from scipy.stats import rankdata

    ranks = iter(rankdata([score for score in scores if score is not None]))
    return [math.nan if score is None else float(next(ranks)) for score in scores]
