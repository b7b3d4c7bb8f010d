"""State fields as float16: (value - mean) / std of each channel, with the error measured as it is made.

float16 has 11 significant bits: a value z standard deviations from the mean is off by up to z * 2^-11 of them. So data
with rare, far values are refused rather than blurred.

One chunk of a trajectory <-> one WebDataset sample in a plain tar file.

A sample is `<key>.fields.npy` float32 or float16 (T, C, H, W), in the first chunk of a trajectory
`<key>.constants.npy` (K, H, W), and `<key>.meta.json`. Stock `webdataset` reads the shards. Arrays are not compressed
and their byte offsets stand in the manifest, so our reader maps the file and never parses a header.
"""

import hashlib
import math
import mmap
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.files import UserError, sha256
from data_pipeline.schema import canonical
from data_pipeline.shards.format import Manifest, Shard
from data_pipeline.well.stats import Stats

MAX_ERROR = 1e-2  # in std of the channel; reached 16 to 32 std from the mean


def encoding_of(channels: Sequence[str], stats: Stats) -> dict[str, tuple[float, float]]:
    """Channel -> (offset, scale): value = stored * scale + offset, in float32. A channel without spread has scale 1."""
    return {
        name: (float(np.float32(stats["mean"][name])), float(np.float32(stats["std"][name])) or 1.0)
        for name in channels
    }


class Encoder:
    """Encodes frames and keeps the worst error of each channel, in units of its std."""

    def __init__(self, channels: Sequence[str], stats: Stats) -> None:
        self.channels = tuple(channels)
        pairs = encoding_of(channels, stats).values()
        self._offset = np.array([offset for offset, _ in pairs], np.float32)[:, None, None]
        self._scale = np.array([scale for _, scale in pairs], np.float32)[:, None, None]
        self.worst = np.zeros(len(self.channels))

    def encode(self, frames: np.ndarray, where: str) -> np.ndarray:
        """float32 (T, C, H, W) -> float16; NaN and Inf stay what they are.

        Raises UserError, naming `where`, when a finite value overflows or is off by more than MAX_ERROR.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            stored = ((frames - self._offset) / self._scale).astype("<f2")
            error = np.abs(decode(stored, self._offset, self._scale) - frames) / self._scale
        error[~np.isfinite(frames)] = 0
        worst = error.max(axis=(0, 2, 3))
        for channel in np.flatnonzero(~(worst <= MAX_ERROR)).tolist():
            got = "overflows" if not np.isfinite(worst[channel]) else f"is off by {worst[channel]:.3g} std"
            raise UserError(
                f"{where}: channel {self.channels[channel]}: a value {got} as float16, expected at most {MAX_ERROR:g} "
                "std; use --dtype float32 for this dataset"
            )
        self.worst = np.maximum(self.worst, worst)
        return stored


def decode(stored: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float16 (..., C, H, W) -> float32; offset and scale are float32 (C, 1, 1)."""
    return np.asarray(stored.astype(np.float32) * scale + offset)


_BLOCK = 512  # tar's unit: headers take one, contents are padded to it
_NPY_HEADER_BYTES = 128
_SYNC_BYTES = 2**26
_STORED = {"float32": "<f4", "float16": "<f2"}


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.tar"


def sample_key(trajectory: int, first_frame: int) -> str:
    """Key of the sample that starts at a frame; no dot in it, since webdataset splits names at the first one."""
    return f"traj{trajectory:05d}_frame{first_frame:05d}"


def npy_header(shape: tuple[int, ...], dtype: str = "float32") -> bytes:
    """Header of a C-ordered little-endian float32 or float16 array, NPY format 1.0, always 128 bytes.

    numpy's own header has had other lengths in other versions; shards must not depend on that.
    """
    text = f"{{'descr': '{_STORED[dtype]}', 'fortran_order': False, 'shape': {shape!r}, }}"
    size = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode("ascii") + b"\n"


def array_crcs(values: np.ndarray) -> str:
    """CRC-32 of the bytes of each array along the first axis, eight hex digits each."""
    return "".join(f"{zlib.crc32(one):08x}" for one in np.ascontiguousarray(values))


@dataclass(frozen=True)
class Appended:
    """Arrays that are being written and checksummed: they must stay as they are until `crcs` has returned."""

    _written: "Future[None]"
    _hashed: "Future[None]"
    _crcs: "Future[str]"

    def crcs(self) -> str:
        """Waits until all is done; returns the CRCs as `array_crcs` does. Raises OSError where the write failed."""
        self._written.result()
        self._hashed.result()
        return self._crcs.result()


