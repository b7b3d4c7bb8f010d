"""Sampling shares that follow the validation scores (future work of the paper, section 3.5).

    share_i  in proportion to  base_i * score_i ** power,  and at least `floor`

The base are the sqrt shares. The score of a dataset is its one-step validation VRMSE over that of persistence, a number
without units that can be compared between datasets: the further from solved, the more often drawn. Only ratios of
scores matter. They are not smoothed over validations: they come from averaged weights and the same windows each time,
so they move slowly by themselves.

Which windows are trained on, and when: a pure function of the seed and the draw's index.

A draw is one mini-batch of one dataset (paper section 3.5). Nothing is stored or replayed: to resume, ask for the next
index. Nothing depends on the number of ranks or workers: they slice the global batch that the draw names.

Which dataset: draws come in blocks of 256. Block b places the points (k + u_b) / 256, k = 0..255, on the unit interval
that the shares divide (systematic sampling; u_b is a hash), so every block holds each dataset within one of 256 times
its share. The points of a block are then shuffled. How often a dataset was drawn before any index is a sum of closed
forms over blocks.

Shares may change: a schedule is a sequence of segments, each with its first draw and its shares, and the blocks of a
segment begin at its first draw. The schedule is then a function of the seed and of this history as well.

Which windows: the draws of one dataset read an endless stream of passes, and each pass is a permutation of all its
windows, sorted by hash (data_pipeline/files.py), which no library's version and no platform can move.

How the windows of a step are divided among processes.

A step takes `draws` mini-batches from the schedule, each of one dataset; together they are its global batch. What they
hold does not depend on the processes, only who takes which windows does:

    global    every process takes an equal, contiguous share of every draw: all work on the same grid at the same time
    per_rank  windows go, longest first, to the process with the least to do (Graham's LPT rule, SIAM J. Appl. Math. 17,
              1969), so processes work on different datasets and end together

Either way each window counts 1 / (windows in the global batch) in the gradient.
"""

import copy
import hashlib
import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.files import UserError
from data_pipeline.hashing import splitmix64, stream_key, uniform
from data_pipeline.schema import nearest


