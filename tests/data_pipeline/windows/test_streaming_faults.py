"""Whatever servers and readers of shards behind a URL do, the batches stay the same, or it ends in a message."""

import fcntl
import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer
from streamed import BATCHES, LENGTH, MAZE, NAMES, QUICK, assert_all_same, assert_same, batches, settings

from data_pipeline.errors import UserError
from data_pipeline.remote import Retries
from data_pipeline.schema import canonical, digest
from data_pipeline.shards.format import MAX_REMOTE_BYTES
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import Batch
from data_pipeline.windows.streaming import StreamSettings

ALWAYS = float("inf")


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_failures_of_the_server_change_nothing(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str
) -> None:
    for number in range(1, 60):
        server.fail("*", ("500", "drop", "truncate", "corrupt")[number % 4], first=7 * number)
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
        ("global", r"shard-000000.tar: failed 3 times, the last time: bytes \d+ to \d+ came with another checksum"),
        ("blocks", r"shard-000000.tar: it came 3 times with another SHA-256"),
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


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_a_blob_that_was_damaged_in_the_cache_is_fetched_again(
    shards: Path, server: FaultyServer, tmp_path: Path, shuffle: str
) -> None:
    """The damage keeps the blob's size; a run that starts notices it before it uses the blob."""

    def batch() -> Batch:
        readers = open_readers(server.url, [MAZE], "train", stream=settings(tmp_path, shuffle))
        server.reset()
        return readers[MAZE].batch(np.array([1]), 2)

    expected = open_readers(shards, [MAZE], "train")[MAZE].batch(np.array([1]), 2)
    assert_same(expected, batch())
    for blob in (tmp_path / "blobs").iterdir():
        blob.write_bytes(bytes(blob.stat().st_size))
    assert_same(expected, batch())
    assert server.total_requests > 0
    assert_same(expected, batch())
    assert server.total_requests == 0


def test_a_manifest_that_is_damaged_on_its_way_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    server.fail(f"{MAZE}/train/manifest.json", "corrupt", times=1)
    assert open_readers(server.url, [MAZE], "train", stream=settings(tmp_path, "global"))


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
        file.truncate(MAX_REMOTE_BYTES + 1)  # a hole: it takes no space here
    with pytest.raises(UserError, match=r"manifest.json: expected at most 67108864 bytes"):
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
