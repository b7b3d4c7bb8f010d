"""Hostile and damaged input of every kind ends in success or in UserError, and reaches nothing outside its folder."""

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from fuzzing import CHANGES, EDITS, MANY, PIECES, TEXTS, Guard, cases, edited, mutated
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.cards.registry import load_folders, load_registry, packaged_folder
from data_pipeline.overview import overview
from data_pipeline.records import canonical, digest
from data_pipeline.remote import PROTOCOLS, RemoteFolder, is_url
from data_pipeline.shards.tar import damage
from data_pipeline.well.addresses import url_registry
from data_pipeline.well.hdf5 import WellFile, split_files
from data_pipeline.well.stats import read_stats
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader

MAZE = "acoustic_scattering_maze"
CARD = load_registry().card(MAZE)
MEMORY_BYTES = 256 * 2**20  # more than any of these inputs could honestly need


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    """A guarded, empty folder, and a limit to the memory of this process."""
    sandbox = tmp_path_factory.mktemp("sandbox")
    (sandbox / "secret").write_bytes(b"secret")
    (sandbox / "root").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere, as on macOS, the limit is not enforced
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, limits[1]))
    yield Guard(sandbox / "root")
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (sandbox / "secret").read_bytes() == b"secret"
    assert sorted(os.listdir(sandbox)) == ["root", "secret"]


# Shards


@pytest.fixture(scope="module")
def shards(guard: Guard, tiny_shards: Path) -> Iterator[Path]:
    """A copy of one dataset's shards in the guarded folder."""
    root = Path(guard.root)
    shutil.copytree(tiny_shards / MAZE / "test", root / MAZE / "test")
    yield root
    shutil.rmtree(root / MAZE)


