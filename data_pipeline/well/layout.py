"""Parts of a Well: folders and files here or behind a URL, groups and datasets of a file, and boundary conditions.

HDF5 files are not trusted. A header of a kilobyte can declare a petabyte, or name another file; both are refused before
anything is read.
"""

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipeline.errors import UserError, printable
from data_pipeline.registry import BOUNDARY_TYPES, Boundary
from data_pipeline.remote import RemoteFile, RemoteFolder, is_url

Folder = Path | RemoteFolder
File = Path | RemoteFile
MAX_TEXT_BYTES = 16 * 2**20


def folder_at(location: str | Path) -> Folder:
    """Return the folder at a local path or a URL. UserError for a URL of a kind that is not opened."""
    return RemoteFolder(str(location)) if is_url(location) else Path(location)


def child_names(folder: Folder) -> list[str]:
    """Return the names of what is directly in a folder, sorted; none if there is no such local folder.

    UserError when a server does not list the folder.
    """
    if isinstance(folder, RemoteFolder):
        return folder.names()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def child_file(folder: Folder, name: str) -> File:
    """Return the file of that name in a folder. It need not be there."""
    return folder.file(name) if isinstance(folder, RemoteFolder) else folder / name


def file_bytes(file: File) -> int:
    """Return the size of a file. UserError when a server does not give it."""
    return file.stat().st_size if isinstance(file, Path) else file.known_size()


def read_range(file: File, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file."""
    if isinstance(file, RemoteFile):
        return file.read_range(start, stop)
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def read_small(file: File) -> bytes:
    """Return all of a small text file. UserError for one of more than MAX_TEXT_BYTES."""
    if isinstance(file, RemoteFile):
        return file.read(MAX_TEXT_BYTES)
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise UserError(f"{file}: expected a text of at most {MAX_TEXT_BYTES} bytes, got more")
    return file.read_bytes()


@contextmanager
def hdf5_errors(where: str) -> Iterator[None]:
    """Turn the errors of h5py, and of attributes of an unexpected kind, into a UserError that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where}: not in the Well's layout: {error.args[0]}") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"{where}: {hdf5_cause(error)}") from error


def hdf5_cause(error: OSError | RuntimeError) -> str:
    """Return why HDF5 could not read a file, and what to do."""
    text = " ".join(str(error).split())
    return hdf5_obstacle(error) or f"cannot be read, so it is truncated or no HDF5 file ({text}); get it again"


def hdf5_obstacle(error: OSError | RuntimeError) -> str | None:
    """Return what keeps HDF5 from reading a file that may be whole, and what to do; None if the file is damaged."""
    number, text = getattr(error, "errno", None), " ".join(str(error).split())
    if "unable to lock file" in text:
        if number in (errno.EAGAIN, errno.EACCES):
            return "another program has it open for writing: wait until that has closed it"
        return "its file system has no locks: set HDF5_USE_FILE_LOCKING=FALSE while no other program writes it"
    if isinstance(error, PermissionError):
        return "you have no permission to read it: `chmod u+r` it, or ask its owner"
    if isinstance(error, FileNotFoundError):
        return "there is no such file (any more); look whether it was moved, or its disk is mounted"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, where a file was expected: move its files up, or rename it"
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise the limit, as with `ulimit -n 4096`"
    if number is not None:
        return f"its disk or file system failed ({os.strerror(number)}): the file may be whole, so try again"
    if "required filter" in text or "can't open directory" in text:  # of the plugins that are looked for
        return f"a filter that it is compressed with is not installed here ({text}): {_GET_FILTER}"
    return None


_GET_FILTER = (
    "repack the file where the filter is, `h5repack -f GZIP=4 FILE NEW`, or name the folder of the filter's plugin in "
    "HDF5_PLUGIN_PATH (`pip install hdf5plugin` brings the usual ones)"
)


def attribute(owner: h5py.Group | h5py.Dataset, name: str) -> Any:
    """Return an attribute. KeyError, naming it and its group or dataset, if it is missing."""
    if name not in owner.attrs:
        raise KeyError(f"{_place(owner)} has no attribute {name}")
    return owner.attrs[name]


