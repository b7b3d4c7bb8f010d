"""What is taken from an HDF5 file nobody vouches for: its own groups, datasets and texts, and no more than it holds.

A header of a kilobyte can declare a petabyte, or name another file. Both are refused before anything is read.
"""

import math

import h5py
import numpy as np

from data_pipeline.errors import UserError

DEFLATE_RATIO = 1032  # deflate's best: 258 bytes for two bits (RFC 1951)
MAX_CHUNK_BYTES = 2**28  # HDF5 unpacks a whole chunk at a time in memory


def plain_group(parent: h5py.Group, name: str, where: str) -> h5py.Group:
    """A group of this very file. Raises KeyError if it is not there, UserError if it is a link or no group."""
    _check_hard_link(parent, name, where)
    group = parent[name]
    if not isinstance(group, h5py.Group):
        raise UserError(f"{where}: expected a group, got {type(group).__name__}; get the file again")
    return group


def plain_dataset(parent: h5py.Group, name: str, where: str) -> h5py.Dataset:
    """A dataset of numbers stored in this very file: links, external and virtual storage are refused."""
    _check_hard_link(parent, name, where)
    data = parent[name]
    if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
        raise UserError(f"{where}: expected a dataset stored in this file")
    if data.dtype.kind not in "iufb" or data.shape is None:
        raise UserError(f"{where}: expected an array of numbers, got {data.dtype}")
    return data


def _check_hard_link(parent: h5py.Group, name: str, where: str) -> None:
    link = parent.get(name, getlink=True)
    if link is None:
        raise KeyError(f"Unable to open object (object {name!r} doesn't exist)")
    if not isinstance(link, h5py.HardLink):
        what = "another file" if isinstance(link, h5py.ExternalLink) else "another place"
        raise UserError(f"{where} is a link to {what}, which is not followed")


def texts(attribute: object) -> list[str]:
    """An attribute that holds a text or a list of them; HDF5 libraries write them as str or as bytes."""
    items = np.atleast_1d(np.asarray(attribute, dtype=object))
    return [item.decode(errors="replace") if isinstance(item, bytes) else str(item) for item in items]


def check_extent(data: h5py.Dataset, where: str) -> None:
    """Raises UserError if a dataset declares more bytes than the file stores for it, or was written in part only."""
    declared, stored = math.prod(data.shape) * data.dtype.itemsize, data.id.get_storage_size()
    possible = stored
    if data.chunks is not None:
        if math.prod(data.chunks) * data.dtype.itemsize > MAX_CHUNK_BYTES:
            raise UserError(
                f"{where}: expected HDF5 chunks of at most {MAX_CHUNK_BYTES} bytes, got {data.chunks}; "
                "repack the file with h5repack -l"
            )
        if data.id.get_create_plist().get_nfilters():
            possible = DEFLATE_RATIO * stored
        needed = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
        if data.id.get_num_chunks() < needed:
            possible = 0
    if declared > possible:
        raise UserError(
            f"{where}: it declares {declared} bytes ({data.shape}, {data.dtype}), and the file stores {stored} for it: "
            "part of it was never written, or the header is wrong; get the file again"
        )
