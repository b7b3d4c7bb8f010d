"""Hostile and damaged HDF5 files end in success or in UserError, and reach nothing outside their folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzzing import MANY, Guard, cases
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.registry import load_registry
from data_pipeline.well.hdf5 import WellFile, split_files

MAZE = "acoustic_scattering_maze"
CARD = load_registry().card(MAZE)

OBJECTS = (
    *("/", "dimensions", "dimensions/time", "dimensions/x", "dimensions/y", "t0_fields", "t0_fields/pressure"),
    *("t0_fields/density", "t1_fields", "t1_fields/velocity", "t2_fields", "scalars", "boundary_conditions"),
    *("boundary_conditions/x0_wall", "boundary_conditions/x0_wall/mask"),
)
ATTRIBUTES = (
    *("n_trajectories", "spatial_dims", "field_names", "time_varying", "sample_varying", "dim_varying", "bc_type"),
)
ATTRIBUTE_VALUES = (
    *(
        0,
        -1,
        2,
        2**31,
        2**62,
        np.nan,
        "x",
        "x\ny",
        b"\xff\xfe",
        True,
        [],
        ["pressure"] * 3,
        ["../secret"],
        ["."],
        ["x"],
    ),
    *(np.zeros((2, 2)), h5py.Empty("f"), [True, False], [False] * 3, np.bytes_(b"\xff"), ["/dimensions/time"], [""]),
    1e308,
)
REPLACEMENTS = (
    *("nothing", "group", "text", "scalar", "empty", "huge", "vast chunks", "wrong type", "rank", "soft", "outside"),
    *("elsewhere", "virtual", "loop", "names", "compound"),
)


def _replace(file: h5py.File, whole: h5py.File, name: str, kind: str) -> None:
    """Puts something else in the place of an object, with the attributes that it has in the whole file."""
    parent, _, child = name.rpartition("/")
    if name not in file or not child:
        return
    group, old = file[parent] if parent else file, whole[name]
    attributes, shape = dict(old.attrs), getattr(old, "shape", (3,)) or (1,)
    del group[child]
    if kind == "group":
        new = group.create_group(child)
    elif kind in ("text", "scalar", "names"):
        new = group.create_dataset(child, data={"text": "x", "scalar": 1.0, "names": ["a", "b"]}[kind])
    elif kind == "empty":
        new = group.create_dataset(child, data=h5py.Empty("f4"))
    elif kind == "huge":
        new = group.create_dataset(child, (*shape[:-1], 2**33), "f4", chunks=(1,) * (len(shape) - 1) + (2**10,))
    elif kind == "vast chunks":
        new = group.create_dataset(child, (2**28,) * len(shape), "f4", chunks=(2**28, *(1,) * (len(shape) - 1)))
    elif kind == "wrong type":
        new = group.create_dataset(child, shape, "i8")
    elif kind == "rank":
        new = group.create_dataset(child, (*shape, 2), "f4")
    elif kind == "compound":
        new = group.create_dataset(child, shape, [("a", "f4"), ("b", "i2")])
    elif kind == "elsewhere":
        new = group.create_dataset(child, shape, "f4", external=[("../secret", 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape, "f4")
        layout[...] = h5py.VirtualSource("../secret", "data", shape)
        new = group.create_virtual_dataset(child, layout)
    else:
        links = {"soft": h5py.SoftLink("/nowhere"), "outside": h5py.ExternalLink("../secret", "/"), "loop": file["/"]}
        if kind in links:
            group[child] = links[kind]
        return
    for key, value in attributes.items():
        new.attrs[key] = value


def use_well_file(path: Path) -> None:
    """What `shard` and `audit` ask of one file."""
    with WellFile(path, CARD) as file:
        for trajectory in {0, file.num_trajectories - 1}:
            file.read(trajectory, 0, min(2, file.num_frames))
            file.constants(trajectory)
            file.times(trajectory)
            file.dt(trajectory)
            file.scalars(trajectory)


@pytest.fixture(scope="module")
def well_file(guard: Guard, tiny_well: Path) -> Path:
    """A small file of the Well in the guarded folder."""
    path = Path(shutil.copy(split_files(tiny_well / MAZE, "test")[0], Path(guard.root) / "whole.hdf5"))
    assert guard.check(lambda: use_well_file(path))
    return path


@cases(250)
@given(
    attributes=st.lists(
        st.tuples(st.sampled_from(OBJECTS), st.sampled_from(ATTRIBUTES), st.sampled_from(ATTRIBUTE_VALUES)), max_size=2
    ),
    objects=st.lists(st.tuples(st.sampled_from(OBJECTS), st.sampled_from(REPLACEMENTS)), max_size=2),
)
def test_hdf5_headers(guard: Guard, well_file: Path, attributes: list, objects: list) -> None:
    path = Path(shutil.copy(well_file, well_file.with_name("changed.hdf5")))
    with h5py.File(well_file) as whole, h5py.File(path, "r+") as file:
        for name, key, value in attributes:
            if name in file:
                file[name].attrs[key] = value
        for name, kind in objects:
            _replace(file, whole, name, kind)
    guard.check(lambda: use_well_file(path))


CHILD = """
import random, sys
from pathlib import Path
from test_hostile_hdf5 import use_well_file
from data_pipeline.errors import UserError
content, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
for seed in range(int(sys.argv[3]), int(sys.argv[4])):
    rng, raw = random.Random(seed), bytearray(content)
    size = len(raw) if seed % 2 else 4096  # the header's part of the file, every other time
    for _ in range(rng.randint(1, 20)):
        raw[rng.randrange(size)] = rng.choice([0, 255, rng.randrange(256)])
    path.write_bytes(raw if seed % 5 else raw[: rng.randrange(size)])
    print(seed, end=" ", flush=True)
    try:
        use_well_file(path)
        print("good", flush=True)
    except UserError:
        print("refused", flush=True)
"""


def test_damaged_hdf5(guard: Guard, well_file: Path, tmp_path: Path) -> None:
    """In processes of their own: damage can end libhdf5 itself, and what it does then is not ours to choose."""
    first, last, outcomes = 0, 120 * MANY, []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *sys.path])}
    while first < last:
        arguments = [str(well_file), str(tmp_path / "damaged.hdf5"), str(first), str(last)]
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        try:
            output, errors = child.communicate(timeout=20)
        except subprocess.TimeoutExpired:  # an endless loop in libhdf5, or many cases
            child.kill()
            output, errors = child.communicate()
        lines = output.decode().split("\n")
        outcomes += [line.split()[1] for line in lines if line.endswith(("good", "refused"))]
        if child.returncode == 0:
            break
        assert child.returncode < 0, errors.decode()  # a signal; anything else is an exception of ours
        first = int(lines[-1].split()[0]) + 1 if lines[-1] else first + len(lines) - 1
    assert {"good", "refused"} == set(outcomes)
    assert len(outcomes) > 0.9 * last
