"""One chunk of a trajectory <-> one WebDataset sample in a plain tar file.

A sample is `<key>.fields.npy` float32 (T, C, H, W), in the first chunk of a trajectory `<key>.constants.npy` (K, H, W),
and `<key>.meta.json`. Stock `webdataset` reads the shards. Arrays are not compressed and their byte offsets stand in
the manifest, so our reader maps the file and never parses a header.
"""

import hashlib
import mmap
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.manifest import MANIFEST_NAME, Manifest, Shard, SourceFile, Trajectory
from data_pipeline.records import canonical

__all__ = ["MANIFEST_NAME", "Manifest", "Shard", "ShardWriter", "SourceFile", "Trajectory", "damage", "map_shard"]

_BLOCK = 512  # tar's unit: headers take one, contents are padded to it
_NPY_HEADER_BYTES = 128
_HASH_BYTES = 2**22


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.tar"


def sample_key(trajectory: int, first_frame: int) -> str:
    """Key of the sample that starts at a frame; no dot in it, since webdataset splits names at the first one."""
    return f"traj{trajectory:05d}_frame{first_frame:05d}"


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a C-ordered little-endian float32 array, NPY format 1.0, always 128 bytes.

    numpy's own header has had other lengths in other versions; shards must not depend on that.
    """
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape!r}, }}"
    size = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode("ascii") + b"\n"


def frame_crcs(frames: np.ndarray) -> str:
    """CRC-32 of each little-endian float32 array along the first axis, eight hex digits each."""
    return "".join(f"{zlib.crc32(frame.data):08x}" for frame in np.ascontiguousarray(frames, "<f4"))


class ShardWriter:
    """Appends samples to a tar file whose bytes depend on nothing but the samples: no times, owners or padding."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._position = file, hashlib.sha256(), 0

    def add(
        self, key: str, fields: np.ndarray, constants: np.ndarray | None, meta: Mapping[str, Any]
    ) -> tuple[int, int | None]:
        """Adds fields (T, C, H, W), constants (K, H, W) or None, and meta; returns the byte offsets of both arrays."""
        offset = self._add_array(f"{key}.fields.npy", fields)
        constants_offset = None if constants is None else self._add_array(f"{key}.constants.npy", constants)
        self._add_member(f"{key}.meta.json", canonical(meta))
        return offset, constants_offset

    def finish(self, name: str) -> Shard:
        """Ends the archive and returns its record under `name`."""
        self._write(bytes(2 * _BLOCK))
        return Shard(name, self._position, self._hash.hexdigest())

    def _add_array(self, name: str, values: np.ndarray) -> int:
        values = np.ascontiguousarray(values, "<f4")
        return self._add_member(name, npy_header(values.shape), values.data) + _NPY_HEADER_BYTES

    def _add_member(self, name: str, *parts: bytes | memoryview) -> int:
        """Writes one member and returns the offset of its content."""
        info = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0
        views = [memoryview(part).cast("B") for part in parts]
        info.size = sum(view.nbytes for view in views)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        start = self._position
        for view in views:
            self._write(view)
        self._write(bytes(-info.size % _BLOCK))
        return start

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._position += len(content)


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
        hasher = hashlib.sha256()
        for start in range(0, shard.bytes, _HASH_BYTES):
            hasher.update(content[start : start + _HASH_BYTES])
        lines = list(_damaged_arrays(content, manifest, index))
        if not lines and hasher.hexdigest() != shard.sha256:
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
