"""Writes files whole or not at all, and says so when the disk is full."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_disk_full(error: OSError) -> bool:
    """Whether an error means no space, no quota or a file size limit; h5py only says so in its message."""
    return error.errno in _FULL or any(f"errno = {code}," in str(error) for code in _FULL)


def disk_full_error(path: object, error: OSError) -> UserError:
    """The message for a disk that filled up while `path` was written."""
    return UserError(
        f"{path}: cannot be written, the disk or the quota is full ({error.strerror or error}); "
        "nothing half written was kept; free some space and run the same command again, it goes on from there"
    )


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write that appears under `path` only when the block ends without an error.

    Raises UserError when the disk is full; whatever the error, the temporary file is removed. A file that is not
    `durable` survives a kill, but may be empty or torn after a power cut: for files that can be told to be so.
    """
    # The process id keeps two writers of the same file apart.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and is_disk_full(error):
            raise disk_full_error(path, error) from error
        raise


def sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
