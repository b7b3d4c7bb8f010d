"""The laws of adaptive shares."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.windows.schedule import adaptive_shares, carry_scores

NAMES = ["a", "b", "c", "d", "e"]
POSITIVE = st.floats(1e-6, 1e6)
MASSES = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5)


def normalised(masses: list[float]) -> dict[str, float]:
    return {name: mass / math.fsum(masses) for name, mass in zip(NAMES, masses, strict=False)}


def test_shares_by_hand() -> None:
    base = {"a": 0.5, "b": 0.25, "c": 0.25}
    assert adaptive_shares(base, {"a": 0.1, "b": 0.4, "c": 0.2}, 1.0, 0.0) == pytest.approx(
        {"a": 0.05 / 0.2, "b": 0.1 / 0.2, "c": 0.05 / 0.2}
    )
    assert adaptive_shares(base, {"a": 0.1, "b": 0.4, "c": 0.2}, 0.5, 0.0)["b"] == pytest.approx(
        0.25 * 2 / (0.5 + 0.25 * 2 + 0.25 * math.sqrt(2))
    )
    # a would get 0.0005 / 0.3005: it is raised to the floor, and b and c share the rest as 2 to 1
    floored = adaptive_shares(base, {"a": 0.001, "b": 0.8, "c": 0.4}, 1.0, 0.1)
    assert floored == pytest.approx({"a": 0.1, "b": 0.6, "c": 0.3})


def test_raising_one_share_may_push_another_below_the_floor() -> None:
    shares = adaptive_shares({"a": 0.01, "b": 0.21, "c": 0.78}, {}, 1.0, 0.2)
    assert shares == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.6})


@given(
    masses=MASSES, scores=st.lists(POSITIVE, min_size=5, max_size=5), power=st.floats(0, 10), part=st.floats(0, 0.99)
)
def test_shares_sum_to_one_and_none_is_below_the_floor(
    masses: list[float], scores: list[float], power: float, part: float
) -> None:
    base = normalised(masses)
    floor = part / len(base)
    shares = adaptive_shares(base, dict(zip(NAMES, scores, strict=True)), power, floor)
    assert list(shares) == list(base)
    assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert min(shares.values()) >= floor


@given(masses=MASSES, scores=st.lists(POSITIVE, min_size=5, max_size=5), factor=st.floats(1.01, 100))
def test_a_worse_score_never_lowers_the_share(masses: list[float], scores: list[float], factor: float) -> None:
    base, scored = normalised(masses), dict(zip(NAMES, scores, strict=True))
    before = adaptive_shares(base, scored, 1.0, 0.05)
    after = adaptive_shares(base, {**scored, "a": scored["a"] * factor}, 1.0, 0.05)
    assert after["a"] >= before["a"] - 1e-12
    assert all(after[name] <= before[name] + 1e-12 for name in base if name != "a")
    unfloored = [adaptive_shares(base, s, 1.0, 0.0)["a"] for s in (scored, {**scored, "a": scored["a"] * factor})]
    assert unfloored[0] < unfloored[1] or unfloored[0] > 1 - 1e-12


@given(masses=MASSES, scores=st.lists(POSITIVE, min_size=5, max_size=5), scale=st.floats(1e-3, 1e3))
def test_only_ratios_of_scores_count(masses: list[float], scores: list[float], scale: float) -> None:
    base, scored = normalised(masses), dict(zip(NAMES, scores, strict=True))
    scaled = {name: score * scale for name, score in scored.items()}
    assert adaptive_shares(base, scored, 0.0, 0.0) == pytest.approx(base)
    assert adaptive_shares(base, dict.fromkeys(NAMES, scale), 3.0, 0.0) == pytest.approx(base)
    assert adaptive_shares(base, scaled, 1.5, 0.02) == pytest.approx(adaptive_shares(base, scored, 1.5, 0.02))


def test_a_dataset_without_a_score_counts_as_the_average() -> None:
    base = dict.fromkeys(NAMES[:3], 1 / 3)
    assert adaptive_shares(base, {"a": 0.1, "b": 0.4}, 1.0, 0.0) == pytest.approx({"a": 1 / 7, "b": 4 / 7, "c": 2 / 7})
    assert adaptive_shares(base, {}, 1.0, 0.1) == pytest.approx(base)


def test_unusable_scores_leave_the_last_one_standing() -> None:
    latest = {"a": 0.5, "b": None, "c": math.inf, "d": math.nan, "e": 0.0}
    assert carry_scores({"b": 0.2, "c": 0.3, "d": 0.4}, latest) == (
        {"a": 0.5, "b": 0.2, "c": 0.3, "d": 0.4},
        ["b", "c", "d", "e"],
    )
    assert carry_scores({"a": 0.5}, {"a": 0.1}) == ({"a": 0.1}, [])


@pytest.mark.parametrize("floor", [0.5, 0.7, -0.1, math.nan])
def test_a_floor_that_leaves_nothing_is_refused(floor: float) -> None:
    with pytest.raises(UserError, match=r"sampling.floor: expected less than 1 / 2 = 0.5"):
        adaptive_shares({"a": 0.5, "b": 0.5}, {}, 1.0, floor)