def adaptive_shares(
    base: Mapping[str, float], scores: Mapping[str, float], power: float, floor: float
) -> dict[str, float]:
    """The share of each dataset of `base`; they sum to 1 and none is below `floor`.

    A dataset without a score counts as the geometric mean of those with one. Power 0 gives the base, floored.
    Raises UserError if the floor leaves nothing to share.
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
    return _floored({name: math.exp(value - highest) for name, value in logs.items()}, floor)


def _floored(mass: Mapping[str, float], floor: float) -> dict[str, float]:
    """Shares in proportion to `mass`, those below `floor` raised to it at the cost of all others alike."""
    raised: set[str] = set()
    while True:
        left = 1 - floor * len(raised)
        total = math.fsum(value for name, value in mass.items() if name not in raised)
        shares = {name: floor if name in raised else left * value / total for name, value in mass.items()}
        low = {name for name, share in shares.items() if share < floor}
        if not low:
            return shares
        raised |= low  # the others shrink, which may take one more of them below the floor


def carry_scores(
    previous: Mapping[str, float], latest: Mapping[str, float | None]
) -> tuple[dict[str, float], list[str]]:
    """The scores to go by, and the names in `latest` whose score is missing or not a finite number above 0.

    The previous score of such a dataset stands, if it has one.
    """
    usable = {name: score for name, score in latest.items() if score is not None and 0 < score < math.inf}
    return {**previous, **usable}, sorted(latest.keys() - usable.keys())


BLOCK = 256  # draws per block of the dataset sequence
SCHEMES = ("sqrt", "uniform", "proportional", "temperature", "weights", "adaptive")
SHUFFLES = ("global", "blocks")


@dataclass(frozen=True)
class Source:
    """What the schedule knows of one dataset."""

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


@dataclass(frozen=True, eq=False)
class Draw:
    """One global mini-batch."""

    index: int
    dataset: str
    windows: np.ndarray  # (batch,) int64, window ids; ranks take contiguous slices

    def digest(self) -> str:
        """16 hex digits of dataset and window ids, the same on every machine."""
        content = self.dataset.encode() + b"\0" + self.windows.astype("<i8").tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()


def sampling_shares(
    sources: Sequence[Source], scheme: str, temperature: float = 0.2, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Probability of each dataset, by name in sorted order; sums to 1 (paper section 3.5 and Table 8).

    With pi the share of tokens (windows * tokens per window): `proportional` is pi, `uniform` the same for all, `sqrt`
    in proportion to the root of pi, `temperature` softmax(pi / temperature), `weights` in proportion to `weights`.
    `adaptive` starts as `sqrt`; its later shares are data_pipeline/windows/schedule.py's.
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


class _Segment:
    """Which dataset each draw is of, from draw `first` on, by one set of shares.

    `shares` has a share for each dataset in sorted order; `before` (n,) counts the draws of each before `first`.
    """

    def __init__(self, first: int, shares: Mapping[str, float], before: np.ndarray, seed: int) -> None:
        self.first, self.shares, self.before = first, dict(shares), before
        cumulative = np.cumsum(list(self.shares.values()))
        self._edges = cumulative / cumulative[-1] * BLOCK  # the last edge is exactly 256: every point has a dataset
        place = (first,) if first else ()
        self._offset_key = stream_key("offset", seed, *place)
        self._order_key = stream_key("order", seed, *place)
        self._cached_block: tuple[int, np.ndarray, np.ndarray] | None = None

    def counts(self, index: int) -> np.ndarray:
        """How often each dataset is drawn by all draws before `index`, (n,) int64."""
        block, place = divmod(index - self.first, BLOCK)
        before, order = self._block(block)
        return before + np.bincount(order[:place], minlength=len(before))

    def dataset(self, index: int) -> int:
        """The number of the dataset that draw `index` is of."""
        block, place = divmod(index - self.first, BLOCK)
        return int(self._block(block)[1][place])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws of each dataset before the block (n,), and the block's datasets in drawing order (256,)."""
        if self._cached_block is None or self._cached_block[0] != block:
            offsets = uniform(self._offset_key, np.arange(block + 1, dtype=np.uint64))
            below = np.array([self._points_below(edge, offsets[:-1]).sum() for edge in self._edges], dtype=np.int64)
            inside = np.array([self._points_below(edge, offsets[-1:])[0] for edge in self._edges], dtype=np.int64)
            datasets = np.repeat(np.arange(len(inside)), np.diff(inside, prepend=0))
            order_key = splitmix64(self._order_key, np.array([block], dtype=np.uint64))[0]
            datasets = datasets[np.argsort(splitmix64(order_key, np.arange(BLOCK, dtype=np.uint64)))]
            self._cached_block = (block, self.before + np.diff(below, prepend=0), datasets)
        return self._cached_block[1:]

    @staticmethod
    def _points_below(edge: float, offsets: np.ndarray) -> np.ndarray:
        """For each block, how many of its points k + u, k = 0..255, lie below `edge` (0..256)."""
        return np.clip(np.ceil(edge - offsets), 0, BLOCK).astype(np.int64)


