"""Shards hold the source's values bit for bit, whatever happens on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset
from handmade_well import spread, write_file

from data_pipeline.errors import UserError
from data_pipeline.files import only_process
from data_pipeline.registry import load_registry
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.format import Manifest
from data_pipeline.shards.plan import Settings
from data_pipeline.well.hdf5 import split_files
from data_pipeline.windows.reader import ShardReader

CARDS = {card.name: card for card in load_registry().select(None)}  # of the eight
SPLITS = ("train", "valid", "test")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden and temporary ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def source_trajectories(well: Path, dataset: str, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(T, C, H, W) and (K, H, W) of each trajectory, put together by field name from the HDF5 files alone."""
    found = []
    for path in split_files(well / dataset, split):
        with h5py.File(path) as file:
            for trajectory in range(int(file.attrs["n_trajectories"])):
                state, constant = [], []
                for field in CARDS[dataset].fields:
                    data = file[f"t{field.order}_fields/{field.name}"]
                    values = data[trajectory] if data.attrs["sample_varying"] else data[()]
                    shape = (*values.shape[: values.ndim - field.order], -1)
                    target = state if field.role == "state" else constant
                    target.extend(np.moveaxis(values.reshape(shape), -1, 0))
                found.append((np.stack(state, axis=1), np.array(constant)))
    return found


@pytest.mark.parametrize("dataset", CARDS)
def test_values_are_the_source_bit_for_bit(tiny_well: Path, tiny_shards: Path, dataset: str) -> None:
    for split in SPLITS:
        reader = ShardReader(tiny_shards, dataset, split, verify=True)
        source = source_trajectories(tiny_well, dataset, split)
        assert reader.num_trajectories == len(source) > 0
        for trajectory, (fields, constants) in enumerate(source):
            stored = reader.trajectory_frames(trajectory, 0, reader.num_frames(trajectory))
            assert stored.tobytes() == np.ascontiguousarray(fields).tobytes()
            assert reader.constants(trajectory).tobytes() == constants.astype(np.float32).tobytes()


def test_field_order_of_one_file_does_not_reach_the_batch(tiny_well: Path, tmp_path: Path) -> None:
    well = tmp_path / "well"
    shutil.copytree(tiny_well / "active_matter", well / "active_matter")
    with h5py.File(split_files(well / "active_matter", "train")[-1], "r+") as file:
        file["t2_fields"].attrs["field_names"] = ["E", "D"]
    build_shards(well, tmp_path / "shards", splits=["train"], jobs=1)
    reader = ShardReader(tmp_path / "shards", "active_matter", "train")
    batch = reader.batch(np.arange(len(reader.index(9))), 9)
    expected = [fields for fields, _ in source_trajectories(tiny_well, "active_matter", "train")]
    assert len(expected) == 2
    assert np.array_equal(batch.fields, np.stack(expected))


def test_webdataset_reads_the_shards(tiny_well: Path, tiny_shards: Path) -> None:
    folder = tiny_shards / "acoustic_scattering_maze" / "train"
    files = [str(folder / shard.name) for shard in Manifest.load(folder / "manifest.json").shards]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    source = source_trajectories(tiny_well, "acoustic_scattering_maze", "train")
    assert [sample["__key__"] for sample in samples[:3]] == [f"traj00000_frame{first:05d}" for first in (0, 4, 8)]
    assert len(samples) == 3 * len(source)
    for sample in samples:
        meta = sample["meta.json"]
        fields, constants = source[meta["trajectory"]]
        first = meta["first_frame"]
        assert np.array_equal(sample["fields.npy"], fields[first : first + 4])
        assert meta["state_channels"] == ["pressure", "velocity_x", "velocity_y"]
        assert meta["boundary"] == [["WALL", "OPEN"], ["WALL", "OPEN"]]
        assert len(meta["time"]) == len(sample["fields.npy"])
        assert ("constants.npy" in sample) == (first == 0)
        if first == 0:
            assert np.array_equal(sample["constants.npy"], constants)


