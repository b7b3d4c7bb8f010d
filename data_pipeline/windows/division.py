"""Which process takes which windows of a training step: a pure function of schedule, step, rank and world size."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.schema import nearest
from data_pipeline.windows.schedule import Draw, Schedule

WAYS = ("global", "per_rank")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Windows of one draw that a process takes through the model at once."""

    draw: int  # index of the draw
    places: np.ndarray  # (b,) int64, ascending: places of the windows in the draw


def assign_by_cost(costs: list[int], batch: int, world_size: int) -> list[dict[int, np.ndarray]]:
    """Return for each process which windows of a step's draws it takes: {draw: places in it, ascending}.

    `costs` holds the cost of one window for each draw; every draw has `batch` windows. Windows go, longest first, to
    the process with the least to do (Graham's LPT rule, SIAM J. Appl. Math. 17, 1969): the last process ends at most
    4/3 - 1/(3 world_size) times later than the best assignment. Every process gets a window if there are enough.
    """
    loads = [(0, rank) for rank in range(world_size)]
    taken: list[dict[int, list[int]]] = [{} for _ in range(world_size)]
    for draw in sorted(range(len(costs)), key=lambda draw: (-costs[draw], draw)):
        for place in range(batch):
            load, rank = heapq.heappop(loads)
            taken[rank].setdefault(draw, []).append(place)
            heapq.heappush(loads, (load + costs[draw], rank))
    return [{draw: np.array(places) for draw, places in sorted(mine.items())} for mine in taken]


class Division:
    """The windows that one process takes in each step: a pure function of schedule, step, rank and world size.

    A step takes `draws` mini-batches, each of one dataset; together they are its global batch. Each window counts
    1 / (windows in the global batch) in the gradient, whichever process takes it. With way `global`, every process
    takes an equal, contiguous share of every draw, so all work on the same grid at the same time. With `per_rank`,
    windows are assigned by cost, so processes work on different datasets and end together.

    `micro_batch` is the most windows of a micro-batch; None: no limit. `model_calls(step, dataset)` is how often a
    window goes through the model, which multiplies its cost. Raises UserError where windows cannot be divided:
    `global` needs a draw that all processes share evenly, `per_rank` a window for every process.
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
            *others, last = [str(n) for n in range(1, schedule.batch + 1) if schedule.batch % n == 0]
            use = f"{', '.join(others)} or {last} processes" if others else "1 process"
            raise UserError(
                f"a global batch of {of} cannot be shared evenly by {world_size} processes: use {use}, "
                f"or a global batch that is a multiple of {world_size * draws}"
            )
        if windows < world_size:
            raise UserError(
                f"a global batch of {windows} windows leaves {world_size - windows} of {world_size} processes without "
                f"any: use at most {windows} processes, or a larger global batch"
            )

    def draws_of(self, step: int) -> list[Draw]:
        """Return the mini-batches of step `step`, over all processes."""
        return [self.schedule.draw(index) for index in range(step * self.draws, (step + 1) * self.draws)]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return what this process takes in step `step`, in the order in which it takes it."""
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
        """Most windows of the costliest dataset in one micro-batch.

        With `per_rank`, a micro-batch of a cheaper dataset may have more windows, but not more work.
        """
        share = -(-self.schedule.batch // self._world_size)
        return min(share, self._micro_batch or share)
