"""A cache that several processes share holds what it promises: whole blobs, within its limit, the newest ones."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.windows.cache import BlobCache

SIZE = 1000
CONTENTS = [np.random.default_rng(seed).bytes(SIZE) for seed in range(12)]
CONTENT_OF_THE_SAME_SIZE = bytes(SIZE)
NAMES = [hashlib.sha256(content).hexdigest() for content in CONTENTS]


def fetch(cache: BlobCache, number: int) -> bytes:
    descriptor = cache.fetch(NAMES[number], SIZE, lambda path: path.write_bytes(CONTENTS[number]), f"blob {number}")
    with open(descriptor, "rb") as file:
        return file.read()


def held(folder: Path) -> int:
    """Bytes in the folder while no process adds or removes a blob; one that is renamed meanwhile counts once."""
    sizes = {}
    with (folder / "used").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (*(folder / "parts").iterdir(), *(folder / "blobs").iterdir()):
            with suppress(FileNotFoundError):
                sizes[path.name.partition(".")[0]] = path.stat().st_size
    return sum(sizes.values())


def present(cache: BlobCache) -> set[int]:
    return {number for number, name in enumerate(NAMES) if cache.has(name)}


def test_a_blob_is_filled_once_and_then_found(tmp_path: Path) -> None:
    cache, filled = BlobCache(tmp_path, 10 * SIZE), []
    for _ in range(2):
        descriptor = cache.fetch(
            NAMES[0], SIZE, lambda path: filled.append(path) or path.write_bytes(CONTENTS[0]), "the origin"
        )
        assert os.pread(descriptor, 2 * SIZE, 0) == CONTENTS[0]
        os.close(descriptor)
    assert len(filled) == 1
    assert cache.read(NAMES[0], SIZE) == CONTENTS[0]
    assert cache.read(NAMES[1], SIZE) is None
    assert not list((tmp_path / "parts").iterdir())


def test_the_least_recently_used_goes_first_and_the_limit_holds(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 3 * SIZE)
    for number in (0, 1, 2):
        fetch(cache, number)
    fetch(cache, 0)  # used again: 1 is now the oldest
    fetch(cache, 3)
    assert present(cache) == {0, 2, 3}
    cache.touch(NAMES[2])
    fetch(cache, 4)
    assert present(cache) == {2, 3, 4}
    assert held(tmp_path) == 3 * SIZE


def test_small_blobs_are_bounded_too_and_other_files_are_left_alone(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10 * SIZE)
    fetch(cache, 0)
    (tmp_path / "blobs" / "notes.txt").write_text("not ours")
    for first in range(40):
        cache.put(f"{NAMES[1]}-{first}-{first + SIZE}", CONTENTS[1])
        assert held(tmp_path) <= 10 * SIZE + len("not ours")
    assert cache.read(f"{NAMES[1]}-39-{39 + SIZE}", SIZE) == CONTENTS[1]
    assert (tmp_path / "blobs" / "notes.txt").exists()


def test_an_evicted_blob_stays_readable_for_who_has_it_open(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, SIZE)
    fetch(cache, 0)
    descriptor = cache.open(NAMES[0], SIZE)
    assert descriptor is not None
    fetch(cache, 1)
    assert present(cache) == {1}
    assert os.pread(descriptor, SIZE, 0) == CONTENTS[0]
    os.close(descriptor)
    assert fetch(cache, 0) == CONTENTS[0]


def test_wrong_content_is_refused_by_the_name_of_its_origin(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 5 * SIZE)
    with pytest.raises(UserError, match=r"^http://x/shard.tar: it came 3 times with another SHA-256"):
        cache.fetch(NAMES[0], SIZE, lambda path: path.write_bytes(CONTENTS[1]), "http://x/shard.tar")
    assert held(tmp_path) == 0
    assert fetch(cache, 0) == CONTENTS[0]


def test_what_does_not_fit_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1000 bytes is larger than the cache \(999 bytes\); raise data.cache_gb"):
        fetch(BlobCache(tmp_path, 999), 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be read from the cache: Not a directory; set data.cache"):
        fetch(BlobCache(tmp_path / "file", SIZE), 0)


def test_a_blob_is_compared_once_in_each_process_and_a_damaged_one_filled_again(tmp_path: Path) -> None:
    fetch(BlobCache(tmp_path, 5 * SIZE), 0)
    blob = tmp_path / "blobs" / NAMES[0]
    blob.write_bytes(CONTENT_OF_THE_SAME_SIZE)
    again = BlobCache(tmp_path, 5 * SIZE)  # as in a process that starts
    assert fetch(again, 0) == CONTENTS[0]
    blob.write_bytes(CONTENT_OF_THE_SAME_SIZE)
    assert fetch(again, 0) == CONTENT_OF_THE_SAME_SIZE  # compared already: each window would take as long as the shard


@pytest.mark.parametrize("spoil", ["short", "link"])
def test_a_spoilt_blob_is_never_handed_out(tmp_path: Path, spoil: str) -> None:
    cache = BlobCache(tmp_path / "cache", 5 * SIZE)
    fetch(cache, 0)
    blob = tmp_path / "cache" / "blobs" / NAMES[0]
    if spoil == "short":
        blob.write_bytes(CONTENTS[0][:-1])
        assert fetch(cache, 0) == CONTENTS[0]
        return
    (tmp_path / "elsewhere").write_bytes(CONTENTS[0])
    blob.unlink()
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be read from the cache"):
        fetch(cache, 0)


def test_the_part_of_a_dead_process_is_taken_up_or_makes_room(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 2 * SIZE)
    fetch(cache, 0)
    for number in (1, 2):
        (tmp_path / "parts" / f"{NAMES[number]}.{SIZE}.part").write_bytes(CONTENTS[number][:400])

    def go_on(path: Path) -> None:
        with path.open("ab") as file:
            assert file.tell() == 400
            file.write(CONTENTS[1][400:])

    os.close(cache.fetch(NAMES[1], SIZE, go_on, "blob 1"))
    assert held(tmp_path) <= 2 * SIZE + 400
    fetch(cache, 3)
    assert not list((tmp_path / "parts").iterdir())
    assert held(tmp_path) == 2 * SIZE
    (tmp_path / "parts" / f"{NAMES[2]}.{SIZE}.part").write_bytes(b"torn by a power cut")
    assert fetch(cache, 2) == CONTENTS[2]


def test_what_dead_processes_left_goes_before_any_blob(tmp_path: Path) -> None:
    """A small blob half written, and downloads that nobody continues, by the size that they would have had."""
    cache, parts = BlobCache(tmp_path, 4 * SIZE), tmp_path / "parts"
    fetch(cache, 0)
    (parts / f"{NAMES[5]}-0-{SIZE}.tmp").write_bytes(CONTENTS[5][:10])
    for number in (6, 7):
        (parts / f"{NAMES[number]}.{SIZE}.part").write_bytes(CONTENTS[number][:10])
    (tmp_path / "used").write_text("")  # count again
    fetch(cache, 1)  # 0, two parts and this one: there is room
    assert sorted(path.suffix for path in parts.iterdir()) == [".part", ".part"]
    fetch(cache, 2)
    fetch(cache, 3)
    assert present(cache) == {0, 1, 2, 3}
    assert not list(parts.iterdir())


def test_a_part_that_is_being_written_is_not_evicted(tmp_path: Path) -> None:
    cache, started, done = BlobCache(tmp_path, 2 * SIZE), threading.Event(), threading.Event()

    def slowly(path: Path) -> None:
        started.set()
        assert done.wait(30)
        path.write_bytes(CONTENTS[0])

    thread = threading.Thread(target=lambda: os.close(cache.fetch(NAMES[0], SIZE, slowly, "blob 0")))
    thread.start()
    assert started.wait(30)
    for number in (1, 2, 3):
        fetch(cache, number)
        assert present(cache) == {number}  # the other half of the room is spoken for
    done.set()
    thread.join(30)
    assert present(cache) == {0, 3}


def test_parts_that_wait_for_room_do_not_wait_for_each_other(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 2 * SIZE)
    fetch(cache, 0)
    with (tmp_path / "used").open() as lock, ThreadPoolExecutor(6) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is released, no one knows how much room there is
        fetched = [pool.submit(fetch, cache, number) for number in range(1, 7)]
        deadline = time.monotonic() + 30
        while len(list((tmp_path / "parts").iterdir())) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list((tmp_path / "parts").iterdir())) == 6
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert [future.result(30) for future in fetched] == CONTENTS[1:7]
    assert held(tmp_path) <= 2 * SIZE
    assert not list((tmp_path / "parts").iterdir())


@pytest.mark.parametrize("limit", [SIZE - 1, 5 * SIZE])
def test_a_small_blob_that_cannot_be_kept_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"raise data.cache_gb|the disk or the quota is full .* lower data.cache_gb"):
        BlobCache(tmp_path, limit).put(f"{NAMES[0]}-0-{SIZE}", CONTENTS[0])
    assert not list((tmp_path / "parts").iterdir())


def test_a_cache_that_cannot_be_locked_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"the cache cannot be locked .No locks available.; set data.cache to a folder"):
        fetch(BlobCache(tmp_path, 5 * SIZE), 0)


def test_a_read_only_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlobCache(tmp_path, 5 * SIZE)
    fetch(cache, 0)

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    assert cache.read(NAMES[0], SIZE) == CONTENTS[0]


def _fetch_many(folder: Path, seed: int, failures: "multiprocessing.Queue[str]") -> None:
    cache, rng = BlobCache(folder, 4 * SIZE), np.random.default_rng(seed)
    for number in rng.integers(0, len(NAMES), 150).tolist():
        if fetch(cache, number) != CONTENTS[number]:
            failures.put(f"blob {number}")
        if held(folder) > 4 * SIZE:
            failures.put(f"{held(folder)} bytes")


def _fill_slowly(folder: Path, log: Path) -> None:
    def fill(path: Path) -> None:
        with log.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("filled\n")
        time.sleep(0.3)
        path.write_bytes(CONTENTS[0])

    os.close(BlobCache(folder, 4 * SIZE).fetch(NAMES[0], SIZE, fill, "blob 0"))


def test_processes_share_one_download(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill_slowly, args=(tmp_path, tmp_path / "log")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "filled\n"


def _count_files(folder: Path) -> int:
    return len(list((folder / "blobs").iterdir()))


def test_processes_that_evict_each_others_blobs_read_what_they_asked_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_fetch_many, args=(tmp_path, seed, failures)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert failures.empty(), failures.get()
    assert _count_files(tmp_path) <= 4


def test_processes_killed_at_any_moment_leave_a_cache_that_works(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures: multiprocessing.Queue[str] = context.Queue()
    for seed in range(8):
        process = context.Process(target=_fetch_many, args=(tmp_path, seed, failures))
        process.start()
        time.sleep(0.005 * seed)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    cache = BlobCache(tmp_path, 4 * SIZE)
    for number in range(len(NAMES)):
        assert fetch(cache, number) == CONTENTS[number]
        assert held(tmp_path) <= 4 * SIZE
    assert not list((tmp_path / "parts").iterdir())