def test_tar_has_no_dates_and_offsets_are_true(tiny_shards: Path) -> None:
    folder = tiny_shards / "helmholtz_staircase" / "test"
    manifest = Manifest.load(folder / "manifest.json")
    arrays = {}
    with tarfile.open(folder / "shard-000000.tar") as tar:
        for member in tar.getmembers():
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            if member.name.endswith("fields.npy"):
                content = tar.extractfile(member).read()
                arrays[member.offset_data + 128] = content[128:]
                assert content[:6] == b"\x93NUMPY"
    for trajectory in manifest.trajectories:
        for chunk, offset in enumerate(trajectory.offsets):
            frames = min(4, trajectory.frames - 4 * chunk)
            assert len(arrays.pop(offset)) == frames * manifest.frame_bytes
    assert not arrays


def test_manifest_says_what_the_data_are(tiny_shards: Path) -> None:
    manifest = Manifest.load(tiny_shards / "rayleigh_benard" / "train" / "manifest.json")
    assert manifest.state_channels == ("buoyancy", "pressure", "velocity_x", "velocity_y")
    assert manifest.boundary == (("PERIODIC", "PERIODIC"), ("WALL", "WALL"))
    assert manifest.stats_source == "stats.yaml"
    assert set(manifest.stats) == {"mean", "std", "rms", "mean_delta", "std_delta", "rms_delta"}
    assert set(manifest.trajectories[0].scalars) == {"Rayleigh", "Prandtl"}
    assert manifest.dt > 0
    assert [finding.kind for finding in manifest.findings] == ["grid"]  # coarser than the card's on purpose
    assert len(manifest.digest) == 64


def test_bytes_do_not_depend_on_jobs(tiny_well: Path, tmp_path: Path) -> None:
    names = ["acoustic_scattering_maze", "gray_scott_reaction_diffusion"]
    for jobs in (1, 2):
        build_shards(tiny_well, tmp_path / str(jobs), names, ["train", "test"], jobs, settings=Settings(shard_bytes=1))
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two
    assert sum(name.endswith(".tar") for name in one) > 4


def test_finished_work_is_left_alone_and_new_work_is_added(tiny_well: Path, tmp_path: Path) -> None:
    build_shards(tiny_well, tmp_path, ["shear_flow"], ["valid"], jobs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    built = build_shards(tiny_well, tmp_path, ["shear_flow"], jobs=1)
    assert [(one.manifest.split, one.reused) for one in built] == [("train", False), ("valid", True), ("test", False)]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_duplicate_frames_are_found_across_chunks(tiny_well: Path, tmp_path: Path) -> None:
    well = tmp_path / "well"
    shutil.copytree(tiny_well / "shear_flow", well / "shear_flow")
    with h5py.File(split_files(well / "shear_flow", "valid")[0], "r+") as file:
        for name in ("t0_fields/tracer", "t0_fields/pressure", "t1_fields/velocity"):
            file[name][0, 4] = file[name][0, 3]  # across a chunk of 4
            file[name][0, 7] = file[name][0, 6]  # inside one
        file["t0_fields/tracer"][0, 2] = file["t0_fields/tracer"][0, 1]  # one field alone is no duplicate
    build_shards(well, tmp_path / "shards", splits=["valid"], jobs=1, settings=Settings(frames_per_chunk=4))
    manifest = Manifest.load(tmp_path / "shards" / "shear_flow" / "valid" / "manifest.json")
    duplicates = [one for one in manifest.findings if one.kind == "duplicates"]
    assert [(one.severity, one.trajectory, one.frames) for one in duplicates] == [("warning", 0, ((4, 5), (7, 8)))]
    assert sum(one.num_frames for one in manifest.findings if one.kind == "duplicates") == 2


def test_stats_are_computed_when_the_well_has_none(tiny_well: Path, tmp_path: Path) -> None:
    well = tmp_path / "well"
    shutil.copytree(tiny_well / "helmholtz_staircase", well / "helmholtz_staircase")
    (well / "helmholtz_staircase" / "stats.yaml").unlink()
    build_shards(well, tmp_path / "shards", splits=["valid"], jobs=1)
    build_shards(well, tmp_path / "shards", splits=["test"], jobs=1)
    valid, test = (
        Manifest.load(tmp_path / "shards" / "helmholtz_staircase" / split / "manifest.json")
        for split in ("valid", "test")
    )
    assert valid.stats_source == test.stats_source == "train files"
    fields = [fields for fields, _ in source_trajectories(well, "helmholtz_staircase", "train")]
    assert valid.stats["std"]["pressure_re"] == pytest.approx(np.std(np.stack(fields)[:, :, 0], dtype=np.float64))
    assert valid.stats == test.stats
    shutil.rmtree(well / "helmholtz_staircase" / "data" / "train")
    with pytest.raises(UserError, match=r"helmholtz_staircase: expected .*stats.yaml, or train files"):
        build_shards(well, tmp_path / "other", splits=["test"], jobs=1)


def _crop(well: Path, split: str) -> None:
    with h5py.File(split_files(well / "gray_scott_reaction_diffusion", split)[-1], "r+") as file:
        for name in ("t0_fields/A", "t0_fields/B"):
            values, attributes = file[name][:, :, :16], dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=values).attrs.update(attributes)
        attributes = dict(file["dimensions/x"].attrs)
        x = file["dimensions/x"][:16]
        del file["dimensions/x"]
        file.create_dataset("dimensions/x", data=x).attrs.update(attributes)


