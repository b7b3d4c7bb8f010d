"""Training on some of a dataset's trajectories (data.trajectories)."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from whole_runs import DATASETS, last_weights, log, small

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint
from fm.config import Recipe
from fm.distributed import make_accelerator
from fm.training.trainer import Trainer, train

HELMHOLTZ = DATASETS[1]


def recipe(shards: Path, run: Path, count: int, **sections: dict[str, Any]) -> Recipe:
    return small(shards, run, data={"datasets": DATASETS, "trajectories": {HELMHOLTZ: count}}, **sections)


def trained_on(trainer: Trainer) -> dict[str, set[int]]:
    """Trajectories that the windows of all steps are of, by dataset."""
    found: dict[str, set[int]] = {name: set() for name in trainer.readers}
    for step in range(trainer.recipe.train.steps):
        for draw in trainer.division.draws_of(step):
            trajectories, _ = trainer.readers[draw.dataset].index(2).locate(draw.windows)
            found[draw.dataset] |= set(trajectories.tolist())
    return found


def test_windows_come_from_nested_sets_of_trajectories(tiny_shards: Path, tmp_path: Path) -> None:
    readers = open_readers(tiny_shards, DATASETS, "train")
    total = readers[HELMHOLTZ].num_trajectories
    assert total > 1
    sets = []
    for count in range(1, total + 1):
        longer = {"steps": 40}
        trainer = Trainer(recipe(tiny_shards, tmp_path / str(count), count, train=longer), make_accelerator(1.0))
        found = trained_on(trainer)
        assert len(found[HELMHOLTZ]) == count
        assert len(found[DATASETS[0]]) == readers[DATASETS[0]].num_trajectories
        source = next(one for one in trainer.mixing.schedule.sources if one.name == HELMHOLTZ)
        assert source.windows == len(readers[HELMHOLTZ].index(2)) * count // total
        assert trainer.valid_readers == {}
        sets.append(found[HELMHOLTZ])
    assert all(smaller < larger for smaller, larger in pairwise(sets))


def test_a_restricted_run_resumes_and_its_checkpoint_names_the_whole_shards(tiny_shards: Path, tmp_path: Path) -> None:
    whole, broken = (recipe(tiny_shards, tmp_path / name, 1) for name in ("whole", "broken"))
    assert train(whole) == 0
    assert train(replace(broken, run=replace(broken.run, stop_at=5))) == 0
    assert train(broken) == 0
    assert log(tmp_path / "broken") == log(tmp_path / "whole")
    assert last_weights(tmp_path / "broken") == last_weights(tmp_path / "whole")
    state = json.loads((find_checkpoint(tmp_path / "whole") / "state.json").read_text())
    digests = {name: reader.manifest.digest for name, reader in open_readers(tiny_shards, DATASETS, "train").items()}
    assert state["shards"] == digests
    assert state["recipe"]["data"]["trajectories"] == {HELMHOLTZ: 1}


def test_what_is_not_there_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.trajectories.{HELMHOLTZ}: .* expected 1 to \d+ trajectories .* got 99"):
        train(recipe(tiny_shards, tmp_path / "run", 99))
    with pytest.raises(UserError, match=rf"data.trajectories.{HELMHOLTZ}: Input should be greater than 0"):
        recipe(tiny_shards, tmp_path / "run", 0)
    unknown = {"datasets": DATASETS, "trajectories": {"shear_flow": 1}}
    with pytest.raises(UserError, match=r"data.trajectories: no dataset 'shear_flow' in this run"):
        train(small(tiny_shards, tmp_path / "run", data=unknown))
