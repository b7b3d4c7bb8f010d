"""The schedule as a pure function: each window once per pass, shares met, no dependence on ranks, order or history."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.hashing import splitmix64
from data_pipeline.windows.schedule import SCHEMES, Draw, Schedule, Source, sampling_shares

SOURCES = [
    Source("wide", 37, 4096, (10, 9, 0, 18)),
    Source("tiny", 5, 1024, (5,)),
    Source("long", 230, 256, (40, 40, 40, 40, 40, 30)),
]
SHUFFLES = ("global", "blocks")
FROZEN = {
    0: ("long", [145, 156, 49, 59], "8eb76fab503eb59e"),
    1: ("long", [106, 57, 93, 146], "4b549b5559e2794a"),
    2: ("wide", [25, 17, 6, 10], "6786242c387e0609"),
    255: ("tiny", [4, 0, 1, 3], "7ca7bd28480b28c2"),
    256: ("wide", [19, 28, 14, 24], "d0cedd9b58d6a988"),
    1000: ("wide", [8, 36, 34, 13], "f58deac1d05b1b62"),
    1000000: ("wide", [15, 31, 27, 13], "f0e85a8562bc9e53"),
}
FROZEN_BLOCKS = [[178, 215, 168, 229], [183, 172, 220, 209], [6, 3, 1, 4], [15, 13, 18, 11]]


def stream(schedule: Schedule, name: str, stop: int) -> np.ndarray:
    """All window ids of one dataset over the draws before `stop`."""
    return np.concatenate([draw.windows for draw in map(schedule.draw, range(stop)) if draw.dataset == name])


def same(a: Draw, b: Draw) -> bool:
    return (a.index, a.dataset, a.digest()) == (b.index, b.dataset, b.digest()) and np.array_equal(a.windows, b.windows)


def test_the_hash_is_splitmix64() -> None:
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(np.uint64(1234567), np.arange(4, dtype=np.uint64)).tolist() == reference


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_every_window_once_per_pass(shuffle: str, batch: int) -> None:
    schedule = Schedule(SOURCES, batch, seed=3, shuffle=shuffle, shards_per_block=2)
    for source in SOURCES:
        windows = stream(schedule, source.name, 2000 // batch + 400)
        passes = len(windows) // source.windows
        assert passes >= 1
        orders = windows[: passes * source.windows].reshape(passes, source.windows)
        assert (np.sort(orders, axis=1) == np.arange(source.windows)).all()
        assert len({order.tobytes() for order in orders}) == passes or source.windows < 10
        rest = windows[passes * source.windows :]
        assert len(set(rest.tolist())) == len(rest)


@pytest.mark.parametrize(("world_size", "per_rank"), list(itertools.product([1, 2, 3, 8], [1, 2, 5])))
def test_ranks_are_disjoint_slices_of_one_global_batch(world_size: int, per_rank: int) -> None:
    batch = world_size * per_rank
    alone = Schedule(SOURCES, batch, seed=0)
    ranks = [Schedule(SOURCES, batch, seed=0) for _ in range(world_size)]  # one per process
    read: dict[str, list[int]] = {source.name: [] for source in SOURCES}
    for index in range(260):
        draws = [schedule.draw(index) for schedule in ranks]
        assert len({draw.dataset for draw in draws}) == 1
        parts = [draw.windows[rank * per_rank : (rank + 1) * per_rank] for rank, draw in enumerate(draws)]
        assert np.array_equal(np.concatenate(parts), alone.draw(index).windows)
        read[draws[0].dataset] += np.concatenate(parts).tolist()
    for source in SOURCES:
        for start in range(0, len(read[source.name]), source.windows):  # no window twice in a pass, on any rank
            one_pass = read[source.name][start : start + source.windows]
            assert len(set(one_pass)) == len(one_pass)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_draws_do_not_depend_on_history_or_listing_order(shuffle: str) -> None:
    reference = Schedule(SOURCES, 4, seed=11, shuffle=shuffle)
    draws = [reference.draw(index) for index in range(700)]
    backwards = Schedule(SOURCES[::-1], 4, seed=11, shuffle=shuffle)
    assert all(same(backwards.draw(index), draws[index]) for index in reversed(range(700)))
    for start in (1, 255, 256, 257, 511, 699):  # resume: a schedule that never saw the earlier draws
        fresh = Schedule(SOURCES[1:] + SOURCES[:1], 4, seed=11, shuffle=shuffle)
        assert all(same(fresh.draw(index), draws[index]) for index in range(start, min(start + 40, 700)))
    assert same(reference.copy().draw(300), draws[300])


def test_seeds_give_different_draws() -> None:
    digests = {tuple(Schedule(SOURCES, 4, seed).draw(i).digest() for i in range(8)) for seed in (-1, 0, 1, 2**70)}
    assert len(digests) == 4
    assert same(Schedule(SOURCES, 4, np.int64(5)).draw(9), Schedule(SOURCES, 4, 5).draw(9))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_realised_counts_follow_the_shares(scheme: str) -> None:
    weights = {"wide": 1.0, "tiny": 3.5, "long": 0.0} if scheme == "weights" else None
    schedule = Schedule(SOURCES, 2, seed=1, scheme=scheme, weights=weights)
    names = [schedule.draw(index).dataset for index in range(5 * 256)]
    for block in range(5):
        drawn = Counter(names[block * 256 : (block + 1) * 256])
        for name, share in schedule.shares.items():
            assert abs(drawn[name] - 256 * share) < 1
    if scheme == "weights":
        assert set(names) == {"wide", "tiny"}


def test_shares_hold_over_a_million_draws_without_bias() -> None:
    for seed in range(4):
        schedule = Schedule(SOURCES, 4, seed)
        counts = schedule.counts(1_000_000)
        assert sum(counts.values()) == 1_000_000
        for name, share in schedule.shares.items():  # 3907 blocks, each off by less than 1 with mean 0
            assert abs(counts[name] - 1_000_000 * share) < 4 * math.sqrt(3907) * 0.5


def test_counts_equal_counting() -> None:
    schedule = Schedule(SOURCES, 3, seed=8, scheme="temperature", temperature=0.3)
    counted = dict.fromkeys(sorted(source.name for source in SOURCES), 0)
    for index in range(1000):
        if index in (0, 1, 255, 256, 257, 512, 777, 999):
            fresh = Schedule(SOURCES, 3, seed=8, scheme="temperature", temperature=0.3)
            assert fresh.counts(index) == counted == schedule.counts(index)
            assert fresh.passes(index)["tiny"] == counted["tiny"] * 3 / 5
        counted[schedule.draw(index).dataset] += 1


@pytest.mark.parametrize("shards_per_block", [1, 2, 4, 100])
def test_blocks_shuffle_reads_few_shards_at_a_time(shards_per_block: int) -> None:
    source = Source("set", 120, 64, (10, 3, 27, 1, 19, 0, 30, 12, 18))
    shard_of_window = np.repeat(np.arange(9), source.shard_windows)
    schedule = Schedule([source], 10, seed=2, shuffle="blocks", shards_per_block=shards_per_block)
    orders = stream(schedule, "set", 12 * 6).reshape(6, 120)
    for order in orders:
        shards = shard_of_window[order]
        first = {int(shard): int(np.argmax(shards == shard)) for shard in set(shards.tolist())}
        last = {shard: 119 - int(np.argmax(shards[::-1] == shard)) for shard in first}
        open_shards = [sum(first[s] <= place <= last[s] for s in first) for place in range(120)]
        assert max(open_shards) <= shards_per_block
        if shards_per_block == 4:  # within a block, windows of its shards are mixed
            assert np.count_nonzero(np.diff(shards)) > 2 * 9
    assert len({order.tobytes() for order in orders}) == 6
    block_orders = {tuple(dict.fromkeys(shard_of_window[order].tolist())) for order in orders}
    assert len(block_orders) > 1  # shards change places from pass to pass


def test_frozen_draws() -> None:
    """Literal values: a change of these breaks the resumption of every run in progress."""
    schedule = Schedule(SOURCES, 4, seed=0)
    found = [
        (i, schedule.draw(i).dataset, schedule.draw(i).windows.tolist(), schedule.draw(i).digest()) for i in FROZEN
    ]
    assert found == [(i, *expected) for i, expected in FROZEN.items()]
    blocks = Schedule(SOURCES, 4, seed=0, shuffle="blocks", shards_per_block=2)
    assert [blocks.draw(i).windows.tolist() for i in (0, 1, 2, 1_000_000)] == FROZEN_BLOCKS


CHANGES = [  # with 0 before and after, segments shorter and longer than a block of 256
    (7, {"wide": 0.2, "tiny": 0.7, "long": 0.1}),
    (300, {"long": 1.0, "tiny": 0.0, "wide": 0.0}),
    (301, {"wide": 0.5, "tiny": 0.25, "long": 0.25}),
    (1000, {"wide": 0.02, "tiny": 0.03, "long": 0.95}),
]


def changing(batch: int = 3, changes: int = len(CHANGES), **options: str) -> Schedule:
    schedule = Schedule(SOURCES, batch, seed=4, **options)  # type: ignore[arg-type]
    for index, shares in CHANGES[:changes]:
        schedule = schedule.with_shares(index, shares)
    return schedule


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_every_window_once_per_pass_across_changes_of_shares(shuffle: str) -> None:
    schedule = changing(shuffle=shuffle)
    for source in SOURCES:
        windows = stream(schedule, source.name, 1600)
        passes = len(windows) // source.windows
        assert passes >= 3
        orders = windows[: passes * source.windows].reshape(passes, source.windows)
        assert (np.sort(orders, axis=1) == np.arange(source.windows)).all()
        rest = windows[passes * source.windows :]
        assert len(set(rest.tolist())) == len(rest)


def test_counts_and_passes_sum_over_changes_of_shares() -> None:
    schedule = changing()
    counted = dict.fromkeys(sorted(source.name for source in SOURCES), 0)
    for index in range(1600):
        if index in (0, 6, 7, 8, 299, 300, 301, 302, 557, 999, 1000, 1001, 1255, 1256, 1257, 1599):
            assert changing().counts(index) == counted == schedule.counts(index)
            assert schedule.passes(index)["wide"] == counted["wide"] * 3 / 37
        counted[schedule.draw(index).dataset] += 1


def test_draws_follow_the_shares_of_their_segment() -> None:
    schedule = changing()
    block = Counter(schedule.draw(index).dataset for index in range(301, 301 + 256))
    assert all(abs(block[name] - 256 * share) < 1 for name, share in CHANGES[2][1].items())
    assert schedule.draw(300).dataset == "long"
    assert schedule.shares == CHANGES[-1][1]


def test_a_change_of_shares_leaves_the_draws_before_it_and_the_schedule_it_came_from() -> None:
    before, after = changing(changes=2), changing(changes=3)
    draws = [before.draw(index) for index in range(600)]
    derived = before.with_shares(*CHANGES[2])
    assert all(same(before.draw(index), draws[index]) for index in range(600))
    assert all(same(derived.draw(index), draws[index]) for index in range(301))
    assert any(not same(derived.draw(index), draws[index]) for index in range(301, 600))
    assert all(same(derived.draw(index), after.draw(index)) for index in range(600))
    plain = Schedule(SOURCES, 3, seed=4)
    assert all(same(plain.draw(index), after.draw(index)) for index in range(7))


def test_a_schedule_comes_back_from_its_history_as_json() -> None:
    schedule = changing()
    history = json.loads(json.dumps(schedule.history))
    assert history[0] == [0, Schedule(SOURCES, 3, seed=4).shares]
    assert [tuple(segment) for segment in history[1:]] == CHANGES
    restored = Schedule(SOURCES[::-1], 3, seed=4).with_history(history)
    copied = schedule.copy()
    for index in (1599, 0, 6, 7, 300, 301, 302, 999, 1000, 1300):
        assert same(restored.draw(index), schedule.draw(index))
        assert same(copied.draw(index), schedule.draw(index))
    assert restored.history == schedule.history


def test_shares_that_begin_where_others_do_replace_them() -> None:
    once = changing(changes=2).with_shares(300, CHANGES[2][1])
    assert once.history[-1] == [300, CHANGES[2][1]]
    assert len(once.history) == 3
    first = Schedule(SOURCES, 3, seed=4, scheme="uniform").with_shares(0, Schedule(SOURCES, 3, seed=4).shares)
    assert all(same(first.draw(index), Schedule(SOURCES, 3, seed=4).draw(index)) for index in range(300))


@settings(max_examples=30, deadline=None)
@given(
    firsts=st.lists(st.integers(0, 500), max_size=4, unique=True).map(sorted),
    masses=st.lists(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), min_size=4, max_size=4),
    batch=st.integers(1, 9),
    stop=st.integers(0, 600),
)
def test_any_history_is_balanced(firsts: list[int], masses: list[list[float]], batch: int, stop: int) -> None:
    schedule = Schedule(SOURCES, batch, seed=0)
    for first, mass in zip(firsts, masses, strict=False):
        names = [source.name for source in schedule.sources]
        schedule = schedule.with_shares(first, {n: m / math.fsum(mass) for n, m in zip(names, mass, strict=True)})
    draws = [schedule.draw(index) for index in range(stop)]
    assert schedule.counts(stop) == {s.name: sum(d.dataset == s.name for d in draws) for s in SOURCES}
    for source in SOURCES:
        used = Counter(window for draw in draws if draw.dataset == source.name for window in draw.windows.tolist())
        times = [used.get(window, 0) for window in range(source.windows)]
        assert max(times) - min(times) <= 1


def test_shares_that_do_not_fit_are_refused() -> None:
    schedule = changing(changes=2)
    with pytest.raises(ValueError, match="shares from draw 299 on, but those from draw 300 on are set"):
        schedule.with_shares(299, CHANGES[2][1])
    with pytest.raises(ValueError, match=r"expected a share in .* for each of long, tiny, wide, got"):
        schedule.with_shares(400, {"long": 0.5, "tiny": 0.5})
    with pytest.raises(ValueError, match="expected a share in"):
        schedule.with_shares(400, {"long": 1.5, "tiny": 0.0, "wide": -0.5})
    with pytest.raises(ValueError, match=r"expected shares that sum to 1, got 0\.75"):
        schedule.with_shares(400, {"long": 0.25, "tiny": 0.25, "wide": 0.25})
    with pytest.raises(ValueError, match="history of shares that begins at draw 0"):
        schedule.with_history(changing().history[1:])


def test_a_full_size_schedule_opens_without_permuting_and_jumps_anywhere() -> None:
    sources = [Source("huge", 10**12, 4096, (10**12,)), Source("small", 10, 10**9, (10,))]
    schedule = Schedule(sources, 4, seed=0)  # 8 TB of permutation if it were built here
    assert sum(schedule.counts(10_000_000).values()) == 10_000_000
    index = next(
        i for i in range(10_000_000, 10_001_000) if schedule.counts(i)["small"] < schedule.counts(i + 1)["small"]
    )
    assert schedule.draw(index).dataset == "small"


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 10_000)), min_size=1, max_size=6),
    batch=st.integers(1, 9),
    seed=st.integers(-(2**63), 2**64),
    scheme=st.sampled_from(["sqrt", "uniform", "proportional", "temperature"]),
    stop=st.integers(0, 600),
)
def test_any_mixture_is_balanced(sizes: list[tuple[int, int]], batch: int, seed: int, scheme: str, stop: int) -> None:
    sources = [Source(f"d{i}", windows, tokens, (windows,)) for i, (windows, tokens) in enumerate(sizes)]
    schedule = Schedule(sources, batch, seed, scheme)
    assert math.isclose(math.fsum(schedule.shares.values()), 1.0)
    draws = [schedule.draw(index) for index in range(stop)]
    assert schedule.counts(stop) == {source.name: sum(d.dataset == source.name for d in draws) for source in sources}
    for source in sources:
        used = Counter(window for draw in draws if draw.dataset == source.name for window in draw.windows.tolist())
        times = [used.get(window, 0) for window in range(source.windows)]
        assert len(used) <= source.windows
        assert max(times) - min(times) <= 1


def test_shares_by_hand() -> None:
    sources = [Source("b", 1, 1, (1,)), Source("a", 3, 3, (3,))]
    assert list(sampling_shares(sources, "uniform").items()) == [("a", 0.5), ("b", 0.5)]
    assert sampling_shares(sources, "proportional") == pytest.approx({"a": 0.9, "b": 0.1})
    assert sampling_shares(sources, "sqrt") == pytest.approx({"a": 0.75, "b": 0.25})
    assert sampling_shares(sources, "adaptive") == sampling_shares(sources, "sqrt")
    ratio = math.exp((0.9 - 0.1) / 0.4)
    shares = sampling_shares(sources, "temperature", temperature=0.4)
    assert shares == pytest.approx({"a": ratio / (1 + ratio), "b": 1 / (1 + ratio)})
    assert sampling_shares(sources, "temperature", temperature=1e-3)["a"] == pytest.approx(1.0)
    assert sampling_shares(sources, "weights", weights={"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "sqr"}, r"sampling.scheme: no scheme 'sqr'. Did you mean 'sqrt'\?"),
        ({"shuffle": "block"}, r"sampling.shuffle: no shuffle 'block'. Did you mean 'blocks'\?"),
        ({"scheme": "temperature", "temperature": 0.0}, "sampling.temperature: expected a number above 0, got 0.0"),
        ({"scheme": "weights"}, "sampling.weights: expected a weight for every dataset, none for long, tiny, wide"),
        ({"scheme": "weights", "weights": {"widd": 1}}, r"no dataset 'widd' in this run. Did you mean 'wide'\?"),
        ({"scheme": "weights", "weights": {"long": 0, "tiny": 0, "wide": 0}}, "one of them above 0"),
        ({"scheme": "weights", "weights": {"long": 1, "tiny": -1, "wide": 1}}, "expected numbers from 0 up"),
        ({"scheme": "weights", "weights": {"long": 1, "tiny": math.nan, "wide": 1}}, "expected numbers from 0 up"),
        ({"batch": 0}, "expected batch and shards_per_block of at least 1, got 0"),
        ({"sources": []}, "expected at least one dataset, each once, got none"),
        ({"sources": [SOURCES[0], SOURCES[0]]}, r"each once, got \['wide', 'wide'\]"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**{"sources": SOURCES, "batch": 4, "seed": 0, **arguments})  # type: ignore[arg-type]


def test_bad_sources_and_indices() -> None:
    with pytest.raises(UserError, match="dataset 'short': expected at least one window, got 0"):
        Source("short", 0, 16, ())
    with pytest.raises(ValueError, match="37 windows, but its shards hold 38"):
        dataclasses.replace(SOURCES[0], shard_windows=(38,))
    with pytest.raises(ValueError, match="numbered from 0, got -1"):
        Schedule(SOURCES, 4, 0).draw(-1)
