"""Parts of an evaluation: kept, damaged, of somebody else."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files import UserError
from fm.evaluation.evaluate import Item, Part, Parts, remove_parts
from fm.evaluation.measure import Measured

ITEM = Item("shear_flow", "rollout", 0, (4, 1), 3, 300)
IDENTITY = {"model": "a" * 64, "protocol": {"name": "thirds"}, "batch_size": 8}


def make_part() -> Part:
    values = np.random.default_rng(0).normal(size=(3, 4, 2))
    values[1, 1, 0] = np.inf
    shown = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    return Part(Measured(np.array([4, 1, 4]), np.array([0, 0, 1]), values), shown)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    prepared = Parts(tmp_path, IDENTITY)
    prepared.prepare()
    prepared.save(ITEM, make_part())
    return prepared


def test_a_part_is_read_as_it_was_written(parts: Parts, tmp_path: Path) -> None:
    again = Parts(tmp_path, IDENTITY)
    again.prepare()
    again.check()
    part, expected = again.require(ITEM), make_part()
    for name in ("trajectories", "steps", "values"):
        np.testing.assert_array_equal(getattr(part.measured, name), getattr(expected.measured, name))
    np.testing.assert_array_equal(part.shown, expected.shown)
    assert again.finished([ITEM, Item("shear_flow", "rollout", 1, (0,), 1, 100)]) == [ITEM]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def flip_a_bit_of_the_errors(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(make_part().measured.values.tobytes()) + 11] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def shorten(file: Path) -> None:
    np.savez(file, trajectories=np.zeros(2, int), steps=np.zeros(2, int), values=np.zeros((2, 4, 2)))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit_of_the_errors, empty, shorten])
def test_a_damaged_part_is_named_and_removed(
    parts: Parts, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
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
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (parts.folder / "shear_flow-rollout-00001.npz.4711.tmp").write_bytes(b"of a killed process")
    (parts.folder / "notes.txt").write_text("the user's")
    Parts(tmp_path, {**IDENTITY, "batch_size": 4, "model": "b" * 64}).prepare()
    assert sorted(file.name for file in parts.folder.iterdir()) == ["identity.json", "notes.txt"]
    assert "removing what another evaluation left (other batch size, model)" in capsys.readouterr().out
    remove_parts(tmp_path)
    assert [file.name for file in parts.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_parts_that_nobody_answers_for_are_removed(parts: Parts, content: str | None) -> None:
    file = parts.folder / "identity.json"
    file.unlink() if content is None else file.write_text(content)
    parts.prepare()
    assert parts.finished([ITEM]) == []
    assert json.loads(file.read_text())["model"] == "a" * 64


def test_removing_all_leaves_no_folder(parts: Parts, tmp_path: Path) -> None:
    remove_parts(tmp_path)
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_would_measure_something_else_is_refused(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"identity\.json: expected what this process is about to measure, .* protocol"):
        Parts(tmp_path, {**IDENTITY, "protocol": {"name": "well"}}).check()
    with pytest.raises(UserError, match=r"found other batch size, format, model, protocol: start all processes with"):
        Parts(tmp_path / "elsewhere", IDENTITY).check()