class ShardWriter:
    """Appends samples to a tar file whose bytes depend on nothing but the samples: no times, owners or padding.

    Use it as a context manager. Writing, SHA-256 (the slowest part of a conversion) and the CRCs each have a thread,
    beside the reading. The disk is told to take what is written as it comes, so that little is left to wait for at the
    end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._position = file, hashlib.sha256(), 0
        self._writing, self._hashing, self._summing = (ThreadPoolExecutor(1, name) for name in ("io", "sha256", "crc"))
        self._unsynced: int | None = 0 if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
        self._writes: list[Future[None]] = []  # all of them: one that failed must not be lost

    def start_array(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> int:
        """Begins the member `<name>` that `extend` fills with an array of this shape; returns where its data begin."""
        header = npy_header(shape, dtype)
        num_bytes = len(header) + np.dtype(_STORED[dtype]).itemsize * math.prod(shape)
        self._start_member(name, num_bytes)
        self._write(header)
        return self._position

    def extend(self, values: np.ndarray) -> Appended:
        """Appends arrays along the first axis, C-contiguous and of the stored type."""
        assert values.flags.c_contiguous, values.strides
        assert values.dtype.str in _STORED.values(), values.dtype
        view = values.data.cast("B")
        self._position += len(view)
        self._writes.append(self._writing.submit(self._put, view))
        return Appended(
            self._writes[-1],
            self._hashing.submit(self._hash.update, view),
            self._summing.submit(array_crcs, values),
        )

    def end_array(self) -> None:
        """Ends the member that `start_array` began."""
        self._pad()

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Adds a member that holds JSON."""
        text = canonical(content)
        self._start_member(name, len(text))
        self._write(text)
        self._pad()

    def finish(self, name: str) -> Shard:
        """Ends the archive and returns its record under `name`. Raises OSError where a write failed."""
        self._write(bytes(2 * _BLOCK))
        for written in self._writes:
            written.result()
        return Shard(name, self._position, self._hashing.submit(self._hash.hexdigest).result())

    def _start_member(self, name: str, num_bytes: int) -> None:
        info = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0
        info.size = num_bytes
        # USTAR holds sizes below 8 GiB; a larger chunk is an extension of GNU's that readers understand.
        self._write(info.tobuf(tarfile.USTAR_FORMAT if num_bytes < 2**33 else tarfile.GNU_FORMAT))

    def _pad(self) -> None:
        self._write(bytes(-self._position % _BLOCK))  # every member starts at a multiple of a block

    def _write(self, content: bytes) -> None:
        self._position += len(content)
        self._writes.append(self._writing.submit(self._put, content))
        self._hashing.submit(self._hash.update, content)

    def _put(self, content: bytes | memoryview) -> None:
        """Writes, in a thread of its own, and now and then waits until the disk has what was written."""
        self._file.write(content)
        if self._unsynced is not None:
            self._unsynced += len(content)
            if self._unsynced >= _SYNC_BYTES:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._unsynced = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._writing.shutdown(cancel_futures=True)
        self._hashing.shutdown(cancel_futures=True)
        self._summing.shutdown(cancel_futures=True)


def check_shard(path: Path, num_bytes: int) -> None:
    """Raises UserError unless `path` is a plain file (no link) of the stated size."""
    try:
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path}: expected a shard of {num_bytes} bytes, got: {error.strerror}; {_REMEDY}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: expected a plain file, got a link or something else; put the shard itself there")
    if found.st_size != num_bytes:
        what = "truncated" if found.st_size < num_bytes else "longer than it was"
        raise UserError(f"{path}: {what}: expected {num_bytes} bytes, got {found.st_size}; {_REMEDY}")


_REMEDY = "copy it again, or remove the folder and run `data-pipeline shard` again"


def map_shard(path: Path, num_bytes: int) -> mmap.mmap:
    """Maps a shard for reading. Raises UserError unless it is a plain file of exactly the size in its manifest."""
    check_shard(path, num_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size != num_bytes:  # replaced since the check above
            raise UserError(f"{path}: its size changed while it was opened; {_REMEDY}")
        return mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def damage(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Compares the shards of a folder with its manifest; one line for each shard, trajectory or frame that differs."""
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
