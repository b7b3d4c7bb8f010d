"""Facts from headers, names and checksums: `register`, `shard` and `audit` find the same ones in the same files."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from handmade_well import spread, write_file

from data_pipeline.cli import main
from data_pipeline.registry import load_registry
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.format import MANIFEST_NAME, Manifest
from data_pipeline.shards.review import audit
from data_pipeline.well.findings import Finding, StoredFrames, axis_finding, copies, times_finding
from data_pipeline.well.register import register

REGISTRY = load_registry()
CARD = REGISTRY.card("gray_scott_reaction_diffusion")
LATE = np.float32(1000 + 0.01 * np.arange(20))  # steps of 0.0098 and 0.0104, by rounding

TIMES = {
    "backward": (np.arange(5.0)[::-1], "error", "time runs backward, from 4 to 0", ()),
    "restart": ([0, 1, 2, 3, 2, 3, 4], "error", "2 of 7 frames are not later than one before them", ((4, 6),)),
    "missing": (
        [0, 0.5, 1, 2.5, 3, 3.5, 4.5],
        "warning",
        "3 frames are missing before: the others are 0.5",
        ((3, 4), (6, 7)),
    ),
    "log": ([0, *np.geomspace(0.1, 100, 10)], "warning", "time grows 2.154-fold from frame to frame", ()),
    "adaptive": (np.cumsum(1 + 0.3 * spread((9,))), "warning", "(adaptive steps?)", ()),
    "unwritten": (np.zeros(4), "warning", "all 4 frames are at time 0", ()),
    "epoch": (1.7e9 + 60.0 * np.array([0, 1, 2, 3.5, 4]), "warning", "frames are from 30 to 90 apart", ()),
}


@pytest.mark.parametrize("case", TIMES)
def test_times_that_do_not_go_on_evenly(case: str) -> None:
    times, severity, words, frames = TIMES[case]
    found = times_finding(np.array(times, np.float64), "a.hdf5", 3)
    assert found is not None
    assert (found.severity, found.file, found.trajectory, found.frames) == (severity, "a.hdf5", 3, frames)
    assert words in found.detail
    assert found.detail.endswith("; dt is null")


@pytest.mark.parametrize("times", [[7.0], [0, 1], np.arange(9) * 0.1, LATE, 1.7e9 + 60.0 * np.arange(9)])
def test_even_times_are_no_finding(times: np.ndarray) -> None:
    assert times_finding(np.array(times, np.float64), "a.hdf5", 0) is None


AXES = {
    "backward": (np.linspace(1, 0, 9), "warning", "x runs backward, from 1 to 0"),
    "Chebyshev": (
        np.cos(np.linspace(np.pi, 0, 9)),
        "warning",
        "points along x are not equally spaced (from 0.0761",
    ),
    "both": (np.geomspace(8, 1, 9), "warning", "x runs backward, from 8 to 1; points along x are not equally spaced"),
    "folded": ([0, 1, 2, 1, 0], "error", "points along x do not ascend from one to the next"),
    "unwritten": (np.zeros(9), "error", "points along x do not ascend"),
    "NaN": ([0, 1, np.nan], "error", "points along x are not finite"),
}


@pytest.mark.parametrize("case", AXES)
def test_axes_that_do_not_ascend_evenly(case: str) -> None:
    points, severity, words = AXES[case]
    found = axis_finding("x", np.array(points, np.float64), "a.hdf5")
    assert found is not None
    assert (found.severity, found.trajectory) == (severity, None)
    assert words in found.detail
    assert axis_finding("x", np.linspace(0, 1, 9), "a.hdf5") is None


def brew(folder: Path, split: str, name: str = "a.hdf5", seed: int = 0, count: int = 2) -> Path:
    """One file of trajectories of five frames."""
    path = folder / CARD.name / "data" / split / name
    return write_file(path, CARD, spread((count, 5, 2, 16, 16), seed))


def headers(found: list[Finding]) -> set[Finding]:
    return {one for one in found if one.kind in ("times", "axes", "left_out")}


def test_register_shard_and_audit_find_the_same(tmp_path: Path) -> None:
    well = tmp_path / "well"
    with h5py.File(brew(well, "train"), "r+") as file:
        del file["dimensions/time"]
        file["dimensions/time"] = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 2, 3]], np.float64)
        file["dimensions/y"][:] = np.arange(16)[::-1]
    with h5py.File(brew(well, "train", "b.hdf5", seed=1), "r+") as file:
        file["dimensions/x"][:] = np.arange(16) * 0.5
    brew(well, "train", "more.HDF5")
    (built,) = build_shards(well, tmp_path / "shards", jobs=1)
    found = headers(list(built.manifest.findings))
    assert {(one.kind, one.severity, one.file, one.trajectory, one.frames) for one in found} == {
        ("times", "error", "a.hdf5", 1, ((3, 4),)),
        ("axes", "warning", "a.hdf5", None, ()),
        ("axes", "warning", "b.hdf5", None, ()),
        ("left_out", "warning", "", None, ()),
    }
    (other,) = [one for one in found if one.file == "b.hdf5"]
    assert other.detail == "points are 0.5 (x) and 1 (y) apart, in a.hdf5 1 and -1"
    assert [one.dt for one in built.manifest.trajectories] == [1.0, None, 1.0, 1.0]
    assert built.manifest.spacing is None
    for place in (well, tmp_path / "shards"):
        (review,) = audit(place, REGISTRY, jobs=1)
        assert headers(list(review.findings)) == found
    made = register(well / CARD.name, "brew", tmp_path / "cards")
    assert {f"{one.kind}: {one.where}: {one.detail}" for one in found if one.kind != "left_out"} <= set(made.decisions)
    assert any("not read: more.HDF5" in line for line in made.decisions)
    assert load_registry(tmp_path / "cards").card("brew").dt is None


def test_a_manifest_without_spacing_is_read(tmp_path: Path) -> None:
    """As shards have it that were made before it was stored."""
    brew(tmp_path / "well", "train")
    (built,) = build_shards(tmp_path / "well", tmp_path / "shards", jobs=1)
    assert built.manifest.spacing == (1.0, 1.0)
    path = tmp_path / "shards" / CARD.name / "train" / MANIFEST_NAME
    replace(built.manifest, spacing=None).save(path)
    assert b"spacing" not in path.read_bytes()
    assert Manifest.load(path).spacing is None


def test_a_trajectory_that_is_there_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    well, shards = tmp_path / "well", tmp_path / "shards"
    brew(well, "train", count=3)
    with h5py.File(brew(well, "test", "b.hdf5", seed=1), "r+") as file, h5py.File(brew(well, "train")) as source:
        for name in "AB":
            file[f"t0_fields/{name}"][1] = source[f"t0_fields/{name}"][0]
    brew(well, "valid", "c.hdf5")  # the same two as in train
    assert main(["shard", "--well", str(well), "--out", str(shards), "--jobs", "1"]) == 0
    said = capsys.readouterr().err
    same = "the same frames as train, a.hdf5, trajectory"
    for split, place in (("valid", "c.hdf5, trajectory 1"), ("test", "b.hdf5, trajectory 1")):
        (line,) = [line for line in said.splitlines() if split in line.split() and place in line]
        assert same in line
        assert line.split()[2:4] == ["error", "copy"]
    assert len(said.splitlines()) == 4
    assert main(["inspect", str(shards), "--findings"]) == 0
    assert capsys.readouterr().out.count(same) == 3
    for place in (well, shards):
        assert main(["audit", str(place), "--jobs", "1"]) == 2
        assert capsys.readouterr().out.count(same) == 3


def test_a_part_of_a_trajectory_is_a_copy_too() -> None:
    whole = StoredFrames("train", "a", 0, "".join(f"{frame:08x}" for frame in range(9)))
    cut = StoredFrames("test", "b", 4, whole.crc32[16:48])
    same_start = StoredFrames("test", "c", 0, whole.crc32[:8] + "ffffffff")
    at_rest = StoredFrames("test", "d", 0, whole.crc32[-8:] * 3)
    for trajectories in ([whole, cut, same_start, at_rest], [cut, whole, at_rest]):
        ((split, found),) = copies(trajectories)
        assert (split, found.file, found.trajectory) == ("test", "b", 4)
        assert found.detail.startswith("frames that are all in train, a, trajectory 0")


def test_a_state_channel_that_never_changes(tmp_path: Path) -> None:
    state = spread((2, 5, 2, 16, 16))
    state[:, :, 1] = state[:, :1, 1]  # another map in each trajectory
    path = tmp_path / CARD.name / "data" / "train" / "a.hdf5"
    write_file(path, CARD, state)
    (review,) = audit(tmp_path, REGISTRY, jobs=1)
    (found,) = [one for one in review.findings if one.kind == "static_channel"]
    assert (found.severity, found.channel) == ("warning", "B")
    assert "store it as a constant field" in found.detail
    state[1, 3, 1, 7, 9] += 1  # but for one point of one frame
    write_file(path, CARD, state)
    (review,) = audit(tmp_path, REGISTRY, jobs=1)
    assert [one for one in review.findings if one.kind == "static_channel"] == []


def test_files_that_are_left_out_are_listed_and_hidden_ones_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    well = tmp_path / "well"
    data = brew(well, "train").parents[1]
    (data / "train" / "._a.hdf5").write_bytes(b"\0\5\x16\7 of another system")
    (data / "train" / "part 2").mkdir()
    for name in ("train/b.HDF5", "train/c.hdf", "validation"):
        (data / name).write_text("")
    (review,) = audit(well, REGISTRY, jobs=1)
    (found,) = [one for one in review.findings if one.kind == "left_out"]
    assert found.severity == "warning"
    assert found.detail.startswith("not read: b.HDF5, c.hdf, part 2, data/validation; files are read whose names end")
    assert not [one for one in review.findings if one.kind == "unreadable"]
    assert "not read: b.HDF5, c.hdf, part 2, data/validation" in "".join(
        register(well / CARD.name, "brew", tmp_path / "cards").decisions
    )
    (tmp_path / "cards" / "datasets" / "._brew.yaml").write_bytes(b"\0\5\x16\7")
    assert "brew" in load_registry(tmp_path / "cards").cards
    (data / "train" / "a.hdf5").unlink()
    shard = ["shard", "--well", str(well), "--out", str(tmp_path / "shards")]
    draft = ["register", str(well / CARD.name), "--registry", str(tmp_path)]
    for arguments in (draft, shard, [*shard, "--splits", "train"], ["audit", str(well)]):
        assert main(arguments) == 2
        assert "not read: b.HDF5, c.hdf" in capsys.readouterr().err
