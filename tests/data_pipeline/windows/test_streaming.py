"""Shards behind a URL give the batches of the local ones, whatever the server does, or a message."""

import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from faulty_server import FaultyServer

from data_pipeline.errors import UserError
from data_pipeline.records import canonical, digest
from data_pipeline.remote import Retries
from data_pipeline.shards.manifest import Manifest, Shard, SourceFile, Trajectory
from data_pipeline.well.stats import DELTA_STATISTICS, VALUE_STATISTICS
from data_pipeline.windows import fetching
from data_pipeline.windows.batch import Batch
from data_pipeline.windows.blocks import WholeShards
from data_pipeline.windows.loader import open_readers, scheduled_batches, sources
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Schedule
from data_pipeline.windows.streaming import StreamSettings, default_cache

MAZE = "acoustic_scattering_maze"
NAMES = [MAZE, "helmholtz_staircase", "shear_flow"]
QUICK = Retries(attempts=3, first_wait_seconds=0.01, timeout_seconds=5)
ALWAYS = float("inf")
LENGTH = 3
BATCHES = 16
PER_CHUNK = 4  # frames
GRID = (16, 24)
FRAME_BYTES = 2 * 16 * 24 * 4  # of MAZE, and as many of its constant fields


def add(tar: tarfile.TarFile, name: str, content: bytes, skip: int = 0) -> int:
    """Appends a member; returns where its content begins, behind `skip` bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    start = tar.offset + 512
    tar.addfile(info, io.BytesIO(content))
    return start + skip


def add_array(tar: tarfile.TarFile, name: str, values: np.ndarray) -> int:
    file = io.BytesIO()
    np.save(file, values)
    return add(tar, name, file.getvalue(), len(file.getvalue()) - values.nbytes)


def crc32(values: np.ndarray) -> str:
    return f"{zlib.crc32(values.tobytes()):08x}"


def write_shard(path: Path, index: int, trajectories: dict[int, np.ndarray], constants: int) -> tuple:
    """Stores trajectories (T, C, H, W), each with random constant fields, in one shard, by other means than ours."""
    records = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, frames in trajectories.items():
            offsets, place, check = [], None, ""
            for first in range(0, len(frames), PER_CHUNK):
                key = f"traj{number}_frame{first}"
                offsets.append(add_array(tar, f"{key}.fields.npy", frames[first : first + PER_CHUNK]))
                if constants and first == 0:
                    fields = np.random.default_rng(number).random((constants, *frames.shape[2:]), np.float32)
                    place, check = add_array(tar, f"{key}.constants.npy", fields), crc32(fields)
                add(tar, f"{key}.meta.json", json.dumps({"first_frame": first}).encode())
            checks, segments = "".join(map(crc32, frames)), ((0, len(frames)),)
            one = (0, number, len(frames), 0.1, {}, index, tuple(offsets), checks, place, check, segments)
            records.append(Trajectory(*one))
    content = path.read_bytes()
    return tuple(records), Shard(path.name, len(content), hashlib.sha256(content).hexdigest())


def write_dataset(folder: Path, name: str, dtype: str, state: tuple[str, ...], constant: tuple[str, ...]) -> None:
    """Ten random trajectories of 7 to 11 frames, two a shard."""
    rng = np.random.default_rng(len(name))
    lengths = rng.integers(7, 12, 10)
    frames = [rng.standard_normal((length, len(state), *GRID)).astype(dtype) for length in lengths]
    folder.mkdir(parents=True)
    parts = [
        write_shard(
            folder / f"shard-{index:06d}.tar", index, {n: frames[n] for n in (2 * index, 2 * index + 1)}, len(constant)
        )
        for index in range(5)
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
    ).save(folder / "manifest.json")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train shards of three datasets, one with constant fields, one stored as float16. Read only."""
    folder = tmp_path_factory.mktemp("streamed") / "shards"
    write_dataset(folder / MAZE / "train", MAZE, "float32", ("pressure", "velocity_x"), ("density", "speed_of_sound"))
    write_dataset(folder / "helmholtz_staircase" / "train", "helmholtz_staircase", "float16", ("pressure_re",), ())
    write_dataset(folder / "shear_flow" / "train", "shear_flow", "float32", ("tracer", "pressure", "velocity_x"), ())
    return folder


