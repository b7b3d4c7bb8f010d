"""A folder of blobs with a size limit, the least recently used out first, shared by all processes of a machine.

A blob's name says what it holds (the SHA-256 of a shard, with offsets for a part of it), never where it came from, and
a blob appears under its name whole or not at all. It is written as `parts/<name>.<bytes>.part`, under a lock (flock) on
that file: one process downloads, the others wait for the lock and then find the blob. A lock ends with its process, so
a part without one is a dead process's: it is taken up by whoever wants the same blob next, and is the first to go when
room is needed. How much the folder holds is counted in `used`, under the lock that also covers eviction. The count errs
on the high side (a killed process may leave a reservation behind) and is taken anew from the files before anything is
removed. Whoever finds no room, because others are writing, removes its own part and begins again later: parts that wait
would count each other, and wait for ever. A blob that is removed while a process has it open or mapped stays readable
for it (POSIX).

The folder should be on a local disk: flock over NFS is slow, and missing on some servers.
"""

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.files import UserError, is_disk_full, sha256_file, sync

_NAME = re.compile(r"[0-9a-f]{64}(?:-\d{1,20}-\d{1,20})?")
_PART = re.compile(rf"({_NAME.pattern}(?:\.\d+_\d+)?)\.(\d{{1,20}})\.part")
_SLACK = 0.95  # of the limit is left when small blobs are evicted, so that not each new one looks at all others
_STALE_SECONDS = 86400.0  # after which a dead process's part goes even if there is room for it
_POLL_SECONDS = 0.1


class _Entry(NamedTuple):
    used_ns: int  # when it was last used; 0 for the part of a dead process
    num_bytes: int
    path: Path


