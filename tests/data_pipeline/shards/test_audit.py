"""Faults planted into real HDF5 files are found where they are, healthy data give no alarm."""

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from handmade_well import spread, write_file, write_stats

from data_pipeline.cli import main
from data_pipeline.errors import UserError
from data_pipeline.miniwell.gray_scott import evolve
from data_pipeline.registry import load_registry
from data_pipeline.shards.audit import STILL_FRAMES, TrajectoryAudit
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.plan import Settings
from data_pipeline.shards.review import Review, audit, findings_table
from data_pipeline.well.findings import Finding, condense
from data_pipeline.well.hdf5 import split_files

REGISTRY = load_registry()
EIGHT = [card.name for card in REGISTRY.select(None)]
GRAY_SCOTT = REGISTRY.card("gray_scott_reaction_diffusion")
SHEAR_FLOW = REGISTRY.card("shear_flow")


@pytest.fixture
def well(tiny_well: Path, tmp_path: Path) -> Path:
    """A copy of one dataset that a test may spoil."""
    shutil.copytree(tiny_well / "shear_flow", tmp_path / "well" / "shear_flow")
    return tmp_path / "well"


def serious(reviews: list[Review]) -> list[Finding]:
    """All findings but notes."""
    return [finding for review in reviews for finding in review.findings if finding.severity != "note"]


def of_kind(reviews: list[Review], kind: str) -> list[Finding]:
    return [finding for review in reviews for finding in review.findings if finding.kind == kind]


def gray_scott_well(tmp_path: Path, state: np.ndarray, name: str = "one.hdf5") -> Path:
    """A Well of one Gray-Scott file without stats.yaml; state (n, T, 2, H, W)."""
    well = tmp_path / "well"
    write_file(well / GRAY_SCOTT.name / "data" / "train" / name, GRAY_SCOTT, state)
    return well


def test_healthy_data_give_notes_alone(tiny_well: Path, tiny_shards: Path) -> None:
    reviews = audit(tiny_well, REGISTRY, jobs=1)
    assert len(reviews) == 24
    assert serious(reviews) == []
    kinds = {(review.dataset, finding.kind) for review in reviews for finding in review.findings}
    coarser = {(name, "grid") for name in EIGHT}
    symmetric = {(name, "duplicated_channel") for name in ("active_matter", "viscoelastic_instability")}
    at_rest = {("acoustic_scattering_maze", "zero_variance")}  # sound has no velocity before it starts
    assert kinds == coarser | symmetric | at_rest
    twins = of_kind(reviews, "duplicated_channel")
    assert {finding.channel for finding in twins} == {"D_yx", "E_yx", "C_yx"}
    assert all("as channels.yaml says" in finding.detail for finding in twins)
    assert all(finding.frames == ((0, 1),) for finding in of_kind(reviews, "zero_variance"))
    assert audit(tiny_shards, REGISTRY, jobs=1) == reviews


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values(well: Path, bad: float) -> None:
    path = split_files(well / "shear_flow", "valid")[0]
    with h5py.File(path, "r+") as file:
        file["t1_fields/velocity"][0, 5, 3, 7, 1] = bad
        file["t1_fields/velocity"][0, 6, 0, 0, 1] = bad
    found = serious(audit(well, REGISTRY, jobs=1))
    assert [(one.kind, one.severity, one.file, one.trajectory, one.channel, one.frames) for one in found] == [
        ("nonfinite", "error", path.name, 0, "velocity_y", ((5, 7),))
    ]


def test_nonfinite_constant_spoils_the_trajectory(tiny_well: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_well / "helmholtz_staircase", tmp_path / "helmholtz_staircase")
    path = split_files(tmp_path / "helmholtz_staircase", "test")[0]
    with h5py.File(path, "r+") as file:
        mask = file["t0_fields/mask"]
        mask[(0,) * mask.ndim] = np.nan
    found = serious(audit(tmp_path, REGISTRY, jobs=1))
    assert {(one.kind, one.file, one.channel, one.frames) for one in found} == {
        ("nonfinite", path.name, "mask", ((0, 9),))
    }


