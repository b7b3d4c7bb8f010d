"""What a finding costs: the windows that are left, against a count by hand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards.format import usable_segments
from data_pipeline.well.findings import Finding, frame_ranges


def finding(kind: str, *frames: tuple[int, int]) -> Finding:
    return Finding(kind, "warning", "a.hdf5", 0, None, frames, "")


@pytest.mark.parametrize(
    ("findings", "skip", "expected"),
    [
        ([], ["duplicates"], ((0, 10),)),
        ([finding("duplicates", (4, 5))], [], ((0, 10),)),
        ([finding("duplicates", (4, 5))], ["duplicates"], ((0, 4), (4, 10))),
        ([finding("duplicates", (4, 6))], ["duplicates"], ((0, 4), (4, 5), (5, 10))),
        ([finding("stationary", (7, 10))], ["stationary"], ((0, 7),)),
        ([finding("nonfinite", (3, 4))], ["nonfinite"], ((0, 3), (4, 10))),
        ([finding("nonfinite", (0, 10))], ["nonfinite"], ()),
        ([finding("stationary", (7, 10)), finding("duplicates", (8, 9))], ["duplicates"], ((0, 8), (8, 10))),
    ],
)
def test_segments(findings: list[Finding], skip: list[str], expected: tuple[tuple[int, int], ...]) -> None:
    assert usable_segments(10, findings, skip) == expected


@given(st.sets(st.integers(0, 30)))
def test_ranges_hold_the_same_frames(frames: set[int]) -> None:
    ranges = frame_ranges(sorted(frames))
    assert [frame for first, stop in ranges for frame in range(first, stop)] == sorted(frames)
    assert all(stop < first for (_, stop), (first, _) in pairwise(ranges))


@given(st.sets(st.integers(1, 19)), st.integers(2, 4))
def test_no_window_holds_a_duplicate_and_the_frame_before(duplicates: set[int], length: int) -> None:
    segments = usable_segments(20, [finding("duplicates", *frame_ranges(sorted(duplicates)))], ["duplicates"])
    windows = {first for a, b in segments for first in range(a, b - length + 1)}
    assert windows == {
        first for first in range(20 - length + 1) if not duplicates & set(range(first + 1, first + length))
    }