@dataclass(frozen=True)
class BlobCache:
    """A cache in `folder` that never holds more than `limit_bytes`. Nothing is opened until it is used."""

    folder: Path
    limit_bytes: int

    def open(self, name: str, num_bytes: int) -> int | None:
        """A file descriptor of the blob, which then counts as just used; None if it is not there.

        One that is not a plain file of that size is removed.
        """
        path = self._blob(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be read from the cache ({error.strerror}); set data.cache") from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != num_bytes:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        self.touch(name)
        return descriptor

    def has(self, name: str) -> bool:
        """Whether the blob was there just now."""
        return os.path.exists(self._blob(name))  # unlike Path.exists, False too where one may not look

    def touch(self, name: str) -> None:
        """Counts the blob as just used, if it is there and the cache is not read only."""
        with suppress(OSError):
            os.utime(self._blob(name))

    def read(self, name: str, num_bytes: int) -> bytes | None:
        """The content of a blob, None if it is not there. The caller compares it with a checksum."""
        descriptor = self.open(name, num_bytes)
        if descriptor is None:
            return None
        with open(descriptor, "rb") as file:
            return file.read()

    def remove(self, name: str) -> None:
        """Takes out a blob that turned out to be damaged."""
        self._blob(name).unlink(missing_ok=True)

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Adds a small blob. It survives a kill, but perhaps not a power cut: its reader has a checksum."""
        assert _NAME.fullmatch(name), name
        while True:  # an eviction may take the part in the instant before it is locked
            with self._part(f"{name}.{os.getpid()}_{time.monotonic_ns()}", len(content)) as part:
                if part is None or not self._reserve(len(content), part, _SLACK):
                    continue
                try:
                    with self._full_disk_explained():
                        part.write_bytes(content)
                    os.replace(part, self._blob(name))
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                return

    def fetch(self, name: str, num_bytes: int, fill: Callable[[Path], object], origin: str) -> int:
        """A file descriptor of the blob with the SHA-256 `name`; if it is not there, `fill(path)` must write it.

        Of all processes that ask for one blob, one fills it and the others wait. `path` may hold the beginning that a
        killed process left. Raises UserError when the blob is larger than the cache, when what was filled in has
        another SHA-256 (naming `origin`), or when the disk is full.
        """
        while True:
            descriptor = self.open(name, num_bytes)
            if descriptor is not None:
                return descriptor
            with self._part(name, num_bytes) as part:
                if part is None:
                    continue
                if self.has(name):  # since a moment ago
                    part.unlink()
                elif self._reserve(num_bytes, part):
                    self._fill(part, name, num_bytes, fill, origin)

    def _fill(self, part: Path, name: str, num_bytes: int, fill: Callable[[Path], object], origin: str) -> None:
        resumed = part.stat().st_size > 0
        with self._full_disk_explained():
            fill(part)
            found = sha256_file(part)
            if found != name and resumed:  # what was left may have been torn by a power cut
                os.truncate(part, 0)
                fill(part)
                found = sha256_file(part)
            sync(part)
        if found != name:
            part.unlink()
            self._release(num_bytes)
            raise UserError(
                f"{origin}: damaged: its SHA-256 is {found}, the manifest says {name}; compare it with the original "
                "(`data-pipeline verify` on that folder) and upload it again"
            )
        os.replace(part, self._blob(name))

    @contextmanager
    def _part(self, name: str, num_bytes: int) -> Iterator[Path | None]:
        """The path to write a blob at, locked; None if it was someone else's, who has ended with it meanwhile."""
        path = self.folder / "parts" / f"{name}.{num_bytes}.part"
        with self._locked(path) as descriptor:
            yield path if _is_same(descriptor, path) else None

    @contextmanager
    def _locked(self, path: Path) -> Iterator[int]:
        """A descriptor of a file in the folder, which is made if it is not there, with the lock on it."""
        descriptor = self._open(path)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(
                    f"{path}: the cache cannot be locked ({error.strerror}); set data.cache to a folder on a local disk"
                ) from error
            yield descriptor
        finally:
            # A process forked meanwhile has a copy of the descriptor: closing ours would not end the lock.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _open(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with suppress(FileNotFoundError):  # the usual case: the folders are there
                return os.open(path, flags, 0o600)
            for folder in ("blobs", "parts"):  # whoever finds the second finds the first
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
            return os.open(path, flags, 0o600)
        except OSError as error:
            raise UserError(
                f"{path}: the cache cannot be written ({error.strerror}); set data.cache to another folder"
            ) from error

    @property
    def _count(self) -> Path:
        """The file that holds the count; the lock on it covers eviction too."""
        return self.folder / "used"

    @contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise UserError(
                    f"{self.folder}: the cache may hold {self.limit_bytes / 1e9:.3g} GB, but the disk or the quota is "
                    f"full ({error.strerror}); free some space, lower data.cache_gb, or set data.cache"
                ) from error
            raise

    def _blob(self, name: str) -> Path:
        assert _NAME.fullmatch(name), name
        return self.folder / "blobs" / name

    def _reserve(self, num_bytes: int, part: Path, slack: float = 1.0) -> bool:
        """Counts bytes that are about to be written to `part`, and makes room for them.

        False, a moment later and without the part, while what others are writing leaves no room.
        """
        if num_bytes > self.limit_bytes:
            part.unlink()
            raise UserError(
                f"{self.folder}: a blob of {num_bytes} bytes is larger than the cache ({self.limit_bytes} bytes); "
                "raise data.cache_gb"
            )
        with self._locked(self._count) as descriptor:
            used = _read_count(descriptor)
            if used is None or used + num_bytes > self.limit_bytes:
                used = self._evict(self.limit_bytes - num_bytes, int(self.limit_bytes * slack) - num_bytes, part)
            fits = used + num_bytes <= self.limit_bytes
            _write_count(descriptor, used + num_bytes if fits else used)
            if not fits:
                part.unlink()
        if not fits:
            time.sleep(_POLL_SECONDS)  # what others are writing can go when they are done
        return fits

    def _release(self, num_bytes: int) -> None:
        with self._locked(self._count) as descriptor:
            used = _read_count(descriptor)
            if used is not None:
                _write_count(descriptor, max(0, used - num_bytes))

    def _evict(self, target: int, low: int, mine: Path) -> int:
        """Counts the files; if they hold more than `target` bytes, removes the oldest until they hold at most `low`.

        Returns the bytes that they then hold. `mine` is the part that room is made for, and is not counted.
        """
        entries, used = [], 0
        for entry in self._entries(mine):
            used += entry.num_bytes
            entries.append(entry)
        if used <= target:
            return used
        for entry in sorted(entries):
            if used <= low:
                break
            if entry.path.suffix != ".part":
                entry.path.unlink(missing_ok=True)
            elif not _remove_dead(entry.path):
                continue
            used -= entry.num_bytes
        return used

    def _entries(self, mine: Path) -> Iterator[_Entry]:
        """All parts, with the sizes that they will have, and then all blobs: in this order nothing is missed, though a
        part that becomes a blob meanwhile counts twice. Stale parts of dead processes are removed."""
        for found in os.scandir(self.folder / "parts"):
            path, part = Path(found.path), _PART.fullmatch(found.name)
            with suppress(FileNotFoundError):
                age = time.time() - found.stat(follow_symlinks=False).st_mtime
                if part is None or path == mine or (age > _STALE_SECONDS and _remove_dead(path)):
                    continue
                yield _Entry(0, int(part[2]), path)
        for found in os.scandir(self.folder / "blobs"):
            with suppress(FileNotFoundError):
                state = found.stat(follow_symlinks=False)
                if _NAME.fullmatch(found.name):
                    yield _Entry(state.st_mtime_ns, state.st_size, Path(found.path))


def _remove_dead(path: Path) -> bool:
    """Removes a part whose process is dead. False if someone is writing it, or has just made it a blob."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dead = _is_same(descriptor, path)
        if dead:
            path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return dead
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one under the path."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read_count(descriptor: int) -> int | None:
    content = os.pread(descriptor, 32, 0)
    return int(content) if re.fullmatch(rb"\d{20}", content) else None


def _write_count(descriptor: int, count: int) -> None:
    os.pwrite(descriptor, b"%020d" % count, 0)