def test_duplicate_frames(well: Path) -> None:
    path = split_files(well / "shear_flow", "train")[-1]
    with h5py.File(path, "r+") as file:
        for name in ("t0_fields/tracer", "t0_fields/pressure", "t1_fields/velocity"):
            for frame in (3, 4, 8):
                file[name][0, frame] = file[name][0, frame - 1]
        file["t0_fields/tracer"][0, 1] = file["t0_fields/tracer"][0, 0]  # one field alone is no duplicate
    found = of_kind(audit(well, REGISTRY, jobs=1), "duplicates")
    assert [(one.severity, one.file, one.trajectory, one.frames) for one in found] == [
        ("warning", path.name, 0, ((3, 5), (8, 9)))
    ]
    assert "3 of 9 frames" in found[0].detail


def pattern(feed: float, kill: float, frames: int = 45) -> np.ndarray:
    """Gray-Scott from a drop of B: (T, 2, 32, 32)."""
    x = np.arange(32) - 16
    drop = 0.5 * np.exp(-(x[:, None] ** 2 + x**2) / 20)
    return evolve(np.stack([1 - drop, drop])[None], feed, kill, frames, dt=10.0)[0]


def test_run_that_died_has_a_stationary_tail(tmp_path: Path) -> None:
    dead, alive = pattern(feed=0.05, kill=0.09), pattern(feed=0.029, kill=0.057)
    assert dead[-1, 1].max() < 1e-6 < 1e-2 < alive[-1, 1].max()
    well = gray_scott_well(tmp_path, np.stack([alive, dead]).astype(np.float32))
    reviews = audit(well, REGISTRY, jobs=1)
    (found,) = of_kind(reviews, "stationary")
    assert (found.severity, found.file, found.trajectory) == ("warning", "one.hdf5", 1)
    ((first, stop),) = found.frames
    assert stop == 45
    assert STILL_FRAMES <= 45 - first < 40
    # By the definition, on all points of the stored values: still from `first` on, and not one frame earlier.
    stored = dead.astype(np.float32)
    change = np.abs(np.diff(stored, axis=0)).max(axis=(2, 3)) / stored.std(axis=(0, 2, 3))
    assert (change[first - 1 :] <= 1e-3).all()
    assert (change[first - 2] > 1e-3).any()
    flat = [one for one in of_kind(reviews, "zero_variance") if one.channel == "B"]
    assert [(one.severity, one.trajectory, one.frames[-1][1]) for one in flat] == [("warning", 1, 45)]


def test_short_still_tail_is_not_reported(tmp_path: Path) -> None:
    state = spread((1, 30, 2, 16, 16))
    state[0, 30 - STILL_FRAMES :] = state[0, 30 - STILL_FRAMES]  # one change too few
    assert of_kind(audit(gray_scott_well(tmp_path, state), REGISTRY, jobs=1), "stationary") == []


def watch(frames: np.ndarray, block: int = 4, std: float | None = None) -> TrajectoryAudit:
    """An audit of frames (T, C, H, W) that came in blocks; std: of every channel, if known."""
    names = [f"c{channel}" for channel in range(frames.shape[1])]
    watcher = TrajectoryAudit(names, (), frames.shape[2:], std and dict.fromkeys(names, std))
    for first in range(0, len(frames), block):
        watcher.add(frames[first : first + block])
    return watcher


@pytest.mark.parametrize(
    ("at", "height", "flat"),
    [
        ((1, 1), 1.0, False),  # a point that the subsample does not see, and variance enough
        ((0, 0), 0.05, True),  # one that it sees; the variance over all points is 6e-7
        ((0, 0), 0.1, False),
        ((5, 7), 1e-4, True),
    ],
)
def test_variance_near_zero_is_that_of_all_points(at: tuple[int, int], height: float, flat: bool) -> None:
    frames = np.zeros((3, 1, 64, 64), np.float32)
    frames[:, 0, at[0], at[1]] = [1, height, 1]
    assert (frames[1].var(dtype=np.float64) < 1e-6) == flat
    found = [one for one in watch(frames).findings("a.hdf5", 0) if one.kind == "zero_variance"]
    assert [(one.severity, one.frames) for one in found] == ([("warning", ((1, 2),))] if flat else [])


