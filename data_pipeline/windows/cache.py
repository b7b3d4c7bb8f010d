"""A cache on disk with a size limit, shared by all processes of a machine; the least recently used blob goes first.

A blob's name is its content: the SHA-256 of a shard, with offsets for a part of the shard. A blob appears under its
name whole or not at all. The folder holds

    blobs/NAME               a blob; its modification time is when it was last used
    parts/NAME.BYTES.part    a shard while it is downloaded; BYTES is the size that it will have
    parts/NAME.tmp           a small blob while it is written
    locks/NAME               empty, locked (flock) while a process downloads that shard; the other processes wait
    used                     the count of all bytes; locked while the count changes or blobs are removed

A lock ends with its process. So a part whose lock is free belongs to a dead process: the next download of that blob
continues it, and it is removed first when room is needed. The count may be too high, since a killed process leaves its
reservation behind; the files are counted again before anything is removed. A blob that is removed while a process has
it open or mapped stays readable for that process (POSIX). The folder should be on a local disk, where flock is fast.

Every process compares a shard with its SHA-256 before it uses it for the first time: the disk may have damaged it since
it was downloaded. A damaged one is downloaded again.
"""

import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import UserError, is_disk_full, reason_and_remedy
from data_pipeline.files import inside, sha256_file, sync

_NAME = re.compile(r"[0-9a-f]{64}(?:-\d{1,20}-\d{1,20})?")
_PART = re.compile(rf"({_NAME.pattern})\.(\d{{1,20}})\.part")
_SPARE = 0.05  # of the limit is freed for a small blob, so that not every small blob has to look at all others
_POLL_SECONDS = 0.1
_DOWNLOADS = 3  # of a shard that arrives damaged


