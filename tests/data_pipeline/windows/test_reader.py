"""Windows come out as they went in; damage and hostile manifests are refused by name."""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.schema import canonical, digest
from data_pipeline.shards.format import Manifest
from data_pipeline.shards.tar import damage
from data_pipeline.windows.reader import Batch, ShardReader, WindowIndex

MAZE = "acoustic_scattering_maze"


@pytest.fixture
def spoilt(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of one dataset's test shards, for a test to damage."""
    shutil.copytree(tiny_shards / MAZE / "test", tmp_path / MAZE / "test")
    return tmp_path


def rewrite(shards: Path, change) -> Path:
    """Changes a manifest and makes its digest true again, as someone with bad intentions would."""
    path = shards / MAZE / "test" / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("digest")
    change(content)
    path.write_bytes(canonical(content | {"digest": digest(content)}))
    return path


@given(
    lengths=st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=8),
    length=st.integers(1, 6),
    per_shard=st.integers(1, 3),
    gap=st.integers(0, 2),
)
def test_index_lists_each_window_once(lengths: list[list[int]], length: int, per_shard: int, gap: int) -> None:
    segments: list[list[tuple[int, int]]] = [[] for _ in lengths]
    for bounds, counts in zip(segments, lengths, strict=True):
        for count in counts:
            first = bounds[-1][1] + gap if bounds else gap
            bounds.append((first, first + count))
    shard_of = [trajectory // per_shard for trajectory in range(len(lengths))]
    index = WindowIndex(segments, length, shard_of)
    expected = [(t, a) for t, bounds in enumerate(segments) for lo, hi in bounds for a in range(lo, hi - length + 1)]
    trajectories, firsts = index.locate(np.arange(len(index)))
    assert list(zip(trajectories.tolist(), firsts.tolist(), strict=True)) == expected
    in_shards = [sum(shard_of[t] == shard for t, _ in expected) for shard in range(max(shard_of) + 1)]
    assert list(index.shard_windows) == in_shards
    for outside in (-1, len(index)):
        with pytest.raises(IndexError):
            index.locate(np.array([outside]))


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("verify", [False, True])
def test_batch_holds_the_windows_asked_for(tiny_shards: Path, length: int, verify: bool) -> None:
    reader = ShardReader(tiny_shards, MAZE, "train", verify)
    index = reader.index(length)
    ids = np.random.default_rng(1).integers(0, len(index), 11)
    batch = reader.batch(ids, length, draw=7)
    assert batch.fields.shape == (11, length, 3, 32, 32)
    assert batch.fields.dtype == torch.float32
    assert batch.constants.shape == (11, 2, 32, 32)
    assert (batch.dataset, batch.draw, batch.windows.tolist()) == (MAZE, 7, ids.tolist())
    for row, (trajectory, first) in enumerate(zip(*index.locate(ids), strict=True)):
        whole = reader.trajectory_frames(trajectory, 0, reader.num_frames(trajectory))
        assert np.array_equal(batch.fields[row], whole[first : first + length])
        assert np.array_equal(batch.constants[row], reader.constants(trajectory))


def test_dataset_without_constants(tiny_shards: Path) -> None:
    reader = ShardReader(tiny_shards, "shear_flow", "train")
    assert reader.batch(np.array([0, 1]), 2).constants.shape == (2, 0, 32, 64)
    assert reader.constants(0).shape == (0, 32, 64)


def test_frames_outside_a_trajectory(tiny_shards: Path) -> None:
    reader = ShardReader(tiny_shards, MAZE, "train")
    for first, length in ((-1, 2), (8, 2), (0, 10)):
        with pytest.raises(IndexError, match="has 9 frames"):
            reader.trajectory_frames(0, first, length)
    with pytest.raises(UserError, match=r"no window of 10 frames: the longest stretch of frames of .* has 9"):
        reader.index(10)


def test_short_trajectories_have_no_long_windows(spoilt: Path) -> None:
    def shorten(content: dict) -> None:
        trajectory = content["trajectories"][0]
        trajectory |= {"frames": 4, "offsets": trajectory["offsets"][:1], "crc32": trajectory["crc32"][:32]}
        trajectory["segments"] = [[0, 4]]
        content["trajectories"] = [
            trajectory,
            trajectory | {"frames": 3, "crc32": trajectory["crc32"][:24], "segments": [[0, 1], [1, 3]]},
        ]

    rewrite(spoilt, shorten)
    reader = ShardReader(spoilt, MAZE, "test", verify=True)
    assert len(reader.index(4)) == 1
    assert len(reader.index(2)) == 3 + 0 + 1
    assert reader.batch(np.arange(4), 2).fields.shape[0] == 4


def _sum_in_child(reader: ShardReader, queue: "multiprocessing.Queue[float]") -> None:
    queue.put(float(reader.batch(np.array([3]), 2).fields.double().sum()))


def test_reader_works_in_a_forked_process(tiny_shards: Path) -> None:
    reader = ShardReader(tiny_shards, MAZE, "test")
    expected = float(reader.batch(np.array([3]), 2).fields.double().sum())  # the shard is mapped here already
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_sum_in_child, args=(reader, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()
    assert process.exitcode == 0


def test_altered_byte_is_found_by_frame(spoilt: Path) -> None:
    folder = spoilt / MAZE / "test"
    manifest = Manifest.load(folder / "manifest.json")
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[manifest.trajectories[0].offsets[1] + manifest.frame_bytes + 5] ^= 1  # frame 5: the second of chunk 1
    shard.write_bytes(content)
    assert list(damage(folder, manifest)) == [
        f"{shard}: trajectory 0, frame 5: its checksum is wrong; "
        "copy it again, or remove the folder and run `data-pipeline shard` again"
    ]
    careless, careful = ShardReader(spoilt, MAZE, "test"), ShardReader(spoilt, MAZE, "test", verify=True)
    careless.trajectory_frames(0, 4, 3)
    careful.trajectory_frames(0, 0, 5)
    with pytest.raises(UserError, match=r"shard-000000.tar: damaged: trajectory 0, frame 5: the checksum"):
        careful.trajectory_frames(0, 4, 3)
    with pytest.raises(UserError, match="trajectory 0, frame 5"):
        careful.batch(np.array([0, 4]), 2)


def test_altered_constants_are_found(spoilt: Path) -> None:
    folder = spoilt / MAZE / "test"
    manifest = Manifest.load(folder / "manifest.json")
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[manifest.trajectories[0].constants_offset + 9] ^= 128
    (folder / "shard-000000.tar").write_bytes(content)
    assert "trajectory 0, constant fields: their checksum is wrong" in next(iter(damage(folder, manifest)))
    with pytest.raises(UserError, match="trajectory 0, constant fields: the checksum"):
        ShardReader(spoilt, MAZE, "test", verify=True).batch(np.array([0]), 2)


@pytest.mark.parametrize("position", [3, 200, -1])
def test_byte_altered_outside_the_arrays_is_found(spoilt: Path, position: int) -> None:
    folder = spoilt / MAZE / "test"
    manifest = Manifest.load(folder / "manifest.json")
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[position] ^= 1
    (folder / "shard-000000.tar").write_bytes(content)
    (line,) = damage(folder, manifest)
    assert "shard-000000.tar: altered outside the fields and constants" in line


def _truncate(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])


def _lengthen(folder: Path) -> None:
    with (folder / "shard-000000.tar").open("ab") as file:
        file.write(b"\0")


def _link(folder: Path) -> None:
    (folder / "shard-000000.tar").rename(folder / "elsewhere.tar")
    (folder / "shard-000000.tar").symlink_to(folder / "elsewhere.tar")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, r"shard-000000.tar: truncated: expected \d+ bytes, got \d+"),
        (_lengthen, "shard-000000.tar: longer than it was"),
        (_link, "shard-000000.tar: expected a plain file, got a link"),
        (lambda folder: (folder / "shard-000000.tar").unlink(), r"shard-000000.tar: expected a shard of \d+ bytes"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: cannot be read as JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "manifest.json: cannot be read as JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: expected a JSON object"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json: expected format 'wavelit-shards'"),
        (lambda folder: folder.rename(folder.parent / "train"), "expected dataset .*, split train, got .*, test"),
    ],
)
def test_spoilt_folder_is_refused(spoilt: Path, spoil, message: str) -> None:
    spoil(spoilt / MAZE / "test")
    split = "test" if (spoilt / MAZE / "test").exists() else "train"
    with pytest.raises(UserError, match=message):
        ShardReader(spoilt, MAZE, split)