def test_no_variance_is_seen_far_from_where_the_run_began() -> None:
    frames = np.zeros((4, 1, 40, 48), np.float32)
    frames[:, 0] = spread((40, 48))
    frames[2:] = 7.7e9  # where sums of squares in float64 have lost all that is below 1e-6
    (found,) = [one for one in watch(frames).findings("a.hdf5", 0) if one.kind == "zero_variance"]
    assert found.frames == ((2, 4),)


@pytest.mark.parametrize("std", [None, 0.1])
@pytest.mark.parametrize("block", [1, 4, 40])
def test_something_small_that_moves_is_not_still(std: float | None, block: int) -> None:
    """A dot that the subsample never sees, with the same lowest and highest value in every frame."""
    frames = np.zeros((40, 1, 64, 64), np.float32)
    frames[:20, 0] = spread((20, 64, 64))
    for frame in range(20, 40):
        frames[frame, 0, 1, 2 * (frame - 20) + 1] = 1
    moving = watch(frames, block, std).findings("a.hdf5", 0)
    assert [one for one in moving if one.kind == "stationary"] == []
    frames[28:] = frames[27]
    (found,) = [one for one in watch(frames, block, std).findings("a.hdf5", 0) if one.kind == "stationary"]
    assert found.frames == ((28, 40),)


def test_findings_do_not_depend_on_the_blocks() -> None:
    frames = spread((23, 3, 64, 32))
    frames[4, 1] = 0.25
    frames[9] = frames[8]
    frames[17, 2, 5, 5] = np.nan
    frames[:, 0] = frames[:, 1]
    expected = watch(frames, 23)
    assert len(expected.findings("a", 0)) == 4
    for block in (1, 2, 5):
        watcher = watch(frames, block)
        assert watcher.findings("a", 0) == expected.findings("a", 0)
        sample, other = watcher.summary(), expected.summary()
        assert (sample.lowest, sample.highest, sample.equal) == (other.lowest, other.highest, ((0, 1),))
        assert sample.moments.num_frames == other.moments.num_frames == 22
        assert sample.moments.mean == pytest.approx(other.moments.mean, rel=1e-12)
        assert sample.delta_moments.variance == pytest.approx(other.delta_moments.variance, rel=1e-12)


def test_moments_of_the_subsample() -> None:
    frames = 1000 + spread((6, 2, 128, 64)) * np.array([1, 1e-2], np.float32)[:, None, None]
    sample, kept = watch(frames).summary(), frames[:, :, ::4, ::2].astype(np.float64)
    assert sample.moments.mean == pytest.approx(kept.mean(axis=(0, 2, 3)), rel=1e-12)
    assert sample.moments.variance == pytest.approx(kept.var(axis=(0, 2, 3)), rel=1e-9)
    assert sample.delta_moments.variance == pytest.approx(np.diff(kept, axis=0).var(axis=(0, 2, 3)), rel=1e-9)


def test_constant_and_duplicated_channels(tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("valid", 1)):
        state = spread((3, 5, 4, 32, 32), seed)
        state[:, :, 0] = 0.5  # tracer
        state[:, :, 3] = state[:, :, 2]  # velocity_y = velocity_x
        if split == "valid":
            state[2, 4, 3, 1, 1] += 0.25  # but for one point of one frame
            state[0, 0, 0, 0, 0] = 0.75
        write_file(tmp_path / "shear_flow" / "data" / split / "one.hdf5", SHEAR_FLOW, state)
    train, valid = audit(tmp_path, REGISTRY, jobs=1)
    found = {(one.kind, one.severity, one.channel) for one in serious([train])}
    assert found == {("constant_channel", "warning", "tracer"), ("duplicated_channel", "warning", "velocity_y")}
    assert {one.kind for one in serious([valid])} == {"zero_variance"}


def test_values_outside_the_cards_ranges(tmp_path: Path) -> None:
    state = spread((2, 6, 2, 32, 32))
    state[1, 3, 1, 9, 9] = -5
    (found,) = of_kind(audit(gray_scott_well(tmp_path, state), REGISTRY, jobs=1), "out_of_range")
    assert (found.trajectory, found.channel, found.frames) == (1, "B", ((3, 4),))
    assert found.detail.startswith("values from -5 to ")
    assert found.detail.endswith("the card says -0.1 to any")


