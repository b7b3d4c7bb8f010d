"""What the tests of streamed shards share: small shards made by hand, readers of a URL, and batches to compare."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.remote import Retries
from data_pipeline.shards.format import Manifest, Shard, SourceFile, Trajectory
from data_pipeline.well.stats import DELTA_STATISTICS, VALUE_STATISTICS
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import open_readers, scheduled_batches, sources
from data_pipeline.windows.reader import Batch, ShardReader
from data_pipeline.windows.schedule import Schedule
from data_pipeline.windows.streaming import StreamSettings

MAZE = "acoustic_scattering_maze"
NAMES = [MAZE, "helmholtz_staircase", "shear_flow"]
QUICK = Retries(attempts=3, first_wait_seconds=0.01, timeout_seconds=5)
LENGTH = 3
BATCHES = 16
PER_CHUNK = 4  # frames
GRID = (16, 24)
FRAME_BYTES = 2 * 16 * 24 * 4  # of MAZE, and as many of its constant fields


def add(tar: tarfile.TarFile, name: str, content: bytes | np.ndarray) -> int:
    """Appends a member; returns where its bytes, or those of its array, begin."""
    file = io.BytesIO()
    np.save(file, content) if isinstance(content, np.ndarray) else file.write(content)
    info = tarfile.TarInfo(name)
    info.size = file.tell()
    start = tar.offset + 512 + info.size - memoryview(content).nbytes
    file.seek(0)
    tar.addfile(info, file)
    return start


def write_shard(path: Path, index: int, trajectories: list[np.ndarray], constants: int) -> tuple:
    """Stores two trajectories (T, C, H, W), each with random constant fields; returns their records and the shard's.

    It is a second writer of the format on purpose, with `tarfile` and `np.save` instead of `ShardWriter`: an
    independent reading of the contract, so that a mistake of the writer is not one that its readers share.
    """
    records = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, frames in enumerate(trajectories, 2 * index):
            fields = np.random.default_rng(number).random((constants, *GRID), np.float32)
            offsets, place, check = [], None, ""
            for first in range(0, len(frames), PER_CHUNK):
                key = f"traj{number}_frame{first}"
                offsets.append(add(tar, f"{key}.fields.npy", frames[first : first + PER_CHUNK]))
                if constants and first == 0:
                    place, check = add(tar, f"{key}.constants.npy", fields), f"{zlib.crc32(fields):08x}"
                add(tar, f"{key}.meta.json", json.dumps({"first_frame": first}).encode())
            checks, segments = "".join(f"{zlib.crc32(frame):08x}" for frame in frames), ((0, len(frames)),)
            one = (0, number, len(frames), 0.1, {}, index, tuple(offsets), checks, place, check, segments)
            records.append(Trajectory(*one))
    content = path.read_bytes()
    return records, Shard(path.name, len(content), hashlib.sha256(content).hexdigest())


def write_dataset(
    folder: Path, name: str, dtype: str, state: tuple[str, ...], constant: tuple[str, ...] = (), num_shards: int = 5
) -> None:
    """Train shards of random trajectories of 7 to 11 frames, two a shard."""
    rng = np.random.default_rng(len(name))
    lengths = rng.integers(7, 12, 2 * num_shards)
    frames = [rng.standard_normal((length, len(state), *GRID)).astype(dtype) for length in lengths]
    train = folder / name / "train"
    train.mkdir(parents=True)
    parts = [
        write_shard(train / f"shard-{index:06d}.tar", index, frames[2 * index :][:2], len(constant))
        for index in range(num_shards)
    ]
    Manifest(
        dataset=name,
        split="train",
        state_channels=state,
        constant_channels=constant,
        grid=GRID,
        boundary=(("PERIODIC", "PERIODIC"), ("WALL", "WALL")),
        dt=0.1,
        frames_per_chunk=PER_CHUNK,
        dtype=dtype,
        encoding={channel: (3.0, 0.5 + place) for place, channel in enumerate(state)} if dtype == "float16" else {},
        stats={one: dict.fromkeys(state + constant, 1.0) for one in VALUE_STATISTICS}
        | {one: dict.fromkeys(state, 1.0) for one in DELTA_STATISTICS},
        stats_source="the test",
        sources=(SourceFile("random.hdf5", 1, "none"),),
        trajectories=tuple(one for part in parts for one in part[0]),
        shards=tuple(part[1] for part in parts),
        findings=(),
        skip=(),
        converter="the test",
        plan="none",
    ).save(train / "manifest.json")


def settings(cache: Path, shuffle: str, **options: object) -> StreamSettings:
    arguments = {"shards_per_block": 2, "cache_bytes": 10**8, "draws_ahead": 4, "retries": QUICK} | options
    return StreamSettings(shuffle=shuffle, cache=cache, **arguments)


def batches(readers: dict[str, ShardReader], shuffle: str, **options: int) -> Iterator[Batch]:
    arguments = {"length": LENGTH, "start": 0, "stop": BATCHES} | options
    schedule = Schedule(sources(readers, LENGTH), batch=4, seed=5, shuffle=shuffle, shards_per_block=2)
    division = Division(schedule, arguments.pop("rank", 0), arguments.pop("world_size", 1))
    return scheduled_batches(readers, division, **arguments)


def assert_same(batch: Batch, other: Batch) -> None:
    assert (batch.dataset, batch.draw) == (other.dataset, other.draw)
    for name in ("windows", "fields", "constants"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), (batch.draw, name)


def assert_all_same(shards: Path, readers: dict[str, ShardReader], shuffle: str, **options: int) -> None:
    local = batches(open_readers(shards, NAMES, "train"), shuffle, **options | {"workers": 0})
    for expected, batch in zip(local, batches(readers, shuffle, **options), strict=True):
        assert_same(expected, batch)
