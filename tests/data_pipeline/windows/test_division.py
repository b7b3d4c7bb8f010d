"""Who takes which windows: each exactly once, whatever the world size, and shared out by cost or evenly."""

from collections import Counter

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.windows.division import Division, assign_by_cost
from data_pipeline.windows.schedule import Schedule, Source


def schedule(batch: int) -> Schedule:
    sizes = {"gray_scott": 4_096, "maze": 16_384, "staircase": 65_536}
    sources = [Source(name, 1000, tokens, (1000,)) for name, tokens in sizes.items()]
    return Schedule(sources, batch=batch, seed=1, scheme="uniform")


def load(division: Division, step: int) -> int:
    return sum(
        len(piece.places) * division.schedule.source(piece.draw).tokens for piece in division.micro_batches(step)
    )


@pytest.mark.parametrize("way", ["global", "per_rank"])
@pytest.mark.parametrize("micro_batch", [None, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 4, 12])
def test_every_window_of_a_step_is_taken_once(way: str, micro_batch: int | None, world_size: int) -> None:
    plan = schedule(batch=12)
    divisions = [Division(plan, rank, world_size, 3, way, micro_batch) for rank in range(world_size)]
    for step in range(40):
        pieces = [piece for division in divisions for piece in division.micro_batches(step)]
        taken = Counter((piece.draw, place) for piece in pieces for place in piece.places.tolist())
        assert taken == Counter({(draw, place): 1 for draw in range(3 * step, 3 * step + 3) for place in range(12)})
        assert max(len(piece.places) for piece in pieces) <= (micro_batch or 12)
        assert all(division.micro_batches(step) for division in divisions)
        assert all((np.diff(piece.places) > 0).all() for piece in pieces)


def test_an_even_share_is_contiguous_and_of_every_draw() -> None:
    pieces = Division(schedule(batch=12), rank=1, world_size=3, draws=2).micro_batches(7)
    assert [piece.draw for piece in pieces] == [14, 15]
    assert all(piece.places.tolist() == [4, 5, 6, 7] for piece in pieces)


def test_processes_that_share_by_cost_end_together() -> None:
    """No process has more than the mean and one window of the largest dataset; even sharing of whole draws has."""
    plan = schedule(batch=2)
    divisions = [Division(plan, rank, 4, 8, "per_rank") for rank in range(4)]
    for step in range(40):
        loads = [load(division, step) for division in divisions]
        largest = max(plan.source(draw).tokens for draw in range(8 * step, 8 * step + 8))
        assert max(loads) <= sum(loads) / 4 + largest
    counts = [len({piece.draw for piece in division.micro_batches(0)}) for division in divisions]
    assert min(counts) < 8  # not every process works on every dataset


def test_the_longest_windows_are_given_out_first() -> None:
    assigned = assign_by_cost([1, 10], batch=2, world_size=3)
    assert [{draw: places.tolist() for draw, places in mine.items()} for mine in assigned] == [
        {1: [0]},
        {1: [1]},
        {0: [0, 1]},
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"world_size": 5},
            r"batch of 12 windows cannot be shared evenly by 5 processes: use 1, 2, 3, 4, 6 or 12",
        ),
        ({"world_size": 5, "draws": 2}, r"24 windows in 2 draws cannot .* a global batch that is a multiple of 10"),
        ({"world_size": 15, "way": "per_rank"}, r"12 windows leaves 3 of 15 processes without any"),
        ({"way": "per_rnak"}, r"sampling.draw: no way 'per_rnak'"),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Division(schedule(batch=12), **arguments)


def test_a_batch_of_one_window_is_for_one_process() -> None:
    with pytest.raises(UserError, match=r"1 windows cannot be shared evenly by 2 processes: use 1 process, or"):
        Division(schedule(batch=1), world_size=2)


def test_a_rank_outside_the_world_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        Division(schedule(batch=12), rank=2, world_size=2)


def test_windows_that_take_more_model_calls_cost_more() -> None:
    sources = [Source(name, 1000, 4_096, (1000,)) for name in ("long", "short")]
    plan = Schedule(sources, batch=4, seed=1, scheme="uniform")
    calls = {"long": 8, "short": 1}

    def work(division: Division, step: int) -> int:
        return sum(len(piece.places) * calls[plan.source(piece.draw).name] for piece in division.micro_batches(step))

    divisions = [Division(plan, rank, 2, 4, "per_rank", None, lambda step, name: calls[name]) for rank in (0, 1)]
    for step in range(30):
        first, second = (work(division, step) for division in divisions)
        assert abs(first - second) <= 1  # every draw has an even number of windows of each cost


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_no_piece_of_the_costliest_dataset_is_larger_than_is_said(draws: int) -> None:
    plan = schedule(batch=8)
    for world_size in (1, 2, 4, 8):
        divisions = [Division(plan, rank, world_size, draws, "per_rank") for rank in range(world_size)]
        pieces = [piece for step in range(60) for division in divisions for piece in division.micro_batches(step)]
        largest = max(len(piece.places) for piece in pieces if plan.source(piece.draw).name == "staircase")
        assert largest == divisions[0].largest_micro_batch
    assert Division(plan, 0, 2, 1, "global", 3).largest_micro_batch == 3
