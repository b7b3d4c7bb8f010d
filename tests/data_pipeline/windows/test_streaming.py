"""Shards behind a URL give the batches of the local ones, and are fetched ahead."""

import itertools
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from faulty_server import FaultyServer
from forked import Forked
from streamed import FRAME_BYTES, LENGTH, MAZE, NAMES, assert_all_same, assert_same, batches, settings, write_dataset

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import WindowPlaces
from data_pipeline.windows.streaming import WholeShards, default_cache


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
    """Shards are mapped, unmapped and removed from the cache all the time."""
    options = settings(tmp_path, shuffle, draws_ahead=0, shards_per_block=1, cache_bytes=250_000)
    readers = open_readers(server.url, NAMES, "train", stream=options)
    assert_all_same(shards, readers, shuffle, workers=4, stop=60)


def test_shards_are_prefetched_while_others_are_mapped_and_unmapped(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "utime", lambda path: time.sleep(0.001))  # as a disk takes its time
    shards = open_readers(server.url, [MAZE], "train", stream=settings(tmp_path, "blocks"))[MAZE].shards
    assert isinstance(shards, WholeShards)
    ended = threading.Event()

    def prefetch() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            shards.prefetch(WindowPlaces(tuple(range(10)), (0,) * 10, 1 + number))
            shards.cancel_prefetch()

    with ThreadPoolExecutor(1) as pool:
        prefetching = pool.submit(prefetch)
        for number in range(100):
            with shards.hold(WindowPlaces((number % 10,), (0,), 1), constants=False):
                assert len(shards.read(number % 10 // 2, 0, 512)) == 512
        ended.set()
        prefetching.result(30)


def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", MAZE, "float32", ("pressure",), num_shards=60)
    (tmp_path / "read.py").write_text(READ_AT_LIMIT)
    with FaultyServer(tmp_path / "shards") as server:
        process = Forked(tmp_path / "read.py", str(tmp_path / "shards"), server.url, str(tmp_path / "cache"))
        printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors, printed) == (0, "", "48\nthe same\n")


READ_AT_LIMIT = """
import resource, sys
from pathlib import Path
from streamed import MAZE, assert_same, batches, settings
from data_pipeline.windows.loader import open_readers

resource.setrlimit(resource.RLIMIT_NOFILE, (32, 48))
_, shards, url, cache = sys.argv
ahead = settings(Path(cache), "blocks", draws_ahead=300)  # about 50 shards are held at once
local, streamed = (open_readers(source, [MAZE], "train", stream=ahead) for source in (shards, url))
for one, other in zip(*(batches(readers, "blocks", stop=250) for readers in (local, streamed)), strict=True):
    assert_same(one, other)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # raised to the hard limit
print("the same")
"""


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_abandoned_loader_prefetched_does_not_stay(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str, workers: int
) -> None:
    readers = open_readers(server.url, NAMES, "train", stream=settings(tmp_path, shuffle))
    stream = batches(readers, shuffle, workers=workers)
    next(stream)
    fetcher = readers[MAZE].shards._fetcher  # type: ignore[attr-defined]
    assert fetcher._prefetched
    del stream
    assert not fetcher._prefetched
    assert_all_same(shards, readers, shuffle, workers=workers, start=3)
    assert not fetcher._prefetched
    assert (fetcher.held, fetcher.held_bytes) == ({}, 0)


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
