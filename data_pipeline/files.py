"""Files that are written whole or not at all, their digests, and the errors that a user can correct."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


class UserError(Exception):
    """Wrong input, missing data or a damaged file. The message gives what was expected, what came, where, what to do.

    Commands print the message alone and exit with code 2. Any other exception is a bug and keeps its traceback. This is
    no ValueError, so code that turns a library's ValueError into a UserError lets a UserError through.
    """


def run_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command of `fm` or `data-pipeline`; return its exit code, after one message if it failed.

    2 for what the user can correct: UserError, and an error that the operating system gave, such as a full disk or a
    folder that cannot be read. 1 if the reader of our output has left, as `head` does. 130 for Ctrl-C.
    """
    code, message = 0, ""
    try:
        try:
            code = command() or 0
        except SystemExit:  # argparse has printed its help
            _flush(sys.stdout)
            raise
        _flush(sys.stdout)
    except UserError as error:
        code, message = 2, f"error: {error}"
    except BrokenPipeError:
        code = 1
    except OSError as error:
        code, message = 2, f"error: {_explain(error)}"
    except KeyboardInterrupt:
        code, message = 130, interrupted
    finally:
        with suppress(OSError):
            if message and sys.stderr is not None:
                print(message, file=sys.stderr, flush=True)
        for stream in (sys.stdout, sys.stderr):
            try:
                _flush(stream)
            except OSError:  # Python flushes both once more at exit, which would end in another message and code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _flush(stream: TextIO | None) -> None:
    if stream is not None:  # None if the shell closed it, as `>&-` does
        stream.flush()


def _explain(error: OSError) -> str:
    """Return the message for an error of the operating system. One of a library, without a number, is a bug."""
    if is_disk_full(error):
        return str(disk_full_error(error.filename or "the output", error))
    if error.errno is None:
        raise error
    if error.filename is None:
        return f"{error.strerror or error}; look for the cause in the system, then run the same command again"
    advice = "choose another folder" if isinstance(error, FileExistsError | NotADirectoryError) else "check the path"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        advice = "change its permissions, or choose another folder"
    return f"{os.fsdecode(error.filename)}: {error.strerror}; {advice}"


TEMPORARY_SUFFIX = ".tmp"  # of files and folders that are being written, and of those that a killed process left
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
