"""Which windows each step trains on.

A draw is one global mini-batch of windows of one dataset (paper, Appendix F). This file answers three questions:

1. How often is each dataset drawn? `sampling_shares`, and `adaptive_shares` after each validation.
2. Which dataset does a draw use? `draws_per_block` and `shuffled_block`.
3. Which windows does a draw hold? `window_order`. `Schedule` puts 1 to 3 together.

Every answer is a pure function of the seed, the number of the draw and the history of the shares, with SplitMix64
hashes as random numbers (hashing.py). So a resumed run needs the step number alone.
"""

import copy
import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.hashing import splitmix64, stream_key, uniform
from data_pipeline.schema import nearest

BLOCK = 256  # draws in a block of the sequence of datasets
SCHEMES = ("sqrt", "uniform", "proportional", "temperature", "weights", "adaptive")
SHUFFLES = ("global", "blocks")


@dataclass(frozen=True)
class Source:
    """The sizes of one dataset that the schedule depends on."""

    name: str
    windows: int  # training examples
    tokens: int  # per window: H * W / 4
    shard_windows: tuple[int, ...]  # windows in each shard; window ids count through the shards in order

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise UserError(
                f"dataset {self.name!r}: expected at least one window, got {self.windows}. Its trajectories are "
                "shorter than a window; shorten the window, or leave the dataset out."
            )
        if sum(self.shard_windows) != self.windows:
            raise ValueError(f"{self.name}: {self.windows} windows, but its shards hold {sum(self.shard_windows)}")