def flags(owner: h5py.Group | h5py.Dataset, name: str, count: int = 1) -> tuple[bool, ...]:
    """Return an attribute of `count` booleans. ValueError for texts: bool("False") is True."""
    values = np.atleast_1d(attribute(owner, name))
    if values.shape != (count,) or values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        expected = "a boolean" if count == 1 else f"{count} booleans"
        got = ascii(values.tolist()[:4])[1:-1]
        raise ValueError(f"{_place(owner)}: attribute {name}: expected {expected}, got {got}; store a boolean")
    return tuple(map(bool, values))


def _place(owner: h5py.Group | h5py.Dataset) -> str:
    return ascii((owner.name or "").strip("/"))[1:-1] or "the file"


DEFLATE_RATIO = 1032  # deflate's best: 258 bytes for two bits (RFC 1951)
MAX_CHUNK_BYTES = 2**28  # HDF5 unpacks a whole chunk at a time in memory


def plain_group(parent: h5py.Group, name: str, where: str) -> h5py.Group:
    """Return a group of this very file. KeyError if it is not there, UserError if it is a link or no group."""
    _check_hard_link(parent, name, where)
    group = parent[name]
    if not isinstance(group, h5py.Group):
        raise UserError(f"{where}: expected a group, got {type(group).__name__}; get the file again")
    return group


def plain_dataset(parent: h5py.Group, name: str, where: str) -> h5py.Dataset:
    """Return a dataset of numbers stored in this very file. Links, external and virtual storage are refused."""
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
        raise KeyError(f"{_place(parent)} has no {name!a}")
    if not isinstance(link, h5py.HardLink):
        what = "another file" if isinstance(link, h5py.ExternalLink) else "another place"
        raise UserError(f"{where} is a link to {what}, which is not followed")


def texts(attribute: object) -> list[str]:
    """Return the texts of an attribute that holds one or a list; HDF5 libraries write them as str or as bytes.

    Their control characters become escapes: the texts are printed, and become names of files.
    """
    items = np.atleast_1d(np.asarray(attribute, dtype=object))
    return [printable(item.decode(errors="replace") if isinstance(item, bytes) else str(item)) for item in items]


def check_extent(data: h5py.Dataset, where: str) -> None:
    """Raise UserError if a dataset declares more bytes than the file stores for it, or was written in part only."""
    declared, stored = math.prod(data.shape) * data.dtype.itemsize, data.id.get_storage_size()
    possible = stored
    if data.chunks is not None:
        if math.prod(data.chunks) * data.dtype.itemsize > MAX_CHUNK_BYTES:
            raise UserError(
                f"{where}: expected HDF5 chunks of at most {MAX_CHUNK_BYTES} bytes, got {data.chunks}; "
                "repack the file with h5repack -l"
            )
        settings = data.id.get_create_plist()
        filters = [settings.get_filter(index) for index in range(settings.get_nfilters())]
        for number, _, _, name in filters:
            if not h5py.h5z.filter_avail(number):
                raise UserError(
                    f"{where}: it is compressed with the HDF5 filter {number} ({name.decode(errors='replace')!a}), "
                    f"which is not installed here: {_GET_FILTER}"
                )
        if filters:
            possible = DEFLATE_RATIO * stored
        needed = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
        if data.id.get_num_chunks() < needed:
            possible = 0
    if declared > possible:
        raise UserError(
            f"{where}: it declares {declared} bytes ({data.shape}, {data.dtype}), and the file stores {stored} for it: "
            "part of it was never written, or the header is wrong; get the file again"
        )


