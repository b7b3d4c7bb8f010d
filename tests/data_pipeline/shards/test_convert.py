"""How the shards are written: the same bytes for ever, float16, chosen windows, subsets, little memory, from a URL."""

import errno
import io
import itertools
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from faulty_server import FaultyServer
from handmade_well import spread, write_file, write_stats
from test_build import contents

from data_pipeline import cli
from data_pipeline.cli import main
from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.shards.build import Built, build_shards
from data_pipeline.shards.format import Manifest
from data_pipeline.shards.plan import Settings
from data_pipeline.shards.review import audit
from data_pipeline.shards.tar import ShardWriter
from data_pipeline.well.hdf5 import split_files
from data_pipeline.windows.reader import ShardReader

CARDS = load_registry().cards
GRAY_SCOTT = CARDS["gray_scott_reaction_diffusion"]
STATISTICS = ("mean", "std", "rms", "mean_delta", "std_delta", "rms_delta")


def unit_stats(folder: Path, dataset: str, mean: float = 1.0, std: float = 1.0) -> None:
    card = CARDS[dataset]
    count = len(card.state_channels + card.constant_channels)
    figures = dict.fromkeys(STATISTICS, [std] * count) | {"mean": [mean] * count}
    write_stats(folder, card, figures)


def gray_scott_well(folder: Path, state: np.ndarray, split: str = "train", std: float = 1.0) -> Path:
    """A Well of one Gray-Scott file, (n, T, 2, H, W), with made-up statistics."""
    write_file(folder / GRAY_SCOTT.name / "data" / split / "one.hdf5", GRAY_SCOTT, state)
    unit_stats(folder / GRAY_SCOTT.name, GRAY_SCOTT.name, mean=0.5, std=std)
    return folder


def test_shards_have_the_bytes_they_always_had(tmp_path: Path) -> None:
    """Digests of the first version that wrote this format: what was converted before need not be again."""
    well = tmp_path / "well"
    for dataset, count, frames in (("viscoelastic_instability", 2, 7), ("acoustic_scattering_maze", 3, 5)):
        card = CARDS[dataset]
        state = spread((count, frames, len(card.state_channels), 24, 16))
        constants = spread((count, len(card.constant_channels), 24, 16), 1)
        write_file(well / dataset / "data" / "train" / "one.hdf5", card, state, constants)
        unit_stats(well / dataset, dataset)
    built = build_shards(well, tmp_path / "shards", jobs=1, settings=Settings(frames_per_chunk=3, shard_bytes=100_000))
    assert {one.manifest.dataset: [shard.sha256 for shard in one.manifest.shards] for one in built} == {
        "acoustic_scattering_maze": ["e08adbc9b3f95c6792b4a62d46ac6bfa0a50ca0d6babf6f8448d3c34eb3ad8a6"],
        "viscoelastic_instability": [
            "561c6dfe327a916a4ef50173a3f70285d6547b4b17f493e925d6899145ab4016",
            "2a98f381f1693d351d701a0661e0131001a55ba8c20a64224bce77ec84c514aa",
        ],
    }


class _FullForAMoment(io.FileIO):
    """A file whose disk has no room for writes of one size, and for others has."""

    refused = 0

    def write(self, content: Any) -> int:
        if len(content) == self.refused:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("refused", [4 * 7, 512, 1024])  # an array, a header, the end
