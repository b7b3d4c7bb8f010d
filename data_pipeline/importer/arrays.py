"""Files of other programs as named lazy arrays: npy, npz, HDF5, netCDF and zarr.

The files are not trusted. Nothing in them is executed: pickled objects and zarr codecs that make objects are refused.
Nothing outside them is read: links are not followed. Sizes are checked before memory is taken.
"""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import free_bytes, load_json
from data_pipeline.well.layout import DEFLATE_RATIO, MAX_CHUNK_BYTES, MAX_TEXT_BYTES, check_extent

MAX_POINTS = 2**20  # along an axis; a header can declare any number
MAX_SMALL_BYTES = 64 * 2**20  # of an array that is read as a whole: times, grid points, scalars
NUMBERS = "biufcmM"  # kinds of numpy types that are read: numbers, and times
LOCKED = "another process has it open for writing; run the same command again when that process has ended"
FORMATS = "npy, npz, HDF5 (.h5, .hdf5, MATLAB's -v7.3), netCDF or zarr"
Attributes = Mapping[str, "str | float"]


@dataclass(frozen=True)
class Array:
    """One array of a file, read in parts."""

    key: str  # its path in the file
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[Any], np.ndarray]  # part of it, by a tuple of numbers and slices without steps
    dims: tuple[str, ...] | None = None  # names of its axes where the file has them
    attrs: Attributes = field(default_factory=dict)

    def whole(self) -> np.ndarray:
        """Return all values of a small array. UserError for more than MAX_SMALL_BYTES."""
        if math.prod(self.shape) * self.dtype.itemsize > MAX_SMALL_BYTES:
            raise UserError(f"{self.key}: expected a small array, got {self.shape} of {self.dtype}")
        return np.asarray(self.fetch(()))


@dataclass(frozen=True)
class ArrayFile:
    """An open file."""

    path: Path
    kind: str
    arrays: Mapping[str, Array]  # by key
    attrs: Attributes = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # keys of what holds no numbers


@contextmanager
def open_source(path: Path) -> Iterator[ArrayFile]:
    """Open a file; its content, not its name, gives the format. UserError if it cannot be read or is of another one."""
    opener = _opener(path)
    with ExitStack() as stack:
        with reading(path):
            source = opener(path, stack)
        yield source


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors that libraries raise for damaged files into a UserError that names the file."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: {_reason(error)}") from error
    except (EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "expected a file, found none"
    if isinstance(error, PermissionError):
        return "it may not be read; change its permissions"
    if "unable to lock file" in said or "already open for write" in said:
        return LOCKED
    return f"cannot be read: it is damaged, or another process is still writing it ({said[:300]})"


def _opener(path: Path) -> Callable[[Path, ExitStack], ArrayFile]:
    if path.is_dir():
        if any((path / name).is_file() for name in (".zgroup", ".zarray", "zarr.json")):
            return _open_zarr
        raise UserError(f"{path}: expected files or a zarr folder, got another folder; name its files, as in {path}/*")
    with reading(path), path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"\x93NUMPY"):
        return _open_npy
    if start.startswith(b"PK\x03\x04"):
        return _open_npz
    if start[:4] in (b"CDF\x01", b"CDF\x02"):
        return _open_netcdf3
    with reading(path):
        if h5py.is_hdf5(path):
            return _open_hdf5
    what = (
        "an empty file" if not start else "a MATLAB 5 file; save it with -v7.3" if start == b"MATLAB 5" else "another"
    )
    raise UserError(f"{path}: expected {FORMATS}, got {what}")


def _open_npy(path: Path, stack: ExitStack) -> ArrayFile:
    values = _mapped(path, str(path))
    return ArrayFile(
        path, "npy", {"data": Array("data", values.shape, values.dtype, lambda part: np.array(values[part]))}
    )


def _mapped(path: Path, where: str) -> np.ndarray:
    with path.open("rb") as file:
        _check_numbers(_npy_header(file)[1], where)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _check_numbers(dtype: np.dtype, where: str) -> None:
    if dtype.kind == "O":
        raise UserError(
            f"{where}: it holds Python objects, which are not loaded because they can run code. Arrays of different "
            "lengths are saved like this too: save each trajectory as a file or an array of its own"
        )


def _open_npz(path: Path, stack: ExitStack) -> ArrayFile:
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = [one for one in archive.infolist() if not one.is_dir()]
    if not members or not all(one.filename.endswith(".npy") for one in members):
        raise UserError(f"{path}: expected {FORMATS}, got a zip archive of other files")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="data-pipeline-")))
    arrays, skipped = {}, []
    for number, member in enumerate(members):
        key = member.filename.removesuffix(".npy")
        with archive.open(member) as file:
            shape, dtype = _npy_header(file)
        _check_numbers(dtype, f"{path}: {key}")
        if dtype.kind not in NUMBERS:
            skipped.append(key)
            continue
        if member.file_size < math.prod(shape) * dtype.itemsize or member.file_size > DEFLATE_RATIO * (
            member.compress_size + 1024
        ):
            raise UserError(f"{path}: {key}: its header declares {shape} of {dtype}, and the file stores less")
        fetch = _Unpacked(archive, member, folder / str(number), path)
        arrays[key] = Array(key, shape, dtype, fetch)
    return ArrayFile(path, "npz", arrays, {}, tuple(skipped))