@pytest.fixture
def server(shards: Path) -> Iterator[FaultyServer]:
    with FaultyServer(shards) as server:
        yield server


def settings(cache: Path, shuffle: str, **options: object) -> StreamSettings:
    arguments = {"shards_per_block": 2, "cache_bytes": 10**8, "draws_ahead": 4, "retries": QUICK} | options
    return StreamSettings(shuffle=shuffle, cache=cache, **arguments)


def batches(readers: dict[str, ShardReader], shuffle: str, **options: int) -> Iterator[Batch]:
    arguments = {"length": LENGTH, "rank": 0, "world_size": 1, "start": 0, "stop": BATCHES} | options
    schedule = Schedule(sources(readers, LENGTH), batch=4, seed=5, shuffle=shuffle, shards_per_block=2)
    return scheduled_batches(readers, schedule, **arguments)


def assert_same(batch: Batch, other: Batch) -> None:
    assert (batch.dataset, batch.draw) == (other.dataset, other.draw)
    for name in ("windows", "fields", "constants"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), (batch.draw, name)


def assert_all_same(shards: Path, readers: dict[str, ShardReader], shuffle: str, **options: int) -> None:
    local = batches(open_readers(shards, NAMES, "train"), shuffle, **options | {"workers": 0})
    for expected, batch in zip(local, batches(readers, shuffle, **options), strict=True):
        assert_same(expected, batch)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_batches_are_those_of_the_local_shards(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str, workers: int
) -> None:
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, shuffle))
    assert_all_same(shards, readers, shuffle, workers=workers)
    assert_all_same(shards, readers, shuffle, workers=workers, start=7)


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_single_reads_and_long_windows_are_those_of_the_local_shards(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str
) -> None:
    options = settings(tmp_path, shuffle, draws_ahead=0)
    reader, local = (open_readers(at, [MAZE], "train", True, options)[MAZE] for at in (server.url, shards))
    assert np.array_equal(reader.trajectory_frames(1, 2, 5), local.trajectory_frames(1, 2, 5))
    assert np.array_equal(reader.constants(2), local.constants(2))
    ids = np.array([0, 3, 0, 1])
    assert_same(reader.batch(ids, 5), local.batch(ids, 5))
    with pytest.raises(IndexError, match=r"trajectory 0 has \d+ frames, not 5:25"):
        reader.trajectory_frames(0, 5, 20)
    assert reader.traffic.bytes_used == (5 + 1 + 4 * (5 + 1)) * FRAME_BYTES


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_batches_are_the_same_with_no_look_ahead_and_many_threads(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str
) -> None:
    """Shards are unmapped and removed from the cache all the time."""
    options = settings(tmp_path, shuffle, draws_ahead=0, shards_per_block=1, cache_bytes=250_000)
    readers = open_readers(server.url, NAMES, "train", stream=options)
    for reader in readers.values():
        if isinstance(reader.source, WholeShards):
            reader.source._fetcher.num_maps = 1
    assert_all_same(shards, readers, shuffle, workers=4, stop=60)


def test_shards_are_announced_while_others_are_mapped_and_unmapped(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "utime", lambda path: time.sleep(0.001))  # as a disk takes its time
    source = open_readers(server.url, [MAZE], "train", stream=settings(tmp_path, "blocks"))[MAZE].source
    assert isinstance(source, WholeShards)
    fetcher, ended = source._fetcher, threading.Event()
    fetcher.num_maps = 3

    def announce() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            fetcher.announce(source, number, set(range(5)))
            fetcher._announced.clear()

    with ThreadPoolExecutor(1) as pool:
        announcing = pool.submit(announce)
        for number in range(100):
            with fetcher.hold(source, None, {number % 5}):
                pass
        ended.set()
        announcing.result(30)


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_abandoned_loader_announced_does_not_stay(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str, workers: int
) -> None:
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, shuffle))
    stream = batches(readers, shuffle, workers=workers)
    next(stream)
    fetcher = readers[MAZE].source._fetcher  # type: ignore[attr-defined]
    assert fetcher._announced
    del stream
    assert not fetcher._announced
    assert_all_same(shards, readers, shuffle, workers=workers, start=3)
    assert not fetcher._announced
    if shuffle == "global":
        assert (fetcher._held, fetcher._held_bytes) == ({}, 0)