class Schedule:
    """Draws by index.

    The answers depend on the arguments and the history of shares alone: not on the order in which sources are listed,
    nor on what was asked before. What is cached (a block of 256 datasets per segment, one permutation per dataset) only
    saves time.

    Args:
        sources: the datasets of the run.
        batch: windows per draw, over all ranks together.
        seed: any integer.
        scheme, temperature, weights: see `sampling_shares`.
        shuffle: "global" permutes all windows of a dataset; "blocks" permutes the shards, then the windows within
            each block of `shards_per_block` shards, so that a reader needs few shards at a time.
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

    @property
    def shares(self) -> dict[str, float]:
        """The share of each dataset from the last segment's first draw on."""
        return dict(self._segments[-1].shares)

    def shares_at(self, index: int) -> dict[str, float]:
        """The share of each dataset at draw `index`."""
        return dict(self._segment(index).shares)

    @property
    def history(self) -> list[list[Any]]:
        """All segments as JSON: [first draw, {dataset: share}] each."""
        return [[segment.first, dict(segment.shares)] for segment in self._segments]

    def with_shares(self, index: int, shares: Mapping[str, float]) -> "Schedule":
        """This schedule up to draw `index`, and from there on these shares, which sum to 1.

        A segment that begins at `index` itself is replaced. Draws of a dataset go on in its stream of passes, so each
        window is used once before any is used twice, across segments too.
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
        changed = copy.copy(self)
        changed._segments = (*kept, _Segment(index, {name: shares[name] for name in names}, before, self._seed))
        changed._cached_passes = dict(self._cached_passes)
        return changed

    def with_history(self, history: Sequence[Sequence[Any]]) -> "Schedule":
        """This schedule with the segments of `history`, as another one gave it. ValueError where it does not fit."""
        if not history or history[0][0] != 0:
            raise ValueError("expected a history of shares that begins at draw 0")
        schedule = copy.copy(self)
        schedule._segments = self._segments[:1]  # which the first one replaces
        for first, shares in history:
            schedule = schedule.with_shares(first, shares)
        return schedule

    def draw(self, index: int) -> Draw:
        """The mini-batch number `index`, from 0."""
        segment = self._segment(index)
        number = segment.dataset(index)
        source = self.sources[number]
        positions = int(segment.counts(index)[number]) * self.batch + np.arange(self.batch, dtype=np.int64)
        return Draw(index, source.name, self._windows(source, positions))

    def source(self, index: int) -> Source:
        """The dataset that draw `index` is of."""
        return self.sources[self._segment(index).dataset(index)]

    def counts(self, index: int) -> dict[str, int]:
        """How often each dataset is drawn by the draws before `index`."""
        totals = self._segment(index).counts(index)
        return {source.name: int(total) for source, total in zip(self.sources, totals, strict=True)}

    def passes(self, index: int) -> dict[str, float]:
        """How often the draws before `index` went through each dataset; 1.0 is every window once."""
        counts = self.counts(index)
        return {source.name: counts[source.name] * self.batch / source.windows for source in self.sources}

    def copy(self) -> "Schedule":
        """The same schedule with tables of its own, for another reader of another place in it."""
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied are the arguments, not megabytes of cached permutations."""
        return {**self.__dict__, "_cached_passes": {}}

    def _segment(self, index: int) -> _Segment:
        """The segment that draw `index` belongs to."""
        if index < 0:
            raise ValueError(f"draws are numbered from 0, got {index}")
        return self._segments[bisect_right(self._segments, index, key=lambda segment: segment.first) - 1]

    def _windows(self, source: Source, positions: np.ndarray) -> np.ndarray:
        """Window ids at `positions` (batch,) of the endless stream of passes."""
        passes, places = np.divmod(positions, source.windows)
        windows = np.empty_like(positions)
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            here = passes == number
            windows[here] = self._permutation(source, number)[places[here]]
        return windows

    def _permutation(self, source: Source, number: int) -> np.ndarray:
        """The order of windows in pass `number` of a dataset, (windows,) int64."""
        cached = self._cached_passes.get(source.name)
        if cached is None or cached[0] != number:
            hashes = splitmix64(
                stream_key("windows", self._seed, source.name, number), np.arange(source.windows, dtype=np.uint64)
            )
            if self._shards_per_block is None:
                order = np.argsort(hashes)
            else:
                order = np.lexsort((hashes, np.repeat(self._shard_blocks(source, number), source.shard_windows)))
            cached = self._cached_passes[source.name] = (number, order)
        return cached[1]

    def _shard_blocks(self, source: Source, number: int) -> np.ndarray:
        """The block in which each shard is read in pass `number`, (shards,)."""
        assert self._shards_per_block is not None
        shards = np.arange(len(source.shard_windows), dtype=np.uint64)
        order = np.argsort(splitmix64(stream_key("shards", self._seed, source.name, number), shards))
        blocks = np.empty(len(shards), dtype=np.int64)
        blocks[order] = np.arange(len(shards)) // self._shards_per_block
        return blocks


