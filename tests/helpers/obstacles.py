"""What keeps HDF5 from reading a file that is whole: a lock, a permission, a filter that is not installed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py


@contextmanager
def opened_for_writing(path: Path) -> Iterator[None]:
    """By another process."""
    writing = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", writing, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdout.readline()
        yield
        writer.stdin.close()


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def compress_with_blosc(file: h5py.File, name: str) -> None:
    """Give a dataset bytes as of a filter that only a plugin has (32001)."""
    attributes, shape = dict(file[name].attrs), file[name].shape
    del file[name]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk(shape)
    settings.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple(shape), settings)
    made.write_direct_chunk((0,) * len(shape), b"x" * 2**20)
    file[name].attrs.update(attributes)