def use_shards(root: Path) -> None:
    """What a training, `inspect` and `verify` do with shards."""
    overview(root, ())
    for reader in open_readers(root, [MAZE], "test").values():
        index = reader.index(2)
        reader.batch(np.array([0, len(index) // 2, len(index) - 1]), 2)
        reader.trajectory_frames(reader.num_trajectories - 1, 0, 1)
        list(damage(Path(reader.folder), reader.manifest))
        ShardReader(root, MAZE, "test", verify=True).batch(np.array([len(index) - 1]), 2)


def _read(shards: Path, name: str) -> bytes:
    return (shards / MAZE / "test" / name).read_bytes()


def _write(shards: Path, name: str, content: bytes) -> None:
    (shards / MAZE / "test" / name).write_bytes(content)


@pytest.fixture
def whole(shards: Path) -> Iterator[tuple[dict, bytes]]:
    """Manifest and shard as they should be, and are again after the test."""
    manifest, shard = _read(shards, "manifest.json"), _read(shards, "shard-000000.tar")
    yield json.loads(manifest), shard
    _write(shards, "manifest.json", manifest)
    _write(shards, "shard-000000.tar", shard)


def sealed(content: dict) -> bytes:
    """A manifest with its digest made true, as someone with bad intentions would."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return canonical(content | {"digest": digest(content)})


def test_whole_input_is_accepted(guard: Guard, shards: Path, whole: tuple[dict, bytes]) -> None:
    _write(shards, "manifest.json", sealed(whole[0]))
    assert guard.check(lambda: use_shards(shards))


@cases(700)
@given(changes=CHANGES)
def test_sealed_manifests(guard: Guard, shards: Path, whole: tuple[dict, bytes], changes: list) -> None:
    _write(shards, "manifest.json", sealed(mutated(whole[0], changes)))
    guard.check(lambda: use_shards(shards))


@cases(250)
@given(edits=EDITS)
def test_damaged_manifests(guard: Guard, shards: Path, whole: tuple[dict, bytes], edits: list) -> None:
    _write(shards, "manifest.json", edited(canonical(whole[0]), edits))
    guard.check(lambda: use_shards(shards))


def _header_places(shard: bytes) -> list[int]:
    """Where in a shard the fields of tar headers (name, size, checksum, type, link) and of npy headers begin."""
    headers = [at for at in range(0, len(shard), 512) if shard[at + 257 : at + 262] == b"ustar"]
    fields = [at + offset for at in headers for offset in (0, 124, 148, 156, 157, 345)]
    return fields + [at + 512 + offset for at in headers for offset in (0, 6, 8, 10, 20)]


@cases(350)
@given(
    places=st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from([*PIECES, b"2", b"1", b"L", b"77777777777"]))),
    edits=st.lists(EDITS.map(lambda edits: edits[0]), max_size=2),
    honest_size=st.booleans(),
)
def test_damaged_shards(
    guard: Guard, shards: Path, whole: tuple[dict, bytes], places: list, edits: list, honest_size: bool
) -> None:
    raw, fields = bytearray(whole[1]), _header_places(whole[1])
    for place, piece in places:
        at = fields[place % len(fields)]
        raw[at : at + len(piece)] = piece
    content = edited(bytes(raw), edits)
    _write(shards, "shard-000000.tar", content)
    manifest = copy.deepcopy(whole[0])
    if honest_size:
        manifest["shards"][0]["bytes"] = len(content)
    _write(shards, "manifest.json", sealed(manifest))
    guard.check(lambda: use_shards(shards))


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.tar"])
@pytest.mark.parametrize("kind", ["link outside", "link to a device", "pipe", "folder"])
def test_files_that_are_none(guard: Guard, shards: Path, whole: tuple[dict, bytes], name: str, kind: str) -> None:
    path = shards / MAZE / "test" / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else "../../../secret")
    try:
        assert not guard.check(lambda: use_shards(shards))
    finally:
        path.rmdir() if kind == "folder" else path.unlink()


# Cards


@pytest.fixture(scope="module")
def folder(guard: Guard) -> Path:
    """A user's registry folder with the maze's card and its channels."""
    folder = Path(guard.root) / "registry"
    (folder / "datasets").mkdir(parents=True)
    names = load_registry().card(MAZE)
    channels = {name: {"description": "a quantity", "unit": "none"} for name in names.state_channels}
    channels |= {name: {"description": "a material", "unit": "none"} for name in names.constant_channels}
    channels["velocity_y"]["duplicate_of"] = "velocity_x"
    (folder / "channels.yaml").write_text(yaml.safe_dump(channels, sort_keys=False))
    card = packaged_folder() / "datasets" / f"{MAZE}.yaml"
    (folder / "datasets" / f"{MAZE}.yaml").write_bytes(card.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["channels.yaml", f"datasets/{MAZE}.yaml"])
@cases(120)
@given(changes=CHANGES)
def test_changed_cards(guard: Guard, folder: Path, name: str, changes: list) -> None:
    path = folder / name
    content = path.read_bytes()
    assert guard.check(lambda: load_folders([folder]))
    path.write_text(yaml.safe_dump(mutated(yaml.safe_load(content), changes), sort_keys=False))
    guard.check(lambda: load_folders([folder]).snapshot())
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["channels.yaml", f"datasets/{MAZE}.yaml"])
@cases(120)
@given(edits=EDITS)
def test_damaged_cards(guard: Guard, folder: Path, name: str, edits: list) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(edited(content, edits))
    guard.check(lambda: load_folders([folder]).snapshot())
    path.write_bytes(content)


LETTERS = "abcdefgh"  # a list of nine lists of nine lists ...: a few hundred bytes that stand for 9^8 numbers
BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{outer}: &{outer} [{', '.join([f'*{inner}'] * 9)}]\n" for inner, outer in pairwise(LETTERS)
)


@cases(150)
@given(changes=CHANGES, edits=st.none() | EDITS)
def test_stats(guard: Guard, tiny_well: Path, changes: list, edits: list | None) -> None:
    content = (tiny_well / MAZE / "stats.yaml").read_bytes()
    path = Path(guard.root) / "stats.yaml"
    raw = (
        yaml.safe_dump(mutated(yaml.safe_load(content), changes)).encode() if edits is None else edited(content, edits)
    )
    path.write_bytes(raw)
    guard.check(lambda: read_stats(path, CARD))


@pytest.mark.parametrize("raw", [BOMB + "mean: {pressure: *h}", "2020-99-99: 1", "mean: 0x_", "9" * 5000, "? [a]\n: 1"])
def test_stats_that_only_look_right(guard: Guard, raw: str) -> None:
    path = Path(guard.root) / "stats.yaml"
    path.write_text(raw)
    assert not guard.check(lambda: read_stats(path, CARD))


@cases(120)
@given(changes=CHANGES, edits=st.none() | EDITS)
def test_url_registries(guard: Guard, changes: list, edits: list | None) -> None:
    base = "https://example.org/the_well/datasets/maze"
    files = {split: [f"{base}/data/{split}/a_{number}.hdf5" for number in (1, 2)] for split in ("train", "valid")}
    content = {"maze": {"stats": [f"{base}/stats.yaml"], **files}, "other": {"stats": [f"{base}/stats.yaml"]}}
    path = Path(guard.root) / "registry.yaml"
    raw = yaml.safe_dump(mutated(content, changes)).encode()
    path.write_bytes(raw if edits is None else edited(raw, edits))
    guard.check(lambda: url_registry(path))


# URLs

URL_PARTS = (
    *("pipe:", "file://", "ssh://", "http://", "https://", "s3://", "hf://", "simplecache::", "zip://", "git+ssh://"),
    *(
        "touch secret",
        "/etc/passwd",
        "user:word@",
        "host",
        "/",
        "//",
        "/..",
        "/%2e%2e",
        "?x",
        "#x",
        ":80",
        "\\",
        "\n",
        "|",
    ),
)


@cases(250)
@given(
    parts=st.lists(st.sampled_from(URL_PARTS) | st.text(max_size=4), min_size=1, max_size=6),
    name=st.sampled_from(TEXTS),
)
def test_urls(guard: Guard, parts: list[str], name: str) -> None:
    url = "".join(parts)
    if not is_url(url):
        return
    if guard.check(lambda: RemoteFolder(url)):
        folder = RemoteFolder(url)
        assert folder.url.startswith(tuple(f"{protocol}://" for protocol in PROTOCOLS))
        assert ".." not in folder.url.replace("%2e", ".").split("/")
        assert "word@" not in f"{folder} {folder!r}"
        guard.check(lambda: folder.file(name))
        guard.check(lambda: folder / name)
    else:
        assert not guard.check(lambda: open_readers(url, None, "train"))


# HDF5

OBJECTS = (
    *("/", "dimensions", "dimensions/time", "dimensions/x", "dimensions/y", "t0_fields", "t0_fields/pressure"),
    *("t0_fields/density", "t1_fields", "t1_fields/velocity", "t2_fields", "scalars", "boundary_conditions"),
    *("boundary_conditions/x0_wall", "boundary_conditions/x0_wall/mask"),
)
ATTRIBUTES = (
    "n_trajectories",
    "spatial_dims",
    "field_names",
    "time_varying",
    "sample_varying",
    "dim_varying",
    "bc_type",
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
    *(
        np.zeros((2, 2)),
        h5py.Empty("f"),
        [True, False],
        [False] * 3,
        np.bytes_(b"\xff"),
        ["/dimensions/time"],
        [""],
        1e308,
    ),
)
REPLACEMENTS = (
    "nothing",
    "group",
    "text",
    "scalar",
    "empty",
    "huge",
    "vast chunks",
    "wrong type",
    "rank",
    "soft",
    "outside",
)
REPLACEMENTS += ("elsewhere", "virtual", "loop", "names", "compound")


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
from test_hostile import use_well_file
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
