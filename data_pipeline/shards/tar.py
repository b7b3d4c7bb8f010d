"""A shard: a plain tar file of WebDataset samples, one for each chunk of a trajectory.

A sample is `<key>.fields.npy`, float32 or float16 (T, C, H, W), in the first chunk of a trajectory
`<key>.constants.npy`, float32 (K, H, W), and `<key>.meta.json`. Stock `webdataset` reads the shards. Arrays are not
compressed, and the manifest holds their byte offsets, so our reader maps the file and parses no header.

float16 fields are stored as (value - mean) / std of their channel. float16 has 11 significant bits: a value z standard
deviations from the mean is off by up to z * 2^-11 standard deviations. Data with rare, far values are refused.
"""

import hashlib
import itertools
import math
import mmap
import os
import stat
import sys
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from data_pipeline.errors import UserError, reason_and_remedy
from data_pipeline.files import sha256
from data_pipeline.schema import canonical
from data_pipeline.shards.format import Manifest, Shard
from data_pipeline.well.stats import Stats

MAX_ERROR = 1e-2  # of a value stored as float16, in std of its channel; reached 16 to 32 std from the mean
NPY_HEADER_BYTES = 128
_DTYPES = {"float32": "<f4", "float16": "<f2"}
_PIECE_BYTES = 2**20  # written and hashed at a time
_MAX_RUNNING = 16  # pieces that wait to be written, hashed or checksummed: they bound the memory of a writer
_SYNC_BYTES = 2**26
T = TypeVar("T")
_REMEDY = "copy it again, or remove the folder and run `data-pipeline shard` again"


def encoding_of(channels: Sequence[str], stats: Stats) -> dict[str, tuple[float, float]]:
    """Return channel -> (offset, scale): value = stored * scale + offset, in float32.

    A channel without spread has the scale 1.
    """
    return {
        name: (float(np.float32(stats["mean"][name])), float(np.float32(stats["std"][name])) or 1.0)
        for name in channels
    }


def from_float16(stored: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return float16 (..., C, H, W) as float32 values; offset and scale are float32 (C, 1, 1)."""
    return np.asarray(stored.astype(np.float32) * scale + offset)


class Encoder:
    """Stores frames as float16 and keeps the worst error of each channel, in units of its std."""

    def __init__(self, channels: Sequence[str], stats: Stats) -> None:
        self.encoding = encoding_of(channels, stats)
        self._offset, self._scale = np.array([*self.encoding.values()], np.float32).T.reshape(2, -1, 1, 1)
        self.worst = np.zeros(len(self.encoding))

    def encode(self, frames: np.ndarray, where: str) -> np.ndarray:
        """Return float32 (T, C, H, W) as float16; NaN and Inf stay NaN and Inf.

        Raises UserError, naming `where`, when a finite value overflows or is off by more than MAX_ERROR.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            stored = ((frames - self._offset) / self._scale).astype("<f2")
            error = np.abs(from_float16(stored, self._offset, self._scale) - frames) / self._scale
        error[~np.isfinite(frames)] = 0
        worst = error.max(axis=(0, 2, 3))
        for channel in np.flatnonzero(~(worst <= MAX_ERROR)).tolist():
            got = "overflows" if not np.isfinite(worst[channel]) else f"is off by {worst[channel]:.3g} std"
            raise UserError(
                f"{where}: channel {list(self.encoding)[channel]}: a value {got} as float16, expected at most "
                f"{MAX_ERROR:g} std; use --dtype float32 for this dataset"
            )
        self.worst = np.maximum(self.worst, worst)
        return stored


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:06d}.tar"


def sample_key(trajectory: int, first_frame: int) -> str:
    """Return the key of the sample that starts at a frame.

    It has no dot, since webdataset splits names at the first one.
    """
    return f"traj{trajectory:05d}_frame{first_frame:05d}"


def array_crcs(values: np.ndarray) -> str:
    """Return the CRC-32 of the bytes of each array along the first axis, eight hex digits each."""
    return "".join(f"{zlib.crc32(one):08x}" for one in np.ascontiguousarray(values))