def _open_up(well: Path, split: str) -> None:
    with h5py.File(split_files(well / "gray_scott_reaction_diffusion", split)[-1], "r+") as file:
        next(iter(file["boundary_conditions"].values())).attrs["bc_type"] = "OPEN"


def _poison(well: Path, split: str) -> None:
    with h5py.File(split_files(well / "gray_scott_reaction_diffusion", split)[-1], "r+") as file:
        file["t0_fields/B"][0, 5, 2, 2] = np.nan


def _cut(well: Path, split: str) -> None:
    path = split_files(well / "gray_scott_reaction_diffusion", split)[-1]
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "split", "message"),
    [
        (_crop, "train", "expected one resolution, got 32x32 in .* and 16x32 in"),
        (_crop, "test", "expected one resolution, got 32x32 in .* and 16x32 in"),
        (_open_up, "train", "expected the same boundaries in all files of train"),
        (
            _poison,
            "test",
            r"hdf5 \(dataset gray_scott_reaction_diffusion\): trajectory 0, field B \(B\), frame 5: .*NaN",
        ),
        (_cut, "valid", r"hdf5 \(dataset gray_scott_reaction_diffusion\): cannot be read, so it is truncated"),
    ],
)
def test_bad_source_leaves_nothing_that_passes_for_whole(
    tiny_well: Path, tmp_path: Path, spoil, split: str, message: str
) -> None:
    well = tmp_path / "well"
    shutil.copytree(tiny_well / "gray_scott_reaction_diffusion", well / "gray_scott_reaction_diffusion")
    spoil(well, split)
    with pytest.raises(UserError, match=message):
        build_shards(well, tmp_path / "shards", jobs=1)
    folder = tmp_path / "shards" / "gray_scott_reaction_diffusion" / split
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob("*.tmp"))


def test_other_sources_or_settings_are_not_mixed(tiny_well: Path, tmp_path: Path) -> None:
    build_shards(tiny_well, tmp_path, ["shear_flow"], ["valid"], jobs=1)
    with pytest.raises(UserError, match="holds shards of other files or settings"):
        build_shards(tiny_well, tmp_path, ["shear_flow"], ["valid"], jobs=1, settings=Settings(frames_per_chunk=3))


def test_missing_shard_of_a_finished_split_is_reported(tiny_well: Path, tmp_path: Path) -> None:
    build_shards(tiny_well, tmp_path, ["shear_flow"], ["valid"], jobs=1)
    (tmp_path / "shear_flow" / "valid" / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000.tar: expected a shard of \d+ bytes.*remove the folder"):
        build_shards(tiny_well, tmp_path, ["shear_flow"], ["valid"], jobs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"datasets": ["shear_flo"]}, "shear_flo.*shear_flow"),
        ({"splits": ["dev"]}, "split 'dev': expected train, valid, test"),
        ({"jobs": 0}, "jobs: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(tiny_well: Path, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_shards(tiny_well, tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_folder_without_a_well(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected datasets as .*/<dataset>/data/<split>/\*.hdf5"):
        build_shards(tmp_path / "nowhere", tmp_path / "out")


def test_two_runs_do_not_write_the_same_folder(tiny_well: Path, tmp_path: Path) -> None:
    with only_process(tmp_path, "test"), pytest.raises(UserError, match="another `data-pipeline shard` is writing"):
        build_shards(tiny_well, tmp_path, ["shear_flow"], ["valid"], jobs=1)


