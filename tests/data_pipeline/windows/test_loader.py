"""Ranks and workers share one sequence of global batches."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_server import FaultyServer

from data_pipeline.errors import UserError
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import datasets_with_shards, open_readers, scheduled_batches, sources
from data_pipeline.windows.reader import Batch, ShardReader
from data_pipeline.windows.schedule import Schedule
from data_pipeline.windows.streaming import StreamSettings

NAMES = ["active_matter", "helmholtz_staircase", "shear_flow"]


@pytest.fixture(scope="module")
def readers(tiny_shards: Path) -> dict[str, ShardReader]:
    return open_readers(tiny_shards, NAMES, "train")


def load(readers: dict[str, ShardReader], seed: int = 3, **options: int) -> list[Batch]:
    arguments = {"length": 3, "start": 0, "stop": 8} | options
    schedule = Schedule(sources(readers, arguments["length"]), batch=12, seed=seed)
    division = Division(schedule, arguments.pop("rank", 0), arguments.pop("world_size", 1))
    return list(scheduled_batches(readers, division, **arguments))


def assert_same(batch: Batch, other: Batch) -> None:
    assert (batch.dataset, batch.draw) == (other.dataset, other.draw)
    assert torch.equal(batch.windows, other.windows)
    assert torch.equal(batch.fields, other.fields)
    assert torch.equal(batch.constants, other.constants)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_ranks_share_the_global_batch(readers: dict[str, ShardReader], world_size: int) -> None:
    whole = load(readers)
    ranks = [load(readers, rank=rank, world_size=world_size) for rank in range(world_size)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert {part.dataset for part in parts} == {expected.dataset}
        assert {len(part.windows) for part in parts} == {12 // world_size}
        assert torch.equal(torch.cat([part.windows for part in parts]), expected.windows)
        assert torch.equal(torch.cat([part.fields for part in parts]), expected.fields)


@pytest.mark.parametrize("workers", [1, 2, 20])
def test_workers_do_not_change_batches_or_their_order(readers: dict[str, ShardReader], workers: int) -> None:
    for expected, batch in zip(load(readers), load(readers, workers=workers), strict=True):
        assert_same(expected, batch)


def test_start_is_where_an_unbroken_run_would_be(readers: dict[str, ShardReader]) -> None:
    for expected, batch in zip(load(readers)[5:], load(readers, start=5), strict=True):
        assert_same(expected, batch)
    assert [batch.draw for batch in load(readers, start=5)] == [5, 6, 7]


def test_batches_hold_the_windows_of_the_draw(readers: dict[str, ShardReader]) -> None:
    schedule = Schedule(sources(readers, 3), batch=12, seed=3)
    for index, batch in enumerate(load(readers)):
        draw = schedule.draw(index)
        assert batch.dataset == draw.dataset
        assert np.array_equal(batch.windows, draw.windows)
        assert_same(batch, readers[draw.dataset].batch(draw.windows, 3, draw=index))


def test_sources_say_what_the_shards_hold(readers: dict[str, ShardReader]) -> None:
    found = sources(readers, 2)
    assert [source.name for source in found] == NAMES
    for source in found:
        manifest = readers[source.name].manifest
        assert source.windows == sum(one.frames - 1 for one in manifest.trajectories) == sum(source.shard_windows)
        assert source.tokens == manifest.grid[0] // 2 * (manifest.grid[1] // 2)


def test_none_opens_every_dataset(tiny_shards: Path) -> None:
    found = open_readers(tiny_shards, None, "valid")
    assert list(found) == sorted(path.name for path in tiny_shards.iterdir())
    assert len(found) == 8


@pytest.mark.parametrize("datasets", [None, ["shear_flow", "rayleigh_benard"]])
def test_missing_shards_end_in_the_commands_that_make_them(tmp_path: Path, datasets: list[str] | None) -> None:
    with pytest.raises(UserError) as caught:
        open_readers(tmp_path, datasets, "train")
    message = str(caught.value)
    for name in datasets or ["<dataset>"]:
        assert f"{tmp_path}/{name}/train/manifest.json" in message
    names = ",".join(sorted(datasets or ["NAME"]))
    assert f"data-pipeline download --out WELL --datasets {names}" in message
    assert f"data-pipeline shard --well WELL --out {tmp_path} --datasets {names}" in message
    assert "data-pipeline shard --well data/mini/well --out data/mini/shards" in message  # never where The Well belongs


def test_batches_from_a_folder_and_a_url_are_those_of_one_folder(
    readers: dict[str, ShardReader], tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / NAMES[1]).symlink_to(tiny_shards / NAMES[1])
    for name in (NAMES[0], NAMES[2]):
        shutil.copytree(tiny_shards / name, tmp_path / "far" / name)
    stream = StreamSettings(cache=tmp_path / "cache")
    with FaultyServer(tmp_path / "far") as server:
        both = [tmp_path / "one", server.url]
        divided = open_readers(both, None, "train", stream=stream, known=NAMES)
        assert list(divided) == NAMES
        for one, other in zip(load(divided, workers=1), load(readers), strict=True):
            assert_same(one, other)
        assert datasets_with_shards(both, None, ["train", "valid"], stream, NAMES) == NAMES
        with pytest.raises(UserError, match=rf"no train shards under {tmp_path}/one or {server.url}"):
            open_readers(both, [*NAMES, "rayleigh_benard"], "train", stream=stream)


def test_a_dataset_in_two_places_is_refused_with_both(tiny_shards: Path, tmp_path: Path) -> None:
    split = tmp_path / NAMES[0] / "test"  # not even the split that is opened
    shutil.copytree(tiny_shards / NAMES[0] / "test", split)
    message = rf"{NAMES[0]}: expected its shards in one place, got them in two: {tiny_shards} and {tmp_path}\."
    for datasets in (None, NAMES):
        with pytest.raises(UserError, match=message):
            open_readers([tiny_shards, tmp_path], datasets, "train")
    assert list(open_readers([tiny_shards, tmp_path], NAMES[1:], "train")) == NAMES[1:]