class _Unpacked:
    """A member of a zip archive, unpacked to a temporary file when it is read first, so memory stays small."""

    def __init__(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, path: Path) -> None:
        self._archive, self._member, self._target, self._path = archive, member, target, path
        self._values: np.ndarray | None = None

    def __call__(self, part: Any) -> np.ndarray:
        if self._values is None:
            if self._member.file_size > free_bytes(self._target.parent):
                raise UserError(
                    f"{self._path}: unpacking it needs {self._member.file_size / 1e9:.1f} GB in "
                    f"{self._target.parent.parent}; free some space, or set TMPDIR to another disk"
                )
            with self._archive.open(self._member) as packed, self._target.open("wb") as file:
                while block := packed.read(2**20):
                    file.write(block)
            self._values = np.load(self._target, mmap_mode="r", allow_pickle=False)
        return np.array(self._values[part])


def _open_hdf5(path: Path, stack: ExitStack) -> ArrayFile:
    file = stack.enter_context(h5py.File(path, "r", rdcc_nbytes=32 * 2**20))
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: h5py.HLObject) -> None:  # follows no links and visits each object once
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(visit)
    scales = any(_attribute(data.attrs, "CLASS") == "DIMENSION_SCALE" for data in found.values())
    if "_NCProperties" in file.attrs or path.suffix in (".nc", ".nc4") or scales:
        _check_root(file, path)
        file.close()
        return _open_xarray(path, stack, "netCDF", "h5netcdf")
    numbers = {name: data for name, data in found.items() if data.dtype.kind in NUMBERS and data.shape is not None}
    arrays = {name: _hdf5_array(path, name, data) for name, data in numbers.items()}
    return ArrayFile(path, "HDF5", arrays, _attributes(file.attrs), tuple(found.keys() - arrays.keys()))


def _hdf5_array(path: Path, name: str, data: h5py.Dataset) -> Array:
    checked = False

    def fetch(part: Any) -> np.ndarray:
        nonlocal checked
        if not checked:
            _check_stored(data, f"{path}: {name}")
            checked = True
        return np.asarray(data[part])

    labels = tuple(dim.label for dim in data.dims)
    return Array(
        name, data.shape, data.dtype, fetch, labels if all(labels) and labels else None, _attributes(data.attrs)
    )


def _check_stored(data: h5py.Dataset, where: str) -> None:
    if data.external or data.is_virtual:
        raise UserError(f"{where}: its values lie in another file, which is not followed; copy them into this one")
    check_extent(data, where)


def _check_root(file: h5py.File, path: Path) -> None:
    """Raise UserError for links and values outside the file, which the netCDF library would follow."""
    for name in file:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise UserError(f"{path}: {name} is a link, which is not followed; copy what it names into the file")
        data = file[name]
        if isinstance(data, h5py.Dataset) and data.dtype.kind in NUMBERS and data.id.get_storage_size():
            _check_stored(data, f"{path}: {name}")


def _open_netcdf3(path: Path, stack: ExitStack) -> ArrayFile:
    return _open_xarray(path, stack, "netCDF 3", "scipy")


def import_xarray() -> ModuleType:
    """Import xarray and the libraries it reads netCDF and zarr with. UserError if they are not installed."""
    try:
        import h5netcdf  # noqa: F401
        import xarray
        import zarr  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"netCDF and zarr need optional packages ({error}); install them with "
            "`launch/setup xarray`, or `pip install xarray h5netcdf zarr`"
        ) from error
    return xarray


def _open_xarray(path: Path, stack: ExitStack, kind: str, engine: str, **options: Any) -> ArrayFile:
    """Open with xarray, which knows fill values, packed numbers and dimensions. Times stay numbers with their unit."""
    xarray = import_xarray()
    # An unknown codec or a wrong header can raise anything in the libraries below xarray.
    try:
        given = stack.enter_context(
            xarray.open_dataset(path, engine=engine, decode_times=False, cache=False, chunks=None, **options)
        )
    except Exception as error:
        raise UserError(f"{path}: {_reason(error)}") from error
    arrays, skipped = {}, []
    for name, variable in given.variables.items():
        if variable.dtype.kind in NUMBERS:
            arrays[str(name)] = _xarray_array(str(name), variable)
        else:
            skipped.append(str(name))
    return ArrayFile(path, kind, arrays, _attributes(given.attrs), tuple(skipped))


def _xarray_array(name: str, variable: Any) -> Array:
    dims = tuple(map(str, variable.dims))
    return Array(
        name,
        variable.shape,
        np.dtype(variable.dtype),
        lambda part: np.asarray(variable[part].values),
        dims,
        _attributes(variable.attrs),
    )


