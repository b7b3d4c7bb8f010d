"""Files: written whole or not at all, read from inside their folder; and the error for what a user can correct."""

import errno
import fcntl
import hashlib
import json
import os
import reprlib
import resource
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from typing_extensions import Buffer


class UserError(Exception):
    """Wrong input, missing data or a damaged file. The message gives what was expected, what came, where, what to do.

    Commands print the message alone and exit with code 2. Any other exception is a bug and keeps its traceback. This is
    no ValueError, so code that turns a library's ValueError into a UserError lets a UserError through.

    A message may quote a file of a stranger, so it holds no control characters and at most MAX_MESSAGE characters.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shortened(printable(str(message)), MAX_MESSAGE))


MAX_MESSAGE = 6000  # characters: a screen or two
MAX_PLAIN_BYTES = 2**28  # of a file that is read as a whole; a manifest of a million windows has 9 MB


def printable(text: str) -> str:
    """Return a text whose control characters, which terminals obey, are written as escapes."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


class _PrintableOutput:
    """A stream of text that writes control characters as escapes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable_stdout() -> AbstractContextManager[object]:
    """Return a block in which nothing that is printed can control the terminal: names come from files of strangers."""
    return redirect_stdout(_PrintableOutput(sys.stdout))


def shortened(text: str, limit: int) -> str:
    """Return a text, or its beginning and its length where it has more than `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


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


def brief(value: object) -> str:
    """Return a value for a message; a damaged file may hold a very long one."""
    return shortened(reprlib.repr(value), 80)


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
ENOUGH_OPEN_FILES = 65_536  # a hard limit may be a billion; programs that walk through all descriptors would crawl
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means: no space, no quota, or a file size limit.

    h5py gives the error's number in its message only.
    """
    return error.errno in _DISK_FULL or any(f"errno = {code}," in str(error) for code in _DISK_FULL)


def disk_full_error(path: object, error: OSError) -> UserError:
    """Return the error for a disk that filled up while `path` was written."""
    return UserError(
        f"{path}: cannot be written, the disk or the quota is full ({error.strerror or error}); "
        "nothing half written was kept; free some space and run the same command again, it goes on from there"
    )


def open_files_limit() -> int:
    """Raise this process's limit of open files as far as the system lets it, and return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS states a hard limit that it does not allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def reason_and_remedy(error: OSError, remedy: str) -> str:
    """Return why a file could not be opened and what to do: `remedy`, unless too many other files are open."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = f"let a process open more than {open_files_limit()} files (ulimit -n)"
    return f"{error.strerror or error}; {remedy}"


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, or will hold it when it is made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.is_dir())).free


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file or a folder to; it becomes `path` when the block ends.

    Everything is on the disk before it is renamed. After a kill or a power cut, `path` is therefore either as before or
    whole. A file or folder that was there is replaced. If the block or the renaming fails, `path` stays as it was and
    the temporary path is removed. UserError when the disk is full.

    Not `durable`: the system writes to the disk when it likes. The result survives a kill, but may be empty or torn
    after a power cut. This is for files that are checked when they are read, and can be made again.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")  # two processes do not share one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
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