def test_without_a_list_of_datasets_the_known_ones_are_tried(server: FaultyServer, tmp_path: Path) -> None:
    stream = settings(tmp_path, "global")
    assert list(open_readers(server.url, None, "train", stream=stream, known=["unknown", *NAMES])) == NAMES
    with pytest.raises(UserError, match=rf"no valid shards under {server.url}.*\n  {server.url}/{MAZE}/valid/manifest"):
        open_readers(server.url, None, "valid", stream=stream, known=NAMES)
    with pytest.raises(UserError, match=rf"did not find,\n  {server.url}/unknown/train/manifest.json"):
        open_readers(server.url, ["unknown", MAZE], "train", stream=stream)


def test_neighbouring_ranges_are_one_request(server: FaultyServer, tmp_path: Path) -> None:
    reader = open_readers(server.url, ["shear_flow"], "train", stream=settings(tmp_path, "global"))["shear_flow"]
    server.reset()
    reader.batch(np.array([0, 2, 3]), LENGTH)  # frames 0 to 5: the last chunk's and the next one's, in one shard
    assert server.total_requests == 1
    manifest = reader.manifest
    offsets = manifest.trajectories[0].offsets
    assert server.ranges == [(
        "shear_flow/train/shard-000000.tar", f"bytes={offsets[0]}-{offsets[1] + 2 * manifest.frame_bytes - 1}"
    )]  # fmt: skip
    assert reader.traffic.requests == 2  # and one for the size of the shard
    assert reader.traffic.bytes_fetched == server.total_sent
    reader.batch(np.array([0, 1, 2, 3]), LENGTH)
    assert server.total_requests == 1  # all frames are in the cache on disk


def test_frames_are_fetched_ahead_of_the_schedule(server: FaultyServer, tmp_path: Path) -> None:
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, "global", cache_bytes=0))
    stream = batches(readers, "global")
    next(stream)
    deadline = time.monotonic() + 30
    while len({path for path, _ in server.ranges if path.endswith(".tar")}) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len({path for path, _ in server.ranges if path.endswith(".tar")}) >= 6  # a draw touches at most four
    assert not list(tmp_path.iterdir())  # a cache of 0 bytes is none


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_failures_of_the_server_change_nothing(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str
) -> None:
    for number in range(1, 60):
        server.fail("*", ("500", "drop", "truncate")[number % 3], first=7 * number)
    patient = Retries(attempts=8, first_wait_seconds=0.01, timeout_seconds=5)
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, shuffle, retries=patient))
    assert_all_same(shards, readers, shuffle, workers=2)
    assert server.total_requests > 7


def test_a_server_without_ranges_serves_blocks_only(shards: Path, server: FaultyServer, tmp_path: Path) -> None:
    server.fail("*", "no_range", times=ALWAYS)
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, "global"))
    with pytest.raises(UserError, match=r"shard-000\d+.tar: the server sends the whole file .*`sampling.shuffle: bl"):
        list(batches(readers, "global"))
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, "blocks"))
    assert_all_same(shards, readers, "blocks")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_a_server_that_stays_away_ends_in_a_message(
    server: FaultyServer, tmp_path: Path, shuffle: str, workers: int
) -> None:
    options = settings(tmp_path, shuffle, cache_bytes=600_000, draws_ahead=1)
    readers = open_readers(server.url, NAMES, "train", stream=options)
    stream = batches(readers, shuffle, stop=400, workers=workers)
    next(stream)
    server.fail("*", "503", times=ALWAYS, method="*")
    with pytest.raises(UserError) as caught:
        list(stream)
    message = str(caught.value)
    assert f"{server.url}/" in message
    assert "train/shard-000" in message
    assert "failed 3 times, the last time: the server answers 503" in message
    assert "\nThis was met by draw " in message
    assert f" of {LENGTH} frames of " in message