def test_a_write_that_failed_is_never_lost(tmp_path: Path, refused: int) -> None:
    before = threading.active_count()
    with _FullForAMoment(tmp_path / "a.tar", "wb") as file, ShardWriter(file) as writer:
        file.refused = refused
        writer.add_array("a.npy", (7,), "float32", [np.arange(7, dtype="<f4")])  # nobody asks how it ended
        with pytest.raises(OSError, match="No space left"):
            writer.finish("a.tar")
    assert threading.active_count() == before


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Trajectory 0 with two duplicate frames, 1 with NaN in frame 6, 2 with a still tail of 11 frames, of 16 each."""
    state = spread((3, 16, 2, 32, 32))
    state[0, 3], state[0, 9] = state[0, 2], state[0, 8]
    state[1, 6, 1, 4, 4] = np.nan
    state[2, 5:] = state[2, 4] + 1e-5 * np.arange(1, 12, dtype=np.float32)[:, None, None, None]
    return gray_scott_well(tmp_path / "well", state)


def one(built: list[Built]) -> Built:
    (only,) = built
    return only


def test_windows_of_faults_are_left_out_on_request(faulty: Path, tmp_path: Path) -> None:
    manifest = one(build_shards(faulty, tmp_path / "a", jobs=1, skip=["nonfinite"])).manifest
    assert [trajectory.segments for trajectory in manifest.trajectories] == [((0, 16),), ((0, 6), (7, 16)), ((0, 16),)]
    assert (manifest.skip, manifest.num_windows(2), manifest.num_skipped_windows(2)) == (("nonfinite",), 43, 2)
    skip = ["stationary", "nonfinite", "duplicates"]
    every = one(build_shards(faulty, tmp_path / "b", jobs=1, skip=skip)).manifest
    assert [trajectory.segments for trajectory in every.trajectories] == [
        ((0, 3), (3, 9), (9, 16)),
        ((0, 6), (7, 16)),
        ((0, 5),),
    ]
    assert every.num_skipped_windows(2) == 2 + 2 + 11
    reader = ShardReader(tmp_path / "b", GRAY_SCOTT.name, "train")
    assert len(reader.index(2)) == 45 - 15
    assert every.shards == manifest.shards


def test_another_skip_writes_the_manifest_alone(faulty: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = one(build_shards(faulty, out, jobs=1, skip=["nonfinite"]))
    shard = first.folder / "shard-000000.tar"
    before = (shard.stat().st_mtime_ns, (first.folder / "manifest.json").read_bytes())
    again = one(build_shards(faulty, out, jobs=1, skip=["nonfinite", "duplicates"]))
    assert (again.reused, again.windows_changed) == (True, True)
    assert again.manifest.num_skipped_windows(2) == 4
    assert Manifest.load(first.folder / "manifest.json") == again.manifest
    back = one(build_shards(faulty, out, jobs=1, skip=["nonfinite"]))
    assert (back.reused, back.windows_changed) == (True, True)
    assert (shard.stat().st_mtime_ns, (first.folder / "manifest.json").read_bytes()) == before
    with pytest.raises(
        UserError, match=r"one.hdf5, trajectory 1, channel B: NaN or Inf, in shards that were made with"
    ):
        build_shards(faulty, out, jobs=1)
    assert (first.folder / "manifest.json").read_bytes() == before[1]


def test_nonfinite_values_stop_the_run_unless_skipped(faulty: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trajectory 1, field B \(B\), frame 6: .*got NaN or Inf.*--skip nonfinite"):
        build_shards(faulty, tmp_path / "out", jobs=1, skip=["duplicates"])
    (faulty / GRAY_SCOTT.name / "stats.yaml").unlink()
    with pytest.raises(UserError, match=r"frame 6: .*got NaN or Inf"):
        build_shards(faulty, tmp_path / "out", jobs=1)
    manifest = one(build_shards(faulty, tmp_path / "out", jobs=1, skip=["nonfinite"])).manifest
    with h5py.File(split_files(faulty / GRAY_SCOTT.name, "train")[0]) as file:
        values = np.delete(file["t0_fields/B"][()].reshape(48, 32, 32), 16 + 6, axis=0)
    assert manifest.stats["std"]["B"] == pytest.approx(values.std(dtype=np.float64), rel=1e-9)
    stored = ShardReader(tmp_path / "out", GRAY_SCOTT.name, "train").trajectory_frames(1, 6, 1)
    assert np.isnan(stored).sum() == 1


@pytest.mark.filterwarnings("error")
def test_infinite_values_are_left_out_without_a_word(tmp_path: Path) -> None:
    state = spread((2, 12, 2, 16, 16))
    state[1, 4:6, 0, 3, 3], state[1, 6, 0, 3, 3] = np.inf, -np.inf
    well = gray_scott_well(tmp_path / "well", state)
    (well / GRAY_SCOTT.name / "stats.yaml").unlink()
    manifest = one(
        build_shards(well, tmp_path / "out", jobs=1, skip=["nonfinite"], settings=Settings(dtype="float16"))
    ).manifest
    assert manifest.trajectories[1].segments == ((0, 4), (7, 12))


def test_float16_shards_of_values_at_the_end_of_their_range_give_no_alarm(tmp_path: Path) -> None:
    """Rounding takes a concentration of 0, or of -0.1, a little below."""
    state = spread((2, 12, 2, 16, 16)) - np.float32(0.1)
    state[0, :, :, 4, 4] = -0.1
    well = gray_scott_well(tmp_path / "well", state)
    manifest = one(build_shards(well, tmp_path / "out", jobs=1, settings=Settings(dtype="float16"))).manifest
    reader = ShardReader(tmp_path / "out", GRAY_SCOTT.name, "train")
    assert reader.trajectory_frames(0, 0, 1).min() < np.float32(-0.1)
    assert {finding.kind for finding in manifest.findings} & {"out_of_range"} == set()
    (review,) = audit(tmp_path / "out", load_registry(), jobs=1)
    assert "out_of_range" not in {finding.kind for finding in review.findings}


def test_float16_holds_the_values_to_a_thousandth_of_their_std(tiny_well: Path, tmp_path: Path) -> None:
    names = ["acoustic_scattering_maze", "viscoelastic_instability"]
    for name in names:
        shutil.copytree(tiny_well / name, tmp_path / "well" / name)
    build_shards(tmp_path / "well", tmp_path / "full", splits=["test"], jobs=1, settings=Settings(frames_per_chunk=4))
    half = build_shards(
        tmp_path / "well",
        tmp_path / "half",
        splits=["test"],
        jobs=1,
        settings=Settings(frames_per_chunk=4, dtype="float16"),
    )
    for name, built in zip(names, half, strict=True):
        manifest = built.manifest
        exact, reader = (ShardReader(tmp_path / folder, name, "test", verify=True) for folder in ("full", "half"))
        values, stored = exact.trajectory_frames(0, 0, 9), reader.trajectory_frames(0, 0, 9)
        for number, channel in enumerate(manifest.state_channels):
            assert manifest.encoding[channel] == pytest.approx(
                (manifest.stats["mean"][channel], manifest.stats["std"][channel]), rel=1e-6
            )
            worst = np.abs(values[:, number] - stored[:, number]).max() / manifest.stats["std"][channel]
            told = next(f.detail for f in manifest.findings if (f.kind, f.channel) == ("rounding", channel))
            assert worst < 1e-2
            assert f"at most {worst:.2g} std" in told
        assert np.array_equal(exact.constants(0), reader.constants(0))
        shards = [sum(shard.bytes for shard in r.manifest.shards) for r in (exact, reader)]
        assert shards[1] < 0.75 * shards[0]
        meta = next(iter_meta(built.folder / "shard-000000.tar"))
        assert {channel: tuple(pair) for channel, pair in meta["encoding"].items()} == manifest.encoding


def iter_meta(shard: Path):
    import webdataset

    for sample in webdataset.WebDataset([str(shard)], shardshuffle=False).decode():
        assert sample["fields.npy"].dtype == np.float16
        yield sample["meta.json"]


@pytest.mark.parametrize(
    ("value", "std", "message"),
    [
        (
            60.0,
            1.0,
            r"one.hdf5: trajectory 1, frames from 0 on: channel B: a value is off by 0.01\d* std .*at most 0.01",
        ),
        (1e9, 1.0, "channel B: a value overflows as float16"),
        (5.0, 1e-8, "channel B: a value overflows as float16"),
    ],
)
def test_float16_that_would_blur_is_refused(tmp_path: Path, value: float, std: float, message: str) -> None:
    state = np.full((2, 5, 2, 32, 32), 0.5, np.float32)
    state[1, 3, 1, 7, 7] = value + 0.013
    well = gray_scott_well(tmp_path / "well", state, std=std)
    with pytest.raises(UserError, match=message):
        build_shards(well, tmp_path / "out", jobs=1, settings=Settings(dtype="float16"))
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_restricted_sets_are_nested(tiny_well: Path, tmp_path: Path) -> None:
    well = gray_scott_well(tmp_path / "well", spread((6, 3, 2, 16, 16)))
    chosen = []
    for limit in (1, 3, 5, 6, 9):
        manifest = one(build_shards(well, tmp_path / str(limit), jobs=1, settings=Settings(restrict=limit))).manifest
        chosen.append([trajectory.source_index for trajectory in manifest.trajectories])
        assert chosen[-1] == sorted(chosen[-1])
        assert manifest.stats["mean"]["A"] == 0.5
        frames = ShardReader(tmp_path / str(limit), GRAY_SCOTT.name, "train").trajectory_frames(0, 0, 3)
        assert np.array_equal(frames, spread((6, 3, 2, 16, 16))[chosen[-1][0]])
    assert [len(numbers) for numbers in chosen] == [1, 3, 5, 6, 6]
    assert all(set(small) <= set(large) for small, large in itertools.pairwise(chosen))
    assert chosen[3] == list(range(6))


def test_a_reader_takes_the_windows_that_restricted_shards_have(tmp_path: Path) -> None:
    well = gray_scott_well(tmp_path / "well", spread((6, 5, 2, 16, 16)))
    # Several shards, some then without a window.
    build_shards(well, tmp_path / "all", jobs=1, settings=Settings(shard_bytes=40_000))
    everything = ShardReader(tmp_path / "all", GRAY_SCOTT.name, "train")
    assert len(everything.index(3).shard_windows) > 1
    for limit in (1, 2, 4, 6):
        build_shards(well, tmp_path / str(limit), jobs=1, settings=Settings(restrict=limit))
        stored = ShardReader(tmp_path / str(limit), GRAY_SCOTT.name, "train")
        restricted = everything.restricted_to(limit)
        windows = np.arange(3 * limit)  # of three frames out of five
        assert len(restricted.index(3)) == len(stored.index(3)) == 3 * limit == sum(restricted.index(3).shard_windows)
        assert np.array_equal(restricted.batch(windows, 3).fields, stored.batch(windows, 3).fields)
        assert restricted.manifest.digest == everything.manifest.digest
    assert len(everything.index(3)) == 18
    with pytest.raises(UserError, match=r"expected 1 to 6 trajectories of gray_scott_reaction_diffusion, .* got 7"):
        everything.restricted_to(7)


def test_blocks_and_chunks_do_not_change_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of 0.5 MiB: seven fit a block, so chunks of 16 and of 5 are both cut."""
    state = spread((1, 18, 2, 256, 256))
    well = gray_scott_well(tmp_path / "well", state)
    for per_chunk in (16, 5):
        out = tmp_path / str(per_chunk)
        build_shards(well, out, jobs=1, settings=Settings(frames_per_chunk=per_chunk))
        reader = ShardReader(out, GRAY_SCOTT.name, "train", verify=True)
        assert np.array_equal(reader.trajectory_frames(0, 0, 18), state[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_trajectory(tmp_path: Path) -> None:
    """A child converts 18 and 180 MB: HDF5, Python and a few blocks, but no trajectory and no chunk."""
    peaks = []
    for frames in (9, 90):
        state = np.broadcast_to(spread((1, 1, 2, 512, 512)), (1, frames, 2, 512, 512))
        well = gray_scott_well(tmp_path / f"well{frames}", state)
        program = (
            "import sys\n"
            "from data_pipeline.shards.build import build_shards\n"
            "from data_pipeline.shards.plan import Settings\n"
            "build_shards(sys.argv[1], sys.argv[2], jobs=1, settings=Settings(frames_per_chunk=64))\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        command = [sys.executable, "-c", program, str(well), str(tmp_path / f"out{frames}")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)  # MiB; rusage would count the parent's memory before exec, too
    assert peaks[1] < 250
    assert peaks[1] < peaks[0] + 25


def test_dry_run_writes_nothing_and_is_right(
    tiny_well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["shard", "--well", str(tiny_well), "--out", str(out), "--datasets", "shear_flow", "--jobs", "1"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not out.exists()
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()[1:4]]
    assert "nothing was written" in text
    assert "GB free" in text
    assert "reading and checking without writing" in text
    assert main(arguments) == 0
    capsys.readouterr()
    for row, split in zip(rows, ("train", "valid", "test"), strict=True):
        manifest = Manifest.load(out / "shear_flow" / split / "manifest.json")
        num_bytes = sum(shard.bytes for shard in manifest.shards)
        assert row[:2] == ["shear_flow", split]
        counts = [len(manifest.sources), len(manifest.trajectories), manifest.num_windows(2), len(manifest.shards)]
        assert list(map(int, row[2:6])) == counts
        assert float(row[6]) == pytest.approx(num_bytes / 1e6, abs=0.1)
    before = contents(out)
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("already there") == 3
    assert main([*arguments, "--dry-run", "--frames-per-chunk", "3"]) == 2  # as without --dry-run
    assert "holds shards of other files or settings" in capsys.readouterr().err
    assert contents(out) == before


def test_shard_says_what_it_found_and_left_out(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["shard", "--well", str(faulty), "--out", str(tmp_path / "out"), "--jobs", "1", "--shard-size", "1K"]
    assert main([*arguments, "--skip", "nonfinite,stationary"]) == 0
    text = capsys.readouterr().out
    assert ": written, 3 shards, " in text
    assert re.search(r", \d errors, \d warnings, ", text)
    assert "13 windows left out (nonfinite, stationary)" in text
    assert main([*arguments, "--skip", "nonfinite"]) == 0
    assert "already there, windows chosen again" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-4:] == ["y", "findings", "skipped", "share"]
    assert lines[1].split()[-2:] == ["2", "1.000"]
    assert any("nonfinite" in line and "trajectory 1, B, frame 6" in line for line in lines)
    assert not any(line.split()[2:3] == ["note"] for line in lines)
    assert main(["inspect", str(tmp_path / "out"), "--findings"]) == 0
    assert any(line.split()[2:3] == ["note"] for line in capsys.readouterr().out.splitlines())


def test_a_well_behind_a_url_gives_the_same_shards(tiny_well: Path, tmp_path: Path) -> None:
    names = ["helmholtz_staircase", "shear_flow"]
    with FaultyServer(tiny_well) as server:
        server.fail("shear_flow/data/test/*", "drop", first=2, times=1)
        built = build_shards(
            server.url, tmp_path / "far", names, ["valid", "test"], jobs=2, settings=Settings(frames_per_chunk=4)
        )
    assert all(not one.reused for one in built)
    build_shards(tiny_well, tmp_path / "near", names, ["valid", "test"], jobs=1, settings=Settings(frames_per_chunk=4))
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"well": "pipe:cat x"}, "expected a local path or a URL"),
        ({"well": "file:///etc"}, "expected a local path or a URL"),
        ({"out": "https://example.org/x"}, "expected a local folder for the shards"),
        ({"skip": ["grid"]}, "skip: expected nonfinite, duplicates, stationary, got 'grid'"),
    ],
)
def test_wrong_options(tiny_well: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_shards(**({"well": tiny_well, "out": tmp_path} | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames_per_chunk": 0}, "frames_per_chunk: expected at least 1"),
        ({"dtype": "int8"}, "dtype: expected float32 or float16, got 'int8'"),
        ({"restrict": 0}, "restrict: expected at least 1, got 0"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**settings)


@pytest.mark.parametrize(("text", "num_bytes"), [("512M", 2**29), ("1.5K", 1536), ("2g", 2**31), ("77", 77)])
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert cli.num_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5"])
def test_jobs_that_are_none_are_refused(
    text: str, tiny_well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["audit", str(tiny_well)],
        ["shard", "--well", str(tiny_well), "--out", str(tmp_path), "--dry-run"],
    ):
        with pytest.raises(SystemExit):
            main([*command, f"--jobs={text}"])
        assert "expected a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["512Q", "", "-1M", "0", "M", "infG", "nan"])
def test_a_size_that_is_none_is_refused(
    text: str, tiny_well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["shard", "--well", str(tiny_well), "--out", str(tmp_path), f"--shard-size={text}"])
    assert stopped.value.code == 2
    assert "expected a size such as 512M or 1G" in capsys.readouterr().err