@pytest.mark.parametrize(
    ("statistic", "factor", "severity"),
    [("std", 3.0, "error"), ("std", 1.1, "warning"), ("std_delta", 0.2, "error"), ("mean_delta", 1.0, None)],
)
def test_stats_that_disagree(well: Path, statistic: str, factor: float, severity: str | None) -> None:
    path = well / "shear_flow" / "stats.yaml"
    content = yaml.safe_load(path.read_text())
    content[statistic]["velocity"][1] *= factor
    path.write_text(yaml.safe_dump(content))
    found = serious(audit(well, REGISTRY, jobs=1))
    expected = [] if severity is None else [("stats_disagree", severity, "velocity_y")]
    assert [(one.kind, one.severity, one.channel) for one in found] == expected


def test_mean_that_disagrees(tmp_path: Path) -> None:
    state = spread((2, 6, 2, 32, 32))
    well = gray_scott_well(tmp_path, state)
    figures = {}
    for suffix, values in (("", state), ("_delta", np.diff(state, axis=1))):
        figures["mean" + suffix] = values.mean(axis=(0, 1, 3, 4))
        figures["std" + suffix] = figures["rms" + suffix] = values.std(axis=(0, 1, 3, 4))
    figures["mean"][1] += 3
    write_stats(well / GRAY_SCOTT.name, GRAY_SCOTT, figures)
    found = serious(audit(well, REGISTRY, jobs=1))
    assert [(one.kind, one.severity, one.channel) for one in found] == [("stats_disagree", "error", "B")]
    assert "mean 3.5 and std 0.2887 stated, 0.5" in found[0].detail


def test_stats_of_a_split_that_is_here_in_part(tmp_path: Path) -> None:
    """As `download --first-only` leaves it: the published grid, a few of the published trajectories."""
    well = gray_scott_well(tmp_path, spread((2, 3, 2, *GRAY_SCOTT.grid)))
    names = ("mean", "std", "rms", "mean_delta", "std_delta", "rms_delta")
    write_stats(well / GRAY_SCOTT.name, GRAY_SCOTT, {name: [9.0, 9.0] for name in names})
    found = serious(audit(well, REGISTRY, jobs=1))
    assert {(one.kind, one.severity) for one in found} == {("stats_disagree", "warning")}
    published = sum(trajectories for trajectories, _ in GRAY_SCOTT.train)
    assert f"({published - 2} of the published trajectories are not here" in found[0].detail


def test_lengths_and_grids(tmp_path: Path) -> None:
    well = gray_scott_well(tmp_path, spread((2, 6, 2, 32, 32)), "a.hdf5")
    gray_scott_well(tmp_path, spread((1, 4, 2, 32, 32), 1), "b.hdf5")
    (review,) = audit(well, REGISTRY, jobs=1)
    notes = [(one.kind, one.severity, one.detail) for one in review.findings]
    assert notes == [
        ("mixed_lengths", "note", "frames of the trajectories: 1 of 4, 2 of 6"),
        ("grid", "note", "32x32, the card says 128x128"),
    ]
    assert (review.num_trajectories, review.num_frames) == (3, 16)
    gray_scott_well(tmp_path, spread((1, 4, 2, 16, 32)), "c.hdf5")
    (two,) = serious(audit(well, REGISTRY, jobs=1))
    assert (two.kind, two.severity) == ("grid", "error")
    assert "16x32, 32x32" in two.detail


@pytest.mark.parametrize("jobs", [1, 2])
def test_damaged_file_does_not_end_the_audit(well: Path, jobs: int) -> None:
    path, other = (split_files(well / "shear_flow", split)[0] for split in ("valid", "test"))
    path.write_bytes(path.read_bytes()[:5000])
    with h5py.File(other, "r+") as file:
        file["t0_fields/tracer"][0, 2, 0, 0] = np.nan
    found = serious(audit(well, REGISTRY, jobs=jobs))
    assert [(one.kind, one.file) for one in found] == [("unreadable", path.name), ("nonfinite", other.name)]
    assert "cannot be read, so it is truncated" in found[0].detail