@pytest.fixture
def spoilt(shards: Path, tmp_path: Path) -> Iterator[FaultyServer]:
    """A server of a copy of one dataset, for a test to damage."""
    shutil.copytree(shards / MAZE, tmp_path / "served" / MAZE)
    with FaultyServer(tmp_path / "served") as server:
        yield server


@pytest.mark.parametrize(
    ("shuffle", "message"),
    [
        ("global", r"shard-000000.tar: damaged: bytes \d+ to \d+ have not the manifest's checksum"),
        ("blocks", r"shard-000000.tar: damaged: its SHA-256 is"),
    ],
)
def test_altered_content_is_refused(spoilt: FaultyServer, tmp_path: Path, shuffle: str, message: str) -> None:
    readers = open_readers(spoilt.url, [MAZE], "train", stream=settings(tmp_path / "cache", shuffle))
    path = spoilt.folder / MAZE / "train" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[readers[MAZE].manifest.trajectories[0].offsets[0] + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{spoilt.url}/{MAZE}/train/{message}"):
        readers[MAZE].batch(np.array([0]), 2)


def test_a_frame_that_was_damaged_in_the_cache_is_fetched_again(
    shards: Path, server: FaultyServer, tmp_path: Path
) -> None:
    reader = open_readers(server.url, [MAZE], "train", stream=settings(tmp_path, "global"))[MAZE]
    expected = open_readers(shards, [MAZE], "train")[MAZE].batch(np.array([1]), 2)
    assert_same(expected, reader.batch(np.array([1]), 2))
    for blob in (tmp_path / "blobs").iterdir():
        blob.write_bytes(bytes(blob.stat().st_size))
    server.reset()
    assert_same(expected, reader.batch(np.array([1]), 2))
    assert server.total_requests > 0
    server.reset()
    assert_same(expected, reader.batch(np.array([1]), 2))
    assert server.total_requests == 0


def rewrite(server: FaultyServer, change) -> None:
    """Changes the served manifest and makes its digest true again, as someone with bad intentions would."""
    path = server.folder / MAZE / "train" / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("digest")
    change(content)
    path.write_bytes(canonical(content | {"digest": digest(content)}))


def _claim_huge_frames(content: dict) -> None:
    content["grid"] = [10**6, 10**6]
    for shard in content["shards"]:
        shard["bytes"] = 10**17


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_claim_huge_frames, r"shard-000000.tar: expected a shard of 100000000000000000 bytes, the server has \d+"),
        (lambda content: content["shards"][0].update(name="../../secret"), "manifest.json: .*plain file name"),
        (lambda content: content["shards"][0].update(name="http://other/x"), "manifest.json: .*plain file name"),
        (lambda content: content["shards"][0].update(sha256="../x"), "shard-000000.tar: no SHA-256"),
        (lambda content: content.update(dataset="shear_flow"), "manifest.json: expected dataset acoustic"),
    ],
)
def test_hostile_manifest_is_refused(spoilt: FaultyServer, tmp_path: Path, shuffle: str, change, message: str) -> None:
    rewrite(spoilt, change)
    options = settings(tmp_path / "cache", shuffle, cache_bytes=10**19)
    with pytest.raises(UserError, match=message) as caught:
        open_readers(spoilt.url, [MAZE], "train", stream=options)[MAZE].batch(np.array([0]), 2)
    assert spoilt.url in str(caught.value)
    assert spoilt.total_sent < 300_000
    assert not list((tmp_path / "cache").glob("*/*.tar"))


def test_a_manifest_without_end_is_not_read(spoilt: FaultyServer) -> None:
    with (spoilt.folder / MAZE / "train" / "manifest.json").open("ab") as file:
        file.truncate(fetching.MANIFEST_LIMIT_BYTES + 1)  # a hole: it takes no space here
    with pytest.raises(UserError, match=r"manifest.json: expected a manifest of at most 67108864 bytes"):
        open_readers(spoilt.url, [MAZE], "train", stream=StreamSettings(retries=QUICK))
    assert spoilt.total_sent == 0


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_the_cache_keeps_its_limit_during_a_run(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str
) -> None:
    limit = 2 * max(path.stat().st_size for path in shards.rglob("*.tar")) * len(NAMES)  # a block of each
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, shuffle, cache_bytes=limit))
    local = batches(open_readers(shards, NAMES, "train"), shuffle, stop=60)
    held = []
    for expected, batch in zip(local, batches(readers, shuffle, stop=60), strict=True):
        assert_same(expected, batch)
        with (tmp_path / "used").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # while it is held, nothing is removed or given room
            held.append(sum(path.stat().st_size for path in (tmp_path / "blobs").iterdir()))
    assert max(held) <= limit
    assert max(held) > limit / 2
    assert server.total_sent > limit  # something had to go