def test_altered_manifest_is_refused(spoilt: Path) -> None:
    path = spoilt / MAZE / "test" / "manifest.json"
    path.write_text(path.read_text().replace('"dt":0', '"dt":1'))
    with pytest.raises(UserError, match=r"manifest.json: damaged or altered: its digest is"):
        ShardReader(spoilt, MAZE, "test")


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(content) -> None:
        for key in path:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("shards", 0, "name", "../../secret.tar"), "shards: expected a plain file name.*secret"),
        (_set("shards", 0, "name", "/etc/passwd"), "shards: expected a plain file name"),
        (_set("shards", 0, "name", "pipe:ls"), "shards: expected a plain file name"),
        (_set("shards", 0, "name", ""), "shards: expected a plain file name"),
        (_set("shards", 0, "bytes", 10**15), "truncated: expected 1000000000000000 bytes"),
        (_set("shards", 0, "bytes", -1), "do not fit into a shard of -1 bytes"),
        (_set("shards", []), "no trajectories"),
        (_set("grid", [32, 10**9]), "do not fit into a shard"),
        (_set("grid", [32, 0]), "grid: expected positive sizes"),
        (_set("grid", [32]), r"json: grid: expected a list of 2, got \[32\]"),
        (_set("grid", [32, True]), r"json: grid\[1\]: expected a valid integer, got True"),
        (_set("grid", "3232"), "json: grid: expected a list of 2, got '3232'"),
        (_set("dt", "fast"), "json: dt: expected a valid number, got 'fast'"),
        (_set("dt", 10**400), "json: dt: expected a finite number, got 1000"),
        (_set("frames_per_chunk", 0), "frames_per_chunk: expected at least 1"),
        (
            _set("boundary", 0, 0, "SLIP"),
            r"boundary\[0\]\[0\]: expected a boundary type, got 'SLIP'. Valid: OPEN, PERIODIC, WALL",
        ),
        (_set("state_channels", ["pressure", "pressure"]), "a channel is listed twice"),
        (_set("stats", "std", "pressure", "a"), "json: stats.std.pressure: expected a valid number, got 'a'"),
        (_set("stats", "std", {}), "stats.std: expected pressure, velocity_x"),
        (_set("trajectories", 0, "offsets", 0, -512), r"offsets\[0\]: 4 frames at byte -512 do not fit"),
        (_set("trajectories", 0, "offsets", 0, 10**12), r"offsets\[0\]: 4 frames at byte 1000000000000 do not fit"),
        (_set("trajectories", 0, "offsets", [0]), "offsets: not one per chunk"),
        (_set("trajectories", 0, "frames", 10**9), "offsets: not one per chunk"),
        (_set("trajectories", 0, "frames", 0), "frames: expected at least 1, got 0"),
        (_set("trajectories", 0, "shard", 1), "no such shard"),
        (_set("trajectories", 0, "source", 99), "source: no such file"),
        (_set("trajectories", 0, "crc32", "g" * 72), "crc32: not eight digits per frame"),
        (_set("trajectories", 0, "constants_offset", None), "constants_offset: not in the shard"),
        (_set("trajectories", 0, "constants_offset", 10**12), "constants_offset: not in the shard"),
        (_set("trajectories", []), "no trajectories"),
        (_set("surprise", 1), "unknown key 'surprise'"),
        (_set("version", 99), "expected format 'wavelit-shards' version 2, got 'wavelit-shards' version 99"),
        (lambda content: content.pop("stats"), "missing key 'stats'"),
    ],
)
def test_hostile_manifest_is_refused(spoilt: Path, change, message: str) -> None:
    path = rewrite(spoilt, change)
    with pytest.raises(UserError, match=message) as caught:
        ShardReader(spoilt, MAZE, "test")
    assert str(path.parent) in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_a_manifest_ends_in_success_or_our_error(tiny_shards: Path, data: st.DataObject) -> None:
    folder = tiny_shards / MAZE / "test"
    content = json.loads((folder / "manifest.json").read_text())
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(
        st.one_of(
            *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9)),
            *(st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)),
        )
    )
    content.pop("digest", None)
    path = tiny_shards.parent / "fuzzed.json"
    path.write_text(json.dumps(content | {"digest": digest(content) if _is_json(content) else ""}))
    try:
        manifest = Manifest.load(path)
        list(damage(folder, manifest))
    except UserError:
        pass