def test_stats_file_that_is_no_good_is_reported(well: Path) -> None:
    (well / "shear_flow" / "stats.yaml").write_text("mean: [")
    found = serious(audit(well, REGISTRY, jobs=1))
    assert [(one.kind, one.severity, one.file) for one in found] == [("unreadable", "error", "stats.yaml")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shards_are_audited_from_their_own_bytes(well: Path, tmp_path: Path, dtype: str) -> None:
    build_shards(well, tmp_path / "shards", jobs=1, settings=Settings(frames_per_chunk=4, dtype=dtype))
    folder = tmp_path / "shards" / "shear_flow" / "test"
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    start = manifest["trajectories"][0]["offsets"][1]  # frame 4, tracer
    size = {"float32": 4, "float16": 2}[dtype]
    content[start : start + size] = np.array([np.nan], f"<f{size}").tobytes()
    (folder / "shard-000000.tar").write_bytes(content)
    (tmp_path / "shards" / "shear_flow" / "valid" / "shard-000000.tar").unlink()
    found = serious(audit(tmp_path / "shards", REGISTRY, jobs=1))
    assert [(one.kind, one.file, one.channel, one.frames) for one in found] == [
        ("unreadable", "shard-000000.tar", None, ()),
        ("nonfinite", manifest["sources"][0]["name"], "tracer", ((4, 5),)),
    ]


def test_a_fault_of_many_trajectories_is_told_once() -> None:
    flat = [Finding("zero_variance", "note", "a", number, "B", ((number, number + 1),), "d") for number in range(9)]
    same = [Finding("duplicates", "warning", "a", number, None, ((1, 2),), "d") for number in range(9)]
    short = condense([*flat, *same], 20)
    assert [one for one in short if one.kind == "duplicates"] == same  # they decide which windows are left
    (told,) = [one for one in short if one.kind == "zero_variance"]
    assert (told.trajectory, told.frames) == (None, ((0, 9),))
    assert told.detail.startswith("in 9 of 20 trajectories")


def test_what_splits_have_in_common_stands_in_one_line() -> None:
    grid = Finding("grid", "note", "", None, None, (), "32x32, the card says 64x64")
    flat = Finding("constant_channel", "warning", "", None, "B", (), "0 at every point of every frame")
    found = [("a", "train", grid), ("a", "train", flat), ("a", "test", grid), ("b", "test", grid)]
    assert [re.split(r"\s{2,}", line) for line in findings_table(found, None).splitlines()[1:]] == [
        ["a", "train", "warning", "constant_channel", "B: 0 at every point of every frame"],
        ["a", "train,test", "note", "grid", "whole split: 32x32, the card says 64x64"],
        ["b", "test", "note", "grid", "whole split: 32x32, the card says 64x64"],
    ]
    short = findings_table(found, 4).splitlines()
    assert len(short) == 3
    assert short[-1].startswith("not shown: 3 notes;")


def test_command(well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(well), "--jobs", "1"]) == 0
    assert capsys.readouterr().out.endswith("notes in 5 trajectories, 45 frames\n")
    with h5py.File(split_files(well / "shear_flow", "valid")[0], "r+") as file:
        file["t0_fields/tracer"][0, 2, 0, 0] = np.nan
    report = tmp_path / "report.json"
    assert main(["audit", str(well), "--splits", "valid,test", "--jobs", "1", "--json", str(report)]) == 2
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "nonfinite" in line)
    assert line.split()[:4] == ["shear_flow", "valid", "error", "nonfinite"]
    assert "trajectory 0, tracer, frame 2" in line
    assert "1 error, 2 notes in 3 trajectories, 27 frames" in out
    content = json.loads(report.read_text())
    assert [(entry["split"], entry["num_frames"]) for entry in content] == [("valid", 9), ("test", 18)]
    assert content[0]["findings"][0]["kind"] == "nonfinite"
    assert content[0]["findings"][0]["frames"] == [[2, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"datasets": ["shear_flo"]}, "shear_flow"),
        ({"splits": ["dev"]}, "split 'dev': expected train"),
    ],
)
def test_nothing_to_audit(tiny_well: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        audit(tiny_well, REGISTRY, jobs=1, **arguments)
    with pytest.raises(UserError, match="expected datasets as"):
        audit(tiny_well / "nowhere", REGISTRY)