def test_a_cache_too_small_for_a_block_is_refused_before_anything_is_fetched(
    server: FaultyServer, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        open_readers(server.url, NAMES, "train", stream=settings(tmp_path, "blocks", cache_bytes=100_000))
    for part in (f"{tmp_path}: the cache may hold 0.0001 GB", "one block of 2 shards", MAZE, "raise data.cache_gb"):
        assert part in str(caught.value)
    assert not [path for path in server.requests if path.endswith(".tar")]


def _read_rank(url: str, cache: Path, shuffle: str, rank: int, queue: "multiprocessing.Queue[object]") -> None:
    readers = open_readers(url, NAMES, "train", stream=settings(cache, shuffle))
    for batch in batches(readers, shuffle, rank=rank, world_size=2, workers=1):
        queue.put((rank, batch.draw, batch.windows.tolist(), float(batch.fields.double().sum())))


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_ranks_share_a_cache(shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[object] = context.Queue()
    arguments = (server.url, tmp_path, shuffle)
    ranks = [context.Process(target=_read_rank, args=(*arguments, rank, queue)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = sorted(queue.get(timeout=60) for _ in range(2 * BATCHES))
    for rank in ranks:
        rank.join(60)
    expected = [
        (rank, batch.draw, batch.windows.tolist(), float(batch.fields.double().sum()))
        for rank in range(2)
        for batch in batches(open_readers(shards, NAMES, "train"), shuffle, rank=rank, world_size=2)
    ]
    assert found == expected
    if shuffle == "blocks":
        fetched = {path: count for path, count in server.requests.items() if path.endswith(".tar")}
        assert set(fetched.values()) == {1}  # by one process each


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/wavelit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "wavelit"


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")
def test_stock_webdataset_reads_the_same_urls(shards: Path, server: FaultyServer) -> None:
    reader = open_readers(shards, [MAZE], "train")[MAZE]
    urls = [f"{server.url}/{MAZE}/train/{shard.name}" for shard in reader.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == sum(len(one.offsets) for one in reader.manifest.trajectories)
    first = samples[0]["meta.json"]["first_frame"]
    assert np.array_equal(samples[0]["fields.npy"], reader.trajectory_frames(0, first, len(samples[0]["fields.npy"])))


def _read_all(url: str, cache: Path, shuffle: str, digests: "multiprocessing.Queue[str]") -> None:
    readers = open_readers(url, NAMES, "train", stream=settings(cache, shuffle, cache_bytes=500_000))
    found = hashlib.sha256()
    for batch in batches(readers, shuffle, stop=40):
        found.update(batch.windows.numpy().tobytes() + batch.fields.numpy().tobytes())
    digests.put(found.hexdigest())


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_a_reader_killed_at_any_moment_leaves_a_cache_that_gives_the_same_batches(
    server: FaultyServer, tmp_path: Path, shuffle: str
) -> None:
    """tests/benchmarks/kill_streaming.py does the same with whole processes, more often."""
    context = multiprocessing.get_context("fork")
    digests: multiprocessing.Queue[str] = context.Queue()

    def start(cache: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_read_all, args=(server.url, cache, shuffle, digests))
        process.start()
        return process

    start(tmp_path / "undisturbed").join(60)
    expected = digests.get(timeout=60)
    for moment in range(4):
        process = start(tmp_path / "killed")
        wanted = server.total_requests + 10 * moment
        while server.total_requests < wanted and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join(60)
    digests = context.Queue()  # a killed process may have left the other one's lock taken
    start(tmp_path / "killed").join(60)
    assert digests.get(timeout=60) == expected
    assert not list((tmp_path / "killed" / "parts").iterdir())
