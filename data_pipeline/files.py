"""Files: written whole or not at all, read from inside their folder, and their digests."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from data_pipeline.errors import UserError, brief, disk_full_error, is_disk_full, shortened

if TYPE_CHECKING:
    from typing_extensions import Buffer


MAX_PLAIN_BYTES = 2**28  # of a file that is read as a whole; a manifest of a million windows has 9 MB


def inside(root: Path, name: str | PurePath) -> Path:
    """Return `root / name`. UserError if the name or a link leads out of `root`.

    All that is read, copied, uploaded or deleted because a file names it goes through this function. `root` itself may
    be a link: the user chose it. In the cache of the Hugging Face Hub, files are links to `blobs` beside `snapshots`.
    """
    path = PurePath(name)
    try:
        base, real = root.resolve(), (root / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a zero byte
        raise UserError(
            f"{root}: expected a path inside it, got {shortened(repr(str(name)), 200)} ({error})"
        ) from error
    blobs = base.parent.parent / "blobs"
    in_hub_cache = base.parent.name == "snapshots" and real.is_relative_to(blobs)
    if path.is_absolute() or ".." in path.parts or "\\" in str(name) or not (real.is_relative_to(base) or in_hub_cache):
        raise UserError(
            f"{root}: expected paths inside it, got {shortened(repr(str(name)), 200)}, which leads out of it; put the "
            "file itself there, or remove the link"
        )
    return root / path


def read_plain_file(path: Path, max_bytes: int = MAX_PLAIN_BYTES) -> bytes:
    """Return the content of a plain file. A link could lead anywhere; a pipe or a device has no end.

    OSError if it cannot be read, ValueError if it is something else or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > max_bytes:
            raise ValueError(f"expected a plain file of at most {max_bytes} bytes")
        return file.read(found.st_size)


def file_name(text: str) -> str:
    """Return a text that can be the name of a file or folder on any system. ValueError for any other."""
    if (
        not 0 < len(text) <= 200
        or not text.isprintable()
        or set(text) & set('/\\:*?"<>|')
        or text in (".", "..")
        or text != text.strip()
    ):
        raise ValueError(f"expected a name that a folder can have, got {brief(text)}")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. UserError when it cannot be read, is a link, or holds something else."""
    try:
        content = read_plain_file(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    return parse_json(content, str(path))


def load_json(content: str | bytes) -> Any:
    """Return the value of a JSON text. ValueError if it is none, also for nesting beyond Python's recursion limit."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in a text that comes from `where`. UserError when it is something else."""
    try:
        value = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {brief(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key in made if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"key {brief(twice)} twice")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


TEMPORARY_SUFFIX = ".tmp"  # of files and folders that are being written, and of those that a killed process left


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, or will hold it when it is made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.is_dir())).free


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file or a folder to; it becomes `path` when the block ends.

    Everything is on the disk before it is renamed. After a kill or a power cut, `path` is therefore either as before or
    whole. A file or folder that was there is replaced. If the block or the renaming fails, `path` stays as it was and
    the temporary path is removed. UserError when the disk is full. What killed processes left beside `path` is restored
    or removed first.

    Not `durable`: the system writes to the disk when it likes. The result survives a kill, but may be empty or torn
    after a power cut. This is for files that are checked when they are read, and can be made again.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")  # two processes do not share one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        restore(path)
        yield temporary
        if durable:
            _sync_all(temporary)
        _replace(path, temporary)
        if durable:
            sync(path.parent)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and is_disk_full(error):
            raise disk_full_error(path, error) from error
        raise


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Give a binary file to write, which appears as `path` when the block ends; see `atomic_path`."""
    with atomic_path(path, durable) as temporary, temporary.open("wb") as file:
        yield file


def write_whole(path: Path, content: "Buffer") -> None:
    """Write a file whole or not at all. UserError if the disk is full or the folder cannot be written."""
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose a folder that can, and run again"
        ) from error


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it. What cannot be deleted stays, without an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _replace(path: Path, temporary: Path) -> None:
    """Rename `temporary` to `path`. A folder cannot be renamed onto another one, so the old one is moved away first."""
    if not (path.is_dir() and temporary.is_dir()):
        os.replace(temporary, path)
        return
    before = path.with_name(f"{path.name}.{os.getpid()}.before{TEMPORARY_SUFFIX}")
    path.rename(before)
    try:
        temporary.rename(path)
    except OSError:
        before.rename(path)
        raise
    remove(before)


def restore(path: Path) -> None:
    """Undo what a killed process has left of replacing `path`: put the folder back that it had moved away.

    Files and folders that it had not finished are removed.
    """
    with suppress(OSError):
        for left in list(path.parent.iterdir()):
            name = re.fullmatch(rf"{re.escape(path.name)}\.(\d+)(\.before)?{re.escape(TEMPORARY_SUFFIX)}", left.name)
            if name is not None and name[2] and not path.exists():
                left.rename(path)
            elif name is not None and (name[2] or not _runs_elsewhere(int(name[1]))):
                remove(left)


def _runs_elsewhere(pid: int) -> bool:
    """Return whether another process has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return pid != os.getpid()


def _sync_all(path: Path) -> None:
    for inside in path.iterdir() if path.is_dir() else ():
        _sync_all(inside)
    sync(path)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_process(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes `doing` the same thing out of `folder`, which is made if it is missing.

    UserError if there is one. The lock is on the folder itself and ends with the process, however that ends. Some
    network file systems have no locks; there a warning is printed and nothing is kept out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another {doing} is writing here; wait until it has ended") from error
        except OSError as error:
            print(f"{folder}: cannot be locked ({error.strerror}); start no second {doing} here", file=sys.stderr)
        yield
    finally:
        os.close(descriptor)


def sha256(*parts: "Buffer") -> str:
    """Return the SHA-256 of the parts, one after the other, as 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_file(path: Path, *more: "Buffer") -> str:
    """Return the SHA-256 of a file's content, followed by `more`, as 64 hex digits."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for part in more:
        digest.update(part)
    return digest.hexdigest()