def _is_json(content: object) -> bool:
    try:
        canonical(content)
    except ValueError:  # an infinity
        return False
    return True


def test_windows_carry_the_scalars_of_their_trajectories(tiny_shards: Path, tmp_path: Path) -> None:
    dataset = "gray_scott_reaction_diffusion"
    reader = ShardReader(tiny_shards, dataset, "train")
    trajectories = reader.manifest.trajectories
    ids = np.array([len(reader.index(3)) - 1, 0])
    batch = reader.batch(ids, 3)
    assert sorted(batch.scalars) == ["F", "dt", "k"]
    assert batch.scalars["F"].tolist() == [trajectories[-1].scalars["F"], trajectories[0].scalars["F"]]
    assert trajectories[-1].scalars["F"] != trajectories[0].scalars["F"]
    assert batch.scalars["dt"].tolist() == [40.0, 40.0]
    assert reader.scalars([1])["k"].tolist() == [trajectories[1].scalars["k"]]

    folder = tmp_path / dataset / "train"
    shutil.copytree(reader.folder, folder)
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("digest")
    content["trajectories"][0].update(scalars={"Re": 7.0}, dt=None)
    (folder / "manifest.json").write_bytes(canonical(content | {"digest": digest(content)}))
    mixed = ShardReader(tmp_path, dataset, "train").scalars()
    assert np.isnan([mixed["F"][0], mixed["dt"][0], *mixed["Re"][1:]]).all()
    assert (mixed["Re"][0], mixed["dt"][1]) == (7.0, 40.0)


def test_batch_moves_as_a_whole() -> None:
    batch = Batch("shear_flow", torch.ones(1, 2, 4, 8, 8), torch.ones(1, 0, 8, 8), torch.tensor([5]), draw=3)
    moved = batch.to("meta")
    assert {moved.fields.device.type, moved.constants.device.type, moved.windows.device.type} == {"meta"}
    assert (moved.dataset, moved.draw) == ("shear_flow", 3)
