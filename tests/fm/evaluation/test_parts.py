"""Parts of an evaluation: the same for any number of processes, divided evenly, kept, damaged, of somebody else."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.measure import FrameErrors
from fm.evaluation.parts import EvaluationPart, PartFolder, cut, divide, remove_parts
from fm.evaluation.protocol import PROTOCOLS

THIRDS = PROTOCOLS["thirds"]


@pytest.fixture(scope="module")
def readers(tiny_shards: Path) -> dict[str, ShardReader]:
    return open_readers(tiny_shards, None, "test")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_items_hold_each_window_and_each_rollout_once(readers: dict[str, ShardReader], batch_size: int) -> None:
    items = cut(readers, THIRDS, batch_size)
    assert len({item.name for item in items}) == len(items)
    for name, reader in readers.items():
        height, width = reader.manifest.grid
        windows = [item for item in items if (item.dataset, item.task) == (name, "one_step")]
        assert [window for item in windows for window in item.ids] == list(range(len(reader.index(2))))
        assert max(len(item.ids) for item in windows) <= 8 * batch_size
        rollouts = [item for item in items if (item.dataset, item.task) == (name, "rollout")]
        assert sorted(one for item in rollouts for one in item.ids) == list(range(reader.num_trajectories))
        assert max(len(item.ids) for item in rollouts) <= batch_size
        assert all(item.cost == item.frames * height * width for item in windows + rollouts)  # 9 frames each
        assert sum(item.frames for item in rollouts) == 8 * reader.num_trajectories


def test_what_is_not_scored_is_in_no_item(readers: dict[str, ShardReader]) -> None:
    chosen = {"shear_flow": readers["shear_flow"]}
    items = cut(chosen, dataclasses.replace(THIRDS, one_step_windows=3, max_steps=2), 8)
    assert [(item.name, item.frames) for item in items] == [
        ("shear_flow-one_step-00000", 3),
        ("shear_flow-rollout-00000", 2 * readers["shear_flow"].num_trajectories),
    ]
    late = cut(chosen, dataclasses.replace(PROTOCOLS["well"], start=8), 8)
    assert {item.task for item in late} == {"one_step"}  # no frame is left to predict


def items_of(costs: list[int]) -> list[EvaluationPart]:
    return [EvaluationPart("flow", "one_step", number, (number,), 1, cost) for number, cost in enumerate(costs)]


def test_the_process_with_the_least_to_do_takes_the_next_item() -> None:
    shares = divide(items_of([2, 7, 5, 3, 4]), 2)
    assert [[item.cost for item in share] for share in shares] == [[7, 3], [5, 4, 2]]


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 40])
def test_processes_divide_all_items_and_none_has_much_more_than_another(processes: int) -> None:
    items = items_of(np.random.default_rng(3).integers(1, 1000, 37).tolist())
    shares = divide(items, processes)
    assert sorted((item for share in shares for item in share), key=lambda item: item.number) == items
    loads = [sum(item.cost for item in share) for share in shares]
    at_least = max(sum(loads) / processes, max(item.cost for item in items))
    assert max(loads) <= 4 / 3 * at_least
    assert divide(items[::-1], processes) == shares


ITEM = EvaluationPart("shear_flow", "rollout", 0, (4, 1), 3, 300)
IDENTITY = {"model": "a" * 64, "protocol": {"name": "thirds"}, "batch_size": 8}


def make_part() -> FrameErrors:
    values = np.random.default_rng(0).normal(size=(3, 4, 2))
    values[1, 1, 0] = np.inf
    shown = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    return FrameErrors(np.array([4, 1, 4]), np.array([0, 0, 1]), values, shown)


@pytest.fixture
def parts(tmp_path: Path) -> PartFolder:
    prepared = PartFolder(tmp_path, IDENTITY)
    prepared.prepare()
    prepared.save(ITEM, make_part())
    return prepared


def test_a_part_is_read_as_it_was_written(parts: PartFolder, tmp_path: Path) -> None:
    again = PartFolder(tmp_path, IDENTITY)
    again.prepare()
    again.check()
    part, expected = again.require(ITEM), make_part()
    for name in ("trajectories", "steps", "values", "shown"):
        np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))
    assert again.finished([ITEM, EvaluationPart("shear_flow", "rollout", 1, (0,), 1, 100)]) == [ITEM]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def flip_a_bit_of_the_errors(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(make_part().values.tobytes()) + 11] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def shorten(file: Path) -> None:
    np.savez(file, trajectories=np.zeros(2, int), steps=np.zeros(2, int), values=np.zeros((2, 4, 2)))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit_of_the_errors, empty, shorten])
def test_a_damaged_part_is_named_and_removed(
    parts: PartFolder, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = parts.folder / "shear_flow-rollout-00000.npz"
    damage(file)
    assert parts.finished([ITEM]) == [ITEM]
    assert parts.load(ITEM) is None
    assert f"{file}: removing a damaged part" in capsys.readouterr().out
    assert parts.finished([ITEM]) == []
    with pytest.raises(UserError, match=r"shear_flow-rollout-00000\.npz: expected the errors of finished work"):
        parts.require(ITEM)


def test_parts_of_another_evaluation_are_removed_and_nothing_else(
    parts: PartFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (parts.folder / "shear_flow-rollout-00001.npz.4711.tmp").write_bytes(b"of a killed process")
    (parts.folder / "notes.txt").write_text("the user's")
    PartFolder(tmp_path, {**IDENTITY, "batch_size": 4, "model": "b" * 64}).prepare()
    assert sorted(file.name for file in parts.folder.iterdir()) == ["identity.json", "notes.txt"]
    assert "removing what another evaluation left (other batch size, model)" in capsys.readouterr().out
    remove_parts(tmp_path)
    assert [file.name for file in parts.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_parts_that_nobody_answers_for_are_removed(parts: PartFolder, content: str | None) -> None:
    file = parts.folder / "identity.json"
    file.unlink() if content is None else file.write_text(content)
    parts.prepare()
    assert parts.finished([ITEM]) == []
    assert json.loads(file.read_text())["model"] == "a" * 64


def test_removing_all_leaves_no_folder(parts: PartFolder, tmp_path: Path) -> None:
    remove_parts(tmp_path)
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_would_measure_something_else_is_refused(parts: PartFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"identity\.json: expected what this process is about to measure, .* protocol"):
        PartFolder(tmp_path, {**IDENTITY, "protocol": {"name": "well"}}).check()
    with pytest.raises(UserError, match=r"found other batch size, format, model, protocol: start all processes with"):
        PartFolder(tmp_path / "elsewhere", IDENTITY).check()