# Codecs that turn bytes into numbers, and nothing else. Texts are decoded by two more, and are not read.
NUMBER_CODECS = frozenset(
    (
        *("bytes", "transpose", "sharding_indexed", "crc32c", "adler32", "fletcher32"),
        *("blosc", "gzip", "zstd", "zlib", "lz4", "bz2", "lzma"),
        *("shuffle", "bitround", "delta", "quantize", "fixedscaleoffset", "astype"),
    )
)
TEXT_CODECS = frozenset(("vlen-utf8", "vlen-bytes"))


def _open_zarr(path: Path, stack: ExitStack) -> ArrayFile:
    import_xarray()
    import zarr

    named = check_zarr(path)
    if all(one is not False for one in named) and not _is_array(path):
        return _open_xarray(path, stack, "zarr", "zarr", consolidated=False)
    if _is_array(path):
        found = {"data": zarr.open_array(str(path), mode="r")}
    else:
        group = zarr.open_group(str(path), mode="r", use_consolidated=False)
        found = {name: item for name, item in group.members(max_depth=None) if isinstance(item, zarr.Array)}
    arrays = {name: _zarr_array(name, one) for name, one in found.items() if np.dtype(one.dtype).kind in NUMBERS}
    attrs = {} if _is_array(path) else _attributes(group.attrs)
    return ArrayFile(path, "zarr", arrays, attrs, tuple(found.keys() - arrays.keys()))


def _zarr_array(name: str, one: Any) -> Array:
    return Array(
        name, one.shape, np.dtype(one.dtype), lambda part: np.asarray(one[part]), None, _attributes(one.attrs.asdict())
    )


def _is_array(path: Path) -> bool:
    content = load_json((path / "zarr.json").read_bytes()) if (path / "zarr.json").is_file() else {}
    return (path / ".zarray").is_file() or content.get("node_type") == "array"


def check_zarr(path: Path) -> list[bool | None]:
    """Check a zarr store before zarr reads it. Return for each folder whether it is an array with named dimensions.

    None stands for a folder without an array. zarr finds codecs by the names in the files, and some, such as pickle,
    run code. UserError for links, for codecs that make objects, and for sizes that do not fit into memory.
    """
    return [_check_zarr(Path(folder), [*folders, *names]) for folder, folders, names in os.walk(path)]


def _check_zarr(folder: Path, names: list[str]) -> bool | None:
    for name in (*names, "."):
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name}: it is a link, which is not followed; copy what it names into the folder")
    named: bool | None = None
    for name in (".zarray", "zarr.json"):
        if name not in names:
            continue
        if (folder / name).stat().st_size > MAX_TEXT_BYTES:
            raise UserError(f"{folder / name}: expected at most {MAX_TEXT_BYTES} bytes, got more")
        meta = load_json((folder / name).read_bytes())
        if name == "zarr.json" and meta.get("node_type") != "array":
            continue
        _check_codecs(meta, str(folder))
        other = load_json((folder / ".zattrs").read_bytes()) if ".zattrs" in names else {}
        named = bool(meta.get("dimension_names") or "_ARRAY_DIMENSIONS" in other)
        chunks = meta.get("chunks") or meta["chunk_grid"]["configuration"]["chunk_shape"]
        if math.prod(chunks) * 8 > 8 * MAX_CHUNK_BYTES:
            raise UserError(f"{folder}: expected chunks of at most {MAX_CHUNK_BYTES} numbers, got {chunks}")
        if len(meta["shape"]) == 1 and meta["shape"][0] > MAX_POINTS:  # xarray reads coordinates as a whole
            raise UserError(f"{folder}: expected at most {MAX_POINTS} points along an axis, got {meta['shape'][0]}")
    return named


def _check_codecs(meta: Mapping[str, Any], where: str) -> None:
    stack = [*(meta.get("filters") or []), meta.get("compressor"), *meta.get("codecs", [])]
    while stack:
        codec = stack.pop()
        if codec is None:
            continue
        name = str(codec.get("id") or codec.get("name")).lower().removeprefix("numcodecs.")
        if name not in NUMBER_CODECS | TEXT_CODECS:
            raise UserError(f"{where}: expected codecs of numbers, got {name[:40]!a}; store the array with another one")
        settings = codec.get("configuration") or {}
        stack += [*settings.get("codecs", []), *settings.get("index_codecs", [])]
    if "|O" in str(meta.get("dtype")) and not meta.get("filters"):
        raise UserError(f"{where}: it holds Python objects, which are not loaded because they can run code")


def _attributes(attrs: Any) -> dict[str, str | float]:
    """Return the attributes that are one number or one text."""
    named = ((str(name), _attribute(attrs, name)) for name in attrs)
    return {name: value for name, value in named if value is not None}


def _attribute(attrs: Any, name: str) -> str | float | None:
    try:
        value = np.asarray(attrs.get(name))
    except (OSError, TypeError, ValueError):  # an attribute of a kind that h5py does not read
        return None
    if value.size != 1:
        return None
    one = value.reshape(-1)[0]
    if isinstance(one, bytes):
        return one.decode(errors="replace")
    if isinstance(one, str):
        return str(one)
    return float(one) if value.dtype.kind in "iufb" else None