WAYS = ("global", "per_rank")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Windows of one draw that a process takes through the model at once."""

    draw: int  # index of the draw
    places: np.ndarray  # (b,) int64, ascending: places of the windows in the draw's mini-batch


class Division:
    """What one process takes of each step: a pure function of the schedule, the step, the rank and the world size.

    `micro_batch` is the most windows of a piece; None means as many as there are. `model_calls(step, dataset)` is how
    often a window goes through the model, which multiplies its cost. Raises UserError where the windows
    cannot be divided: `global` needs a draw that all processes share evenly, `per_rank` a window for every process.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int = 0,
        world_size: int = 1,
        draws: int = 1,
        way: str = "global",
        micro_batch: int | None = None,
        model_calls: Callable[[int, str], int] = lambda step, dataset: 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if way not in WAYS:
            raise UserError(f"sampling.draw: no way {way!r} to divide draws. {nearest(way, WAYS)}")
        self.schedule, self.draws, self._rank, self._world_size = schedule, draws, rank, world_size
        self._way, self._micro_batch, self._model_calls = way, micro_batch, model_calls
        windows = schedule.batch * draws
        if way == "global" and schedule.batch % world_size:
            of = f"{windows} windows" if draws == 1 else f"{windows} windows in {draws} draws"
            divisors = [str(n) for n in range(1, schedule.batch + 1) if schedule.batch % n == 0]
            raise UserError(
                f"a global batch of {of} cannot be shared evenly by {world_size} processes: use {_either(divisors)}, "
                f"or a global batch that is a multiple of {world_size * draws}"
            )
        if windows < world_size:
            raise UserError(
                f"a global batch of {windows} windows leaves {world_size - windows} of {world_size} processes without "
                f"any: use at most {windows} processes, or a larger global batch"
            )

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What this process takes of step `step`, in the order in which it takes it."""
        batch, first = self.schedule.batch, step * self.draws
        if self._way == "global":
            share = batch // self._world_size
            mine = {index: np.arange(self._rank * share, (self._rank + 1) * share) for index in range(self.draws)}
        else:
            sources = [self.schedule.source(first + index) for index in range(self.draws)]
            costs = [source.tokens * self._model_calls(step, source.name) for source in sources]
            mine = assign_by_cost(costs, batch, self._world_size)[self._rank]
        return [
            MicroBatch(first + index, places[at : at + size])
            for index, places in mine.items()
            for size in [self._micro_batch or len(places)]
            for at in range(0, len(places), size)
        ]

    @property
    def largest_micro_batch(self) -> int:
        """Most windows of the costliest dataset that a process takes through the model at once.

        Of cheaper ones it may take more with `per_rank`, but not more work.
        """
        share = -(-self.schedule.batch // self._world_size)
        return min(share, self._micro_batch or share)

    def draws_of(self, step: int) -> list[Draw]:
        """The mini-batches of step `step`, over all processes."""
        return [self.schedule.draw(index) for index in range(step * self.draws, (step + 1) * self.draws)]

    def all_micro_batches(self, start: int, stop: int) -> Iterator[MicroBatch]:
        """The pieces of steps start, start + 1, ... stop - 1, one after the other."""
        for step in range(start, stop):
            yield from self.micro_batches(step)


def assign_by_cost(costs: list[int], batch: int, world_size: int) -> list[dict[int, np.ndarray]]:
    """Who takes which windows of a step's draws, by the LPT rule: for each process {draw: places in it, ascending}.

    `costs` holds one window's cost for each draw; every draw has `batch` windows. With at least one window a process,
    none is left without. The longest process ends at most 4/3 - 1/(3 world_size) times later than is possible.
    """
    loads = [(0, rank) for rank in range(world_size)]
    taken: list[dict[int, list[int]]] = [{} for _ in range(world_size)]
    for draw in sorted(range(len(costs)), key=lambda draw: (-costs[draw], draw)):
        for place in range(batch):
            load, rank = heapq.heappop(loads)
            taken[rank].setdefault(draw, []).append(place)
            heapq.heappush(loads, (load + costs[draw], rank))
    return [{draw: np.array(places) for draw, places in sorted(mine.items())} for mine in taken]


def _either(divisors: list[str]) -> str:
    if divisors == ["1"]:
        return "1 process"
    return f"{', '.join(divisors[:-1])} or {divisors[-1]} processes"