def contradiction(file: h5py.File) -> str | None:
    """Return the first field whose shape is not what the file itself declares (trajectories, frames, grid), or None."""
    dimensions = plain_group(file, "dimensions", "dimensions")
    axes = texts(attribute(dimensions, "spatial_dims"))
    num_trajectories = int(attribute(file, "n_trajectories"))
    num_frames, *grid = (plain_dataset(dimensions, name, name).shape[-1] for name in ("time", *axes))
    if min(num_trajectories, num_frames, *grid) < 1:
        return f"it declares {num_trajectories} trajectories of {num_frames} frames on the grid {grid}"
    for order in range(3):
        group = plain_group(file, f"t{order}_fields", f"t{order}_fields")
        for name in texts(attribute(group, "field_names")):
            data = plain_dataset(group, name, f"field {name!r}")
            shape = (num_trajectories,) * flags(data, "sample_varying")[0]
            shape += (num_frames,) * flags(data, "time_varying")[0]
            varying = flags(data, "dim_varying", len(grid))
            shape += tuple(size for size, varies in zip(grid, varying, strict=True) if varies)
            shape += (len(grid),) * order
            if data.shape != shape:
                return f"its field {name!r} has the shape {data.shape} where the file declares {shape}"
    return None


@dataclass(frozen=True)
class BoundaryMask:
    """One boundary group of the Well: `mask` is True where the condition holds, over the axes `dims`."""

    name: str  # the Well's group name, e.g. "y_wall_dirichlet"
    kind: str  # WALL, OPEN or PERIODIC
    dims: tuple[str, ...]  # ("x",), ("y",) or ("x", "y")
    mask: np.ndarray  # bool, one axis per dim


def edge(name: str, kind: str, dim: str, size: int, *, lower: bool = True, upper: bool = True) -> BoundaryMask:
    """Return a boundary on the lower and/or upper end of one axis of `size` points."""
    mask = np.zeros(size, dtype=bool)
    mask[0] |= lower
    mask[-1] |= upper
    return BoundaryMask(name, kind, (dim,), mask)


def edges(boundary: Boundary, grid: tuple[int, int]) -> tuple[BoundaryMask, ...]:
    """Return masks that hold no more than the types at the ends of the axes."""
    return tuple(
        edge(f"{axis}_{kind.lower()}", kind, axis, size, lower=lower == kind, upper=upper == kind)
        for axis, size, (lower, upper) in zip("xy", grid, boundary, strict=True)
        for kind in dict.fromkeys((lower, upper))
    )


def boundary_masks(groups: h5py.Group, where: str) -> tuple[BoundaryMask, ...]:
    """Return the boundary groups of a file, by name. UserError for one that is not over x, y or both."""
    masks = []
    for name in groups:
        group = plain_group(groups, name, f"{where}: boundary {name}")
        kind = " ".join(texts(attribute(group, "bc_type"))).upper()
        dims = tuple(texts(attribute(group, "associated_dims")))
        stored = plain_dataset(group, "mask", f"{where}: boundary {name}: mask")
        check_extent(stored, f"{where}: boundary {name}: mask")
        mask = np.asarray(stored[()], dtype=bool)
        if kind not in BOUNDARY_TYPES or mask.ndim != len(dims) or not set(dims) <= {"x", "y"}:
            raise UserError(
                f"{where}: boundary {name}: expected one of {', '.join(BOUNDARY_TYPES)} with a mask over x, y or both, "
                f"got {kind} with a mask of shape {mask.shape} over {', '.join(dims)}"
            )
        masks.append(BoundaryMask(name, kind, dims, mask))
    return tuple(masks)


def boundary_types(masks: Sequence[BoundaryMask]) -> Boundary:
    """Return the boundary type of the lower and upper end of each axis, coded as `the_well` does ('padding' type).

    An end is OPEN unless a group says otherwise: PERIODIC or OPEN if its mask holds anywhere on that end, WALL only if
    it holds on all of it; a later group (by name) overrides an earlier one.
    """
    sides = [["OPEN", "OPEN"], ["OPEN", "OPEN"]]
    for one in masks:
        holds = np.all if one.kind == "WALL" else np.any
        for axis, dim in enumerate(one.dims):
            for end, position in enumerate((0, -1)):
                if holds(one.mask.take(position, axis=axis)):
                    sides["xy".index(dim)][end] = one.kind
    return (sides[0][0], sides[0][1]), (sides[1][0], sides[1][1])