@dataclass(frozen=True)
class BlobCache:
    """A cache in `folder` that never holds more than `limit_bytes`. Nothing is opened until it is used."""

    folder: Path
    limit_bytes: int
    _whole: set[tuple[str, int]] = field(default_factory=set, compare=False, repr=False)  # shards compared: name, inode

    def _blob(self, name: str) -> Path:
        assert _NAME.fullmatch(name), name
        return self.folder / "blobs" / name

    def open(self, name: str, num_bytes: int) -> int | None:
        """Return a file descriptor of the blob and mark it as just used; None if it is not there.

        A blob that is not a plain file of that size is removed.
        """
        path = self._blob(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            why = reason_and_remedy(error, "set data.cache to another folder")
            raise UserError(f"{path}: cannot be read from the cache: {why}") from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != num_bytes:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        self.touch(name)
        return descriptor

    def read(self, name: str, num_bytes: int) -> bytes | None:
        """Return the content of a blob, None if it is not there. The caller compares it with a checksum."""
        descriptor = self.open(name, num_bytes)
        if descriptor is None:
            return None
        with open(descriptor, "rb") as file:
            return file.read()

    def has(self, name: str) -> bool:
        """Return whether the blob is there at this moment."""
        return os.path.exists(self._blob(name))  # unlike Path.exists, False too in a folder that may not be searched

    def touch(self, name: str) -> None:
        """Mark the blob as just used, if it is there and the cache is not read only."""
        with suppress(OSError):
            os.utime(self._blob(name))

    def remove(self, name: str) -> None:
        """Remove a damaged blob."""
        self._blob(name).unlink(missing_ok=True)

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Add a small blob. It survives a kill, but perhaps not a power cut: its reader has a checksum."""
        temporary = self.folder / "parts" / f"{name}.tmp"
        while True:
            with self._locked(self.folder / "used") as used:
                self._refuse_larger(len(content))
                if self._reserve(used, len(content), temporary, spare=int(_SPARE * self.limit_bytes)):
                    try:
                        with self._full_disk_explained():
                            temporary.write_bytes(content)
                        os.replace(temporary, self._blob(name))
                    finally:
                        temporary.unlink(missing_ok=True)
                    return
            time.sleep(_POLL_SECONDS)  # downloads have taken the room; their blobs can be removed when they are done

    def fetch(self, name: str, num_bytes: int, fill: Callable[[Path], object], origin: str) -> int:
        """Return a file descriptor of the blob with the SHA-256 `name`, which `fill(path)` writes if it is not there.

        A blob that was damaged is filled again. If several processes fetch one blob, one of them fills it, and the
        others wait. `path` may hold the beginning that a killed process left. Raises UserError when the blob is larger
        than the cache, when the content has another SHA-256 (naming `origin`), or when the disk is full.
        """
        part = self.folder / "parts" / f"{name}.{num_bytes}.part"
        while True:
            descriptor = self.open(name, num_bytes)
            if descriptor is not None:
                if self._is_whole(name, descriptor):
                    return descriptor
                os.close(descriptor)
                self.remove(name)
            self._refuse_larger(num_bytes)
            with self._locked(self.folder / "locks" / name):
                if self.has(name):  # another process filled it while this one waited for the lock
                    continue
                os.close(self._create(part))
                with self._locked(self.folder / "used") as used:
                    fits = self._reserve(used, num_bytes, part)
                    if not fits:
                        part.unlink()
                if fits:
                    self._fill(part, name, fill, origin)
                    continue
            time.sleep(_POLL_SECONDS)  # without its part: parts that wait would count each other and wait for ever

    def _is_whole(self, name: str, descriptor: int) -> bool:
        """Return whether the SHA-256 of an open blob is its name; the bytes are read once in each process."""
        key = (name, os.fstat(descriptor).st_ino)
        if key not in self._whole:
            with open(descriptor, "rb", closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != name:
                    return False
                file.seek(0)
            self._whole.add(key)
        return True

    def _fill(self, part: Path, name: str, fill: Callable[[Path], object], origin: str) -> None:
        found = ""
        with self._full_disk_explained():
            for _ in range(_DOWNLOADS):
                fill(part)
                found = sha256_file(part)
                if found == name:
                    break
                os.truncate(part, 0)  # a power cut may have torn the beginning, or the bytes were damaged on their way
            sync(part)
        if found != name:
            part.unlink()
            raise UserError(
                f"{origin}: it came {_DOWNLOADS} times with another SHA-256 ({found}) than the manifest's ({name}): "
                "damaged on its way, or where it comes from. Try another connection, or compare it with the original "
                "(`data-pipeline verify` on that folder)"
            )
        self._whole.add((name, part.stat().st_ino))
        os.replace(part, self._blob(name))

    @contextmanager
    def _locked(self, path: Path, wait: bool = True) -> Iterator[int]:
        """Hold the lock of a file, which is created if need be, and yield a descriptor of it.

        Raises BlockingIOError if `wait` is False and the lock is taken.
        """
        descriptor = self._create(path)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError as error:
                raise UserError(
                    f"{path}: the cache cannot be locked ({error.strerror}); set data.cache to a folder on a local disk"
                ) from error
            yield descriptor
        finally:
            # A process forked meanwhile has a copy of the descriptor, so closing this one would not end the lock.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _create(self, path: Path) -> int:
        """Open a file of the cache for writing, and create it and the folders if need be."""
        folders = [self.folder / name for name in ("blobs", "locks", "parts")]
        try:
            if not folders[-1].is_dir():
                for folder in folders:
                    inside(self.folder, folder.name)
                    folder.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            why = reason_and_remedy(error, "set data.cache to another folder")
            raise UserError(f"{path}: the cache cannot be written: {why}") from error

    def _refuse_larger(self, num_bytes: int) -> None:
        if num_bytes > self.limit_bytes:
            raise UserError(
                f"{self.folder}: a blob of {num_bytes} bytes is larger than the cache ({self.limit_bytes} bytes); "
                "raise data.cache_gb"
            )

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

    def _reserve(self, used: int, num_bytes: int, part: Path, spare: int = 0) -> bool:
        """Count the bytes of `part` and remove old blobs to make room for them, and for `spare` bytes more.

        Returns False if downloads of other processes leave no room. `used` is a descriptor of the locked count.
        """
        counted = os.pread(used, 32, 0)
        count = int(counted) if re.fullmatch(rb"\d{20}", counted) else None
        if count is None or count + num_bytes > self.limit_bytes:
            count = self._evict(self.limit_bytes - num_bytes, spare, part)
        fits = count + num_bytes <= self.limit_bytes
        os.pwrite(used, b"%020d" % (count + num_bytes if fits else count), 0)
        return fits

    def _evict(self, target: int, spare: int, part: Path) -> int:
        """Count the bytes of all files except `part`. If they exceed `target`, remove `spare` bytes more than that.

        Returns the bytes that remain. The lock on the count is held.
        """
        entries = []  # (last use in ns, bytes, path); a part comes first, with the size that it will have
        # Parts before blobs, so that nothing is missed: a part that becomes a blob meanwhile is counted twice.
        for found in os.scandir(self.folder / "parts"):
            name = _PART.fullmatch(found.name)
            if found.name.endswith(".tmp"):  # of a dead process: `put` holds the lock while it writes
                os.unlink(found)
            elif name is not None and found.path != str(part):
                entries.append((0, int(name[2]), Path(found.path)))
        for found in os.scandir(self.folder / "blobs"):
            with suppress(FileNotFoundError):
                state = found.stat(follow_symlinks=False)
                if _NAME.fullmatch(found.name):
                    entries.append((state.st_mtime_ns, state.st_size, Path(found.path)))
        count = sum(num_bytes for _, num_bytes, _ in entries)
        if count <= target:
            return count
        for _, num_bytes, path in sorted(entries):
            if count <= target - spare:
                break
            if path.suffix == ".part":
                try:
                    with self._locked(self.folder / "locks" / path.name.partition(".")[0], wait=False):
                        path.unlink()
                except (BlockingIOError, FileNotFoundError):  # it is being downloaded, or has just become a blob
                    continue
            else:
                path.unlink(missing_ok=True)
            count -= num_bytes
        return count
