"""The one error type for what a user can mend.

Writes files whole or not at all, and says so when the disk is full.

Random numbers that are functions of where they are used: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

Written out here so that neither a library's version nor the platform moves a single number.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np


class UserError(ValueError):
    """Bad input, missing data, a damaged file: the message says what was expected, what came, where, and what to do.

    Commands print the message alone and exit with code 2; any other exception is our own bug and keeps its traceback.
    """


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


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder to, which takes the name `path` only when the block ends without an error.

    What `path` was before is replaced. Raises UserError when the disk is full; whatever the error, nothing is left.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and is_disk_full(error):
            raise disk_full_error(path, error) from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def only_process(folder: Path, doing: str) -> Iterator[None]:
    """Keeps other processes `doing` the same out of a folder, which is made if need be. UserError if one is there.

    The lock is on the folder itself and ends with the process, however it ends. Where a file system has no locks, as
    some in a network, nothing is kept out, and that is said.
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


def sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stream_key(*parts: int | str) -> np.uint64:
    """64 bits that stand for the parts; different parts, different streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def splitmix64(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Element `numbers` (n,) of the SplitMix64 stream that starts at `key`, (n,) uint64.

    Distinct numbers give distinct hashes, so sorting by hash is a permutation without ties, whatever the algorithm.
    """
    z = key + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def nested_choice(keys: Sequence[tuple[int | str, ...]], count: int | None) -> list[int]:
    """The places of the `count` keys with the smallest hashes, ascending; None: all. Those of N are among N + 1's."""
    ranked = sorted(range(len(keys)), key=lambda place: stream_key(*keys[place]))
    return sorted(ranked[:count])


def uniform(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Hashes as numbers in [0, 1), (n,) float64."""
    return (splitmix64(key, numbers) >> np.uint64(11)) * 2.0**-53