@pytest.fixture(scope="module")
def long_well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gray-Scott files with 60 short trajectories, so that a run of one shard each takes a while."""
    well = tmp_path_factory.mktemp("long")
    path = well / "gray_scott_reaction_diffusion" / "data" / "train" / "one.hdf5"
    write_file(path, CARDS["gray_scott_reaction_diffusion"], spread((60, 6, 2, 32, 32)))
    return well


@pytest.fixture(scope="module")
def long_shards(long_well: Path) -> dict[str, bytes]:
    """What an undisturbed run over `long_well` writes."""
    out = long_well.parent / "undisturbed"
    build_shards(long_well, out, jobs=1, settings=Settings(shard_bytes=1))
    return contents(out)


def start(long_well: Path, out: Path, jobs: int, before: str = "") -> subprocess.Popen[str]:
    """A `data-pipeline shard` process that writes one shard per trajectory."""
    # As the command would, with shards smaller than its smallest.
    program = (
        f"import sys; {before}\n"
        "import data_pipeline.shards.build\n"
        "from data_pipeline.cli import main\n"
        "from data_pipeline.shards.plan import Settings\n"
        "build = data_pipeline.shards.build.build_shards\n"
        "def smaller(*arguments): return build(*arguments[:5], Settings(shard_bytes=1))\n"
        "data_pipeline.shards.build.build_shards = smaller\n"
        "if __name__ == '__main__': sys.exit(main())\n"
    )
    script = out.parent / "run.py"
    script.write_text(program)
    command = [sys.executable, str(script), "shard", "--well", str(long_well), "--out", str(out), "--jobs", str(jobs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_until(count: int, how: int, long_well: Path, out: Path, jobs: int) -> tuple[int, str]:
    """Sends a signal to a run that has written `count` shards; returns its exit status and what it said."""
    process = start(long_well, out, jobs)
    deadline = time.monotonic() + 30
    while len(list(out.glob("*/*/*.tar"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_run_again_gives_the_same_bytes(
    long_well: Path, long_shards: dict, tmp_path: Path, jobs: int
) -> None:
    out = tmp_path / "out"
    for count in (5, 25):
        assert run_until(count, signal.SIGKILL, long_well, out, jobs)[0] == -signal.SIGKILL
        assert not list(out.rglob("manifest.json"))
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar.json")}
    assert len(kept) >= 24
    build_shards(long_well, out, jobs=1, settings=Settings(shard_bytes=1))
    assert contents(out) == long_shards


def test_interrupted_run_says_so_and_goes_on(long_well: Path, long_shards: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, errors = run_until(5, signal.SIGINT, long_well, out, jobs=2)
    assert status == 130
    assert "interrupted: what was finished is kept" in errors
    assert "Traceback" not in errors
    assert not list(out.rglob("*.tmp"))
    build_shards(long_well, out, jobs=1, settings=Settings(shard_bytes=1))
    assert contents(out) == long_shards


@pytest.mark.parametrize("jobs", [1, 2])
def test_full_disk_ends_in_a_message(long_well: Path, long_shards: dict, tmp_path: Path, jobs: int) -> None:
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, resource.RLIM_INFINITY))"
    process = start(long_well, out, jobs, before=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: " in errors
    assert "shard-00000" in errors
    assert "the disk or the quota is full" in errors
    assert "Traceback" not in errors
    assert set(contents(out)) <= {"gray_scott_reaction_diffusion/stats.json"}  # the statistics were whole
    build_shards(long_well, out, jobs=1, settings=Settings(shard_bytes=1))
    assert contents(out) == long_shards


def test_records_of_another_plan_are_not_used(long_well: Path, long_shards: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(5, signal.SIGKILL, long_well, out, jobs=1)
    folder = out / "gray_scott_reaction_diffusion" / "train"
    for record in (folder / ".partial").glob("*.json"):  # a torn one beside them has another suffix
        content = json.loads(record.read_text())
        record.write_text(json.dumps(content | {"plan": "0" * 64}))
    (folder / "shard-009999.tar").write_bytes(b"left by a run with more shards")
    build_shards(long_well, out, jobs=1, settings=Settings(shard_bytes=1))
    assert contents(out) == long_shards
