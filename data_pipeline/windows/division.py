"""How the windows of a step are divided among processes.

A step takes `draws` mini-batches from the schedule, each of one dataset; together they are its global batch. What they
hold does not depend on the processes, only who takes which windows does:

    global    every process takes an equal, contiguous share of every draw: all work on the same grid at the same time
    per_rank  windows go, longest first, to the process with the least to do (Graham's LPT rule, SIAM J. Appl. Math. 17,
              1969), so processes work on different datasets and end together

Either way each window counts 1 / (windows in the global batch) in the gradient.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.strict_yaml import nearest
from data_pipeline.windows.schedule import Draw, Schedule

WAYS = ("global", "per_rank")


@dataclass(frozen=True, eq=False)
class Piece:
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

    def pieces(self, step: int) -> list[Piece]:
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
            Piece(first + index, places[at : at + size])
            for index, places in mine.items()
            for size in [self._micro_batch or len(places)]
            for at in range(0, len(places), size)
        ]

    @property
    def largest_piece(self) -> int:
        """Most windows of the costliest dataset that a process takes through the model at once.

        Of cheaper ones it may take more with `per_rank`, but not more work.
        """
        share = -(-self.schedule.batch // self._world_size)
        return min(share, self._micro_batch or share)

    def draws_of(self, step: int) -> list[Draw]:
        """The mini-batches of step `step`, over all processes."""
        return [self.schedule.draw(index) for index in range(step * self.draws, (step + 1) * self.draws)]

    def all_pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The pieces of steps start, start + 1, ... stop - 1, one after the other."""
        for step in range(start, stop):
            yield from self.pieces(step)


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
