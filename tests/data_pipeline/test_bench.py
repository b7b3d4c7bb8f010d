"""The benchmark's figures add up, and what it cannot measure it says."""

import json
import math
import re
import shutil
from pathlib import Path

import h5py
import pytest

from data_pipeline.bench import KEYS, PAPER_WINDOWS_PER_S, bench, verdict
from data_pipeline.errors import UserError

GRAY_SCOTT = "gray_scott_reaction_diffusion"


def test_synthetic_data(tmp_path: Path) -> None:
    table = bench(synthetic="16x32x2", seconds=0.1, json_file=tmp_path / "bench.json")
    report = json.loads((tmp_path / "bench.json").read_text())
    speeds = report["windows_per_s"]
    assert set(KEYS) <= set(speeds)
    assert all(math.isfinite(speed) and speed > 0 for speed in speeds.values())
    assert report["data"]["window_bytes"] == 2 * 2 * 16 * 32 * 4
    for name, speed in speeds.items():
        low, high = report["spread"].get(name, (speed, speed))
        assert low <= speed <= high
    cold = report["streaming_cold"]
    assert cold["blocks"]["bytes_fetched"] >= report["data"]["shard_bytes"]  # whole shards, whatever was used
    assert cold["global"]["bytes_used"] == cold["global"]["windows"] * 8192
    assert report["needed_windows_per_s"] == PAPER_WINDOWS_PER_S == pytest.approx(27.1, abs=0.01)
    assert report["verdict"] in table
    assert "not measured" not in table
    assert "throughput/samples_per_s" in table


def test_shards_without_their_well(tiny_shards: Path, tmp_path: Path) -> None:
    table = bench(tiny_shards, datasets=[GRAY_SCOTT], seconds=0.05, windows_per_s=3, json_file=tmp_path / "b.json")
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["windows_per_s"]["welldataset"] is report["windows_per_s"]["h5py"] is None
    assert report["data"]["dataset"] == GRAY_SCOTT
    assert "not measured: welldataset, h5py" in table


def test_shards_of_other_files_are_refused(tiny_shards: Path, tiny_well: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_well / GRAY_SCOTT, tmp_path / GRAY_SCOTT)
    for path in (tmp_path / GRAY_SCOTT / "data" / "train").iterdir():
        with h5py.File(path, "r+") as file:
            file["t0_fields/A"][...] += 1
    with pytest.raises(UserError, match=r"h5py: its first windows differ from the windows of the shards in .*train"):
        bench(tiny_shards, tmp_path, datasets=[GRAY_SCOTT], seconds=0.01)
    path.unlink()
    with pytest.raises(UserError, match="expected the files that the shards were made from"):
        bench(tiny_shards, tmp_path, datasets=[GRAY_SCOTT], seconds=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a folder of shards .* or --synthetic HxWxC"),
        ({"synthetic": "256x256x3", "well": Path("well")}, "one of the two"),
        ({"synthetic": "256x256"}, "--synthetic: expected HxWxC such as 256x256x3"),
        ({"synthetic": "255x256x3"}, "even sizes"),
        ({"synthetic": "99998x99998x999"}, "at most 12.5 MB a frame"),
        ({"synthetic": "8x8x1", "seconds": 0.0}, "--seconds: expected a number above 0, got 0"),
        ({"synthetic": "8x8x1", "windows_per_s": math.nan}, "--windows-per-s: expected a number above 0"),
        ({"shards": Path("x"), "datasets": ["a", "b"]}, "one dataset at a time, got a, b"),
    ],
)
def test_wrong_choices(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench(**arguments)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (1000.0, "compute limits: 1000 windows/s with data.workers=2, 10 times the 100 that training takes."),
        (150.0, "compute limits: .* There is little to spare"),
        (50.0, "IO limits: 50 windows/s with data.workers=2, 0.5 times .* Use more workers"),
    ],
)
def test_verdict(speed: float, expected: str) -> None:
    speeds = {"indexed": 1e6, "loader_0": speed / 2, "loader_1": None, "loader_2": speed}
    assert re.match(expected, verdict(speeds, 100.0))
