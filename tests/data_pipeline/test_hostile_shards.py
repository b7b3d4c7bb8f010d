"""Hostile and damaged shards end in success or in UserError, and reach nothing outside their folder."""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzzing import CHANGES, EDITS, PIECES, Guard, cases, edited, mutated
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.inspect import overview
from data_pipeline.schema import canonical, digest
from data_pipeline.shards.tar import damage
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader

MAZE = "acoustic_scattering_maze"


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