class ShardWriter:
    """Appends samples to a tar file whose bytes depend on nothing but the samples: no dates, owners or padding.

    Use it as a context manager. Writing and hashing, the slowest part of a conversion, have a thread each.
    `webdataset.TarWriter` makes the same tar, but it holds each member in memory, and importing it loads torch: 180 MiB
    more for every job.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._position, self._unsynced = file, hashlib.sha256(), 0, 0
        self._is_plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self._threads = {name: ThreadPoolExecutor(1, name) for name in ("io", "sha256", "crc")}
        self._running: deque[Future[Any]] = deque()

    def add_array(self, name: str, shape: tuple[int, ...], dtype: str, blocks: Iterable[np.ndarray]) -> None:
        """Add an array of this shape in NPY format; `blocks`, along its first axis, are of the stored type."""
        header = _npy_header(shape, dtype)
        num_bytes = len(header) + np.dtype(_DTYPES[dtype]).itemsize * math.prod(shape)
        self._add(name, num_bytes, itertools.chain([header], (block.data for block in blocks)))

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Add a JSON object."""
        text = canonical(content)
        self._add(name, len(text), [text])

    def crcs(self, values: np.ndarray) -> "Future[str]":
        """Return `array_crcs` of arrays that stay as they are, computed in a thread."""
        return self._start("crc", array_crcs, values)

    def finish(self, name: str) -> Shard:
        """End the archive and return its record under `name`. Raises OSError where a write failed."""
        # Two empty blocks end a tar. TarFile.close() would add zeros up to 10 KiB, which no reader needs.
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        for running in self._running:
            running.result()
        return Shard(name, self._position, self._hash.hexdigest())

    def _add(self, name: str, num_bytes: int, pieces: Iterable[bytes | memoryview]) -> None:
        info = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0
        info.size = num_bytes
        # USTAR holds sizes below 8 GiB; a larger chunk is an extension of GNU's that readers understand.
        self._write(info.tobuf(tarfile.USTAR_FORMAT if num_bytes < 2**33 else tarfile.GNU_FORMAT))
        start = self._position
        for piece in pieces:
            self._write(piece)
        assert self._position == start + num_bytes, (name, num_bytes)
        self._write(bytes(-num_bytes % tarfile.BLOCKSIZE))

    def _write(self, content: bytes | memoryview) -> None:
        view = memoryview(content).cast("B")
        self._position += len(view)
        for first in range(0, len(view), _PIECE_BYTES):
            self._start("io", self._put, view[first : first + _PIECE_BYTES])
            self._start("sha256", self._hash.update, view[first : first + _PIECE_BYTES])

    def _start(self, thread: str, function: Callable[..., T], *arguments: object) -> "Future[T]":
        """Run a function in one of the threads; raise the OSError of an earlier write that failed."""
        future = self._threads[thread].submit(function, *arguments)
        self._running.append(future)
        while len(self._running) > _MAX_RUNNING:
            self._running.popleft().result()
        return future

    def _put(self, content: memoryview) -> None:
        """Write to the file. The disk gets the content as it comes, so that little is left to wait for at the end."""
        self._file.write(content)
        self._unsynced += len(content)
        if self._is_plain and self._unsynced >= _SYNC_BYTES:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return the header of a C-ordered little-endian array, NPY format 1.0, always 128 bytes.

    numpy's own header has had other lengths in other versions; shards must not depend on that.
    """
    text = f"{{'descr': '{_DTYPES[dtype]}', 'fortran_order': False, 'shape': {shape!r}, }}"
    size = NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode("ascii") + b"\n"


def array_offsets(path: Path) -> dict[str, int]:
    """Return where the data of each array of a shard begin, by the name of its member."""
    with tarfile.open(path, "r:") as tar:
        return {one.name: one.offset_data + NPY_HEADER_BYTES for one in tar if one.name.endswith(".npy")}


def check_shard(path: Path, num_bytes: int) -> None:
    """Raise UserError unless `path` is a plain file (no link) of the stated size."""
    try:
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path}: expected a shard of {num_bytes} bytes, got: {error.strerror}; {_REMEDY}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: expected a plain file, got a link or something else; put the shard itself there")
    if found.st_size != num_bytes:
        what = "truncated" if found.st_size < num_bytes else "longer than it was"
        raise UserError(f"{path}: {what}: expected {num_bytes} bytes, got {found.st_size}; {_REMEDY}")


def map_shard(path: Path, num_bytes: int) -> mmap.mmap:
    """Map a shard for reading. Raises UserError unless it is a plain file of exactly the size in its manifest."""
    check_shard(path, num_bytes)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if os.fstat(descriptor).st_size != num_bytes:  # replaced since the check above
            os.close(descriptor)
            raise UserError(f"{path}: its size changed while it was opened; {_REMEDY}")
        return map_and_close(descriptor, num_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_and_remedy(error, _REMEDY)}") from error


def map_and_close(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Map an open file for reading, and close the descriptor."""
    try:
        if sys.version_info >= (3, 13):  # before, the map kept a duplicate of the descriptor
            return mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ, trackfd=False)
        return mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def damage(folder: Path, manifest: Manifest, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[str]:
    """Compare the shards of a folder with its manifest; yield a line for each trajectory or frame that differs.

    `on_bytes` gets the size of each shard that is done.
    """
    for index, shard in enumerate(manifest.shards):
        try:
            content = map_shard(folder / shard.name, shard.bytes)
        except UserError as error:
            yield str(error)
            continue
        lines = list(_damaged_arrays(content, manifest, index))
        if not lines and sha256(content) != shard.sha256:
            lines = ["altered outside the fields and constants (a header or meta.json)"]
        yield from (f"{folder / shard.name}: {line}; {_REMEDY}" for line in lines)
        on_bytes(shard.bytes)


def _damaged_arrays(content: mmap.mmap, manifest: Manifest, shard: int) -> Iterator[str]:
    size = manifest.frame_bytes
    for number, trajectory in enumerate(manifest.trajectories):
        if trajectory.shard != shard:
            continue
        for frame in range(trajectory.frames):
            chunk, within = divmod(frame, manifest.frames_per_chunk)
            start = trajectory.offsets[chunk] + within * size
            if f"{zlib.crc32(content[start : start + size]):08x}" != trajectory.crc32[8 * frame : 8 * frame + 8]:
                yield f"trajectory {number}, frame {frame}: its checksum is wrong"
        offset = trajectory.constants_offset
        if offset is not None:
            crc = zlib.crc32(content[offset : offset + manifest.constants_bytes])
            if f"{crc:08x}" != trajectory.constants_crc32:
                yield f"trajectory {number}, constant fields: their checksum is wrong"