def sampling_shares(
    sources: Sequence[Source], scheme: str, temperature: float = 0.2, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the probability of each dataset, by name in sorted order; they sum to 1 (paper, Appendix F and Table 8).

    With pi_i the dataset's part of all tokens (windows * tokens per window), the share is in proportion to
    `uniform`: 1; `proportional`: pi_i; `sqrt`: sqrt(pi_i); `temperature`: exp(pi_i / temperature); `weights`: the given
    weight. `adaptive` starts as `sqrt`; `adaptive_shares` then changes it.
    Raises UserError for an unknown scheme, a temperature not above 0, or weights that do not fit the datasets.
    """
    sources = sorted(sources, key=lambda source: source.name)
    total = sum(source.windows * source.tokens for source in sources)
    pi = [source.windows * source.tokens / total for source in sources]
    if scheme == "uniform":
        mass = [1.0] * len(sources)
    elif scheme == "proportional":
        mass = pi
    elif scheme in ("sqrt", "adaptive"):
        mass = [math.sqrt(share) for share in pi]
    elif scheme == "temperature":
        if not temperature > 0:
            raise UserError(f"sampling.temperature: expected a number above 0, got {temperature}.")
        mass = [math.exp((share - max(pi)) / temperature) for share in pi]
    elif scheme == "weights":
        mass = _checked_weights([source.name for source in sources], weights or {})
    else:
        raise UserError(f"sampling.scheme: no scheme {scheme!r}. {nearest(scheme, SCHEMES)}")
    return {source.name: value / math.fsum(mass) for source, value in zip(sources, mass, strict=True)}


def _checked_weights(names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    for name in weights:
        if name not in names:
            raise UserError(f"sampling.weights: no dataset {name!r} in this run. {nearest(name, names)}")
    missing = [name for name in names if name not in weights]
    if missing:
        raise UserError(f"sampling.weights: expected a weight for every dataset, none for {', '.join(missing)}.")
    values = [float(weights[name]) for name in names]
    if not all(0 <= value < math.inf for value in values) or sum(values) <= 0:
        raise UserError(f"sampling.weights: expected numbers from 0 up, one of them above 0, got {dict(weights)}.")
    return values


def adaptive_shares(
    base: Mapping[str, float], scores: Mapping[str, float], power: float, floor: float
) -> dict[str, float]:
    """Return shares in proportion to base_i * score_i ** power, none of them below `floor`; they sum to 1.

    Adaptive sampling is future work of the paper (section 4.2). `base` are the sqrt shares. A score is the one-step
    validation VRMSE of a dataset over the VRMSE of persistence, so a dataset that is far from solved is drawn more
    often. Scores are not smoothed: they come from averaged weights on the same windows each time. A dataset without a
    score gets the geometric mean of the others' scores. Raises UserError if the floor leaves nothing to share.
    """
    if not 0 <= floor * len(base) < 1:
        raise UserError(
            f"sampling.floor: expected less than 1 / {len(base)} = {1 / len(base):.4g}, since each of {len(base)} "
            f"datasets gets at least that share; got {floor}."
        )
    known = {name: math.log(scores[name]) for name in base if name in scores}
    mean = math.fsum(known.values()) / len(known) if known else 0.0
    logs = {name: math.log(share) + power * (known.get(name, mean) - mean) for name, share in base.items()}
    highest = max(logs.values())
    mass = {name: math.exp(value - highest) for name, value in logs.items()}
    raised: set[str] = set()  # datasets at the floor
    while True:
        left = 1 - floor * len(raised)
        total = math.fsum(value for name, value in mass.items() if name not in raised)
        shares = {name: floor if name in raised else left * value / total for name, value in mass.items()}
        low = {name for name, share in shares.items() if share < floor}
        if not low:
            return shares
        raised |= low  # the other shares shrink, which may take one more of them below the floor


def carry_scores(
    previous: Mapping[str, float], latest: Mapping[str, float | None]
) -> tuple[dict[str, float], list[str]]:
    """Return the scores for `adaptive_shares`, and the datasets whose latest score cannot be used.

    A score can be used if it is a finite number above 0; otherwise the previous score stays, if there is one.
    """
    usable = {name: score for name, score in latest.items() if score is not None and 0 < score < math.inf}
    return {**previous, **usable}, sorted(latest.keys() - usable.keys())


def draws_per_block(edges: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return how many draws of each block are of each dataset: (n,) edges, (blocks,) offsets -> (blocks, n) int64.

    Systematic sampling: the shares divide the interval [0, 256) at `edges`, and block b places the points k + u_b,
    k = 0..255, on it, where u_b in [0, 1) is its offset. So the draws of a dataset in each block differ from 256 times
    its share by less than one, and their sum over blocks needs no loop over draws.
    """
    below = np.clip(np.ceil(edges - offsets[:, None]), 0, BLOCK).astype(np.int64)  # points below each edge
    return np.diff(below, axis=1, prepend=0)


def shuffled_block(counts: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return the datasets of a block's draws in drawing order: (n,) draws of each dataset -> (256,) numbers."""
    datasets = np.repeat(np.arange(len(counts)), counts)
    return datasets[np.argsort(splitmix64(key, np.arange(BLOCK, dtype=np.uint64)))]


def window_order(source: Source, seed: int, number: int, shards_per_block: int | None) -> np.ndarray:
    """Return the order of all windows of a dataset in its pass `number`, (windows,) int64.

    Windows are sorted by hash. With `shards_per_block`, shards are sorted by hash first, and windows by hash within
    each block of that many shards, so that a reader needs few shards at a time.
    """
    hashes = splitmix64(stream_key("windows", seed, source.name, number), np.arange(source.windows, dtype=np.uint64))
    if shards_per_block is None:
        return np.argsort(hashes)
    shards = np.arange(len(source.shard_windows))
    shard_hashes = splitmix64(stream_key("shards", seed, source.name, number), shards.astype(np.uint64))
    block_of_shard = np.empty_like(shards)
    block_of_shard[np.argsort(shard_hashes)] = shards // shards_per_block
    return np.lexsort((hashes, np.repeat(block_of_shard, source.shard_windows)))


@dataclass(frozen=True, eq=False)
class Draw:
    """One global mini-batch."""

    index: int
    dataset: str
    windows: np.ndarray  # (batch,) int64, window ids

    def digest(self) -> str:
        """Return 16 hex digits of dataset and window ids, the same on every machine."""
        content = self.dataset.encode() + b"\0" + self.windows.astype("<i8").tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()


class _Segment:
    """The sequence of datasets from draw `first` on, under one set of shares; its blocks begin at `first`.

    `shares` has a share for each dataset in sorted order. `before` (n,) counts the draws of each before `first`.
    """

    def __init__(self, first: int, shares: Mapping[str, float], before: np.ndarray, seed: int) -> None:
        self.first, self.shares, self.before = first, dict(shares), before
        cumulative = np.cumsum(list(self.shares.values()))
        self._edges = cumulative / cumulative[-1] * BLOCK  # the last edge is exactly 256: every point has a dataset
        place = (first,) if first else ()
        self._offset_key, self._order_key = stream_key("offset", seed, *place), stream_key("order", seed, *place)
        self._cached: tuple[int, np.ndarray, np.ndarray] = (-1, before, before)

    def counts(self, index: int) -> np.ndarray:
        """Return how often each dataset is drawn by all draws before `index`, (n,) int64."""
        block, place = divmod(index - self.first, BLOCK)
        before, order = self._block(block)
        return before + np.bincount(order[:place], minlength=len(before))

    def dataset(self, index: int) -> int:
        """Return the number of the dataset of draw `index`."""
        block, place = divmod(index - self.first, BLOCK)
        return int(self._block(block)[1][place])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the draws of each dataset before the block (n,), and the block's datasets in drawing order (256,)."""
        cached = self._cached
        if cached[0] != block:
            offsets = uniform(self._offset_key, np.arange(block + 1, dtype=np.uint64))
            counts = draws_per_block(self._edges, offsets)
            key = splitmix64(self._order_key, np.array([block], dtype=np.uint64))[0]
            cached = (block, self.before + counts[:-1].sum(axis=0), shuffled_block(counts[-1], key))
            self._cached = cached
        return cached[1:]


class Schedule:
    """All draws, by their index.

    The draws of one dataset read an endless stream of passes over its windows: every window is used once before any is
    used twice. The shares may change: a schedule is a sequence of segments, each with its first draw and its shares.
    The result depends on the arguments and this history alone, neither on the order in which sources are listed nor on
    earlier calls.

    `batch` is the windows of a draw, over all ranks together; see `sampling_shares` for scheme, temperature and
    weights, and `window_order` for `shards_per_block`, which counts for the shuffle "blocks".
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch: int,
        seed: int,
        scheme: str = "sqrt",
        temperature: float = 0.2,
        weights: Mapping[str, float] | None = None,
        shuffle: str = "global",
        shards_per_block: int = 4,
    ) -> None:
        self.sources = tuple(sorted(sources, key=lambda source: source.name))
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise UserError(f"data.datasets: expected at least one dataset, each once, got {names or 'none'}.")
        if batch < 1 or shards_per_block < 1:
            raise UserError(f"expected batch and shards_per_block of at least 1, got {batch} and {shards_per_block}.")
        if shuffle not in SHUFFLES:
            raise UserError(f"sampling.shuffle: no shuffle {shuffle!r}. {nearest(shuffle, SHUFFLES)}")
        self.batch = batch
        self._seed = int(seed)
        self._shards_per_block = shards_per_block if shuffle == "blocks" else None
        shares = sampling_shares(self.sources, scheme, temperature, weights)
        self._segments: tuple[_Segment, ...] = (_Segment(0, shares, np.zeros(len(names), np.int64), self._seed),)
        self._cached_passes: dict[str, tuple[int, np.ndarray]] = {}  # dataset -> number of the pass, its permutation

    def draw(self, index: int) -> Draw:
        """Return mini-batch number `index`, counted from 0."""
        segment = self._segment(index)
        number = segment.dataset(index)
        source = self.sources[number]
        positions = int(segment.counts(index)[number]) * self.batch + np.arange(self.batch, dtype=np.int64)
        passes, places = np.divmod(positions, source.windows)
        windows = np.empty_like(positions)
        for this_pass in range(int(passes[0]), int(passes[-1]) + 1):
            inside = passes == this_pass
            windows[inside] = self._window_order(source, this_pass)[places[inside]]
        return Draw(index, source.name, windows)

    def _window_order(self, source: Source, number: int) -> np.ndarray:
        cached = self._cached_passes.get(source.name)
        if cached is None or cached[0] != number:
            cached = (number, window_order(source, self._seed, number, self._shards_per_block))
            self._cached_passes[source.name] = cached
        return cached[1]

    def source(self, index: int) -> Source:
        """Return the dataset of draw `index`."""
        return self.sources[self._segment(index).dataset(index)]

    def counts(self, index: int) -> dict[str, int]:
        """Return how often each dataset is drawn by the draws before `index`."""
        totals = self._segment(index).counts(index)
        return {source.name: int(total) for source, total in zip(self.sources, totals, strict=True)}

    def passes(self, index: int) -> dict[str, float]:
        """Return how often the draws before `index` went through each dataset; 1.0 is every window once."""
        counts = self.counts(index)
        return {source.name: counts[source.name] * self.batch / source.windows for source in self.sources}

    @property
    def shares(self) -> dict[str, float]:
        """The share of each dataset from the last segment's first draw on."""
        return dict(self._segments[-1].shares)

    def shares_at(self, index: int) -> dict[str, float]:
        """Return the share of each dataset at draw `index`."""
        return dict(self._segment(index).shares)

    def _segment(self, index: int) -> _Segment:
        if index < 0:
            raise ValueError(f"draws are numbered from 0, got {index}")
        return self._segments[bisect_right(self._segments, index, key=lambda segment: segment.first) - 1]

    @property
    def history(self) -> list[list[Any]]:
        """All segments as JSON: [first draw, {dataset: share}] each."""
        return [[segment.first, dict(segment.shares)] for segment in self._segments]

    def with_history(self, history: Sequence[Sequence[Any]]) -> "Schedule":
        """Return this schedule with the segments of another one's `history`. ValueError where it does not fit."""
        if not history or history[0][0] != 0:
            raise ValueError("expected a history of shares that begins at draw 0")
        schedule = self.copy()
        schedule._segments = self._segments[:1]  # the first entry of the history replaces it
        for first, shares in history:
            schedule = schedule.with_shares(first, shares)
        return schedule

    def with_shares(self, index: int, shares: Mapping[str, float]) -> "Schedule":
        """Return this schedule with other shares from draw `index` on; they sum to 1.

        A segment that begins at `index` itself is replaced. Draws of a dataset continue its stream of passes, so every
        window is used once before any is used twice across segments, too.
        Raises ValueError if `index` lies before the last segment or the shares are not one for each dataset.
        """
        names = [source.name for source in self.sources]
        if index < self._segments[-1].first:
            raise ValueError(f"shares from draw {index} on, but those from draw {self._segments[-1].first} on are set")
        if sorted(shares) != names or not all(0 <= share <= 1 for share in shares.values()):
            raise ValueError(f"expected a share in [0, 1] for each of {', '.join(names)}, got {dict(shares)}")
        if abs(math.fsum(shares.values()) - 1) > 1e-9:
            raise ValueError(f"expected shares that sum to 1, got {math.fsum(shares.values())}")
        kept = tuple(segment for segment in self._segments if segment.first < index)
        before = kept[-1].counts(index) if kept else np.zeros(len(names), np.int64)
        changed = self.copy()
        changed._cached_passes = dict(self._cached_passes)
        changed._segments = (*kept, _Segment(index, {name: shares[name] for name in names}, before, self._seed))
        return changed

    def copy(self) -> "Schedule":
        """Return the same schedule with a cache of its own, for a reader at another place in it."""
        copied = copy.copy(self)
        copied._cached_passes = {}
        return copied
