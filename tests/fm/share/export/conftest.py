"""A tiny run, evaluated and exported, that many tests read and none may change."""

import json
import shutil
from pathlib import Path

import pytest
from whole_runs import small

from fm.evaluation.evaluate import evaluate_run
from fm.share.export import export_run
from fm.training.trainer import train


@pytest.fixture(scope="session")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two datasets with its report. Read only."""
    directory = tmp_path_factory.mktemp("exported") / "run"
    assert train(small(tiny_shards, directory)) == 0
    evaluate_run(directory)
    return directory


@pytest.fixture(scope="session")
def artefact(run: Path) -> Path:
    """Its export. Read only."""
    return export_run(run, run.parent / "model")


@pytest.fixture
def of_other_cards(run: Path, tmp_path: Path) -> Path:
    """The run as if it had been trained with another card of helmholtz_staircase than there is."""
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for checkpoint in (other / "checkpoints").iterdir():
        state = json.loads((checkpoint / "state.json").read_text())
        state["registry"]["cards"]["helmholtz_staircase"]["boundary"][0] = ["WALL", "WALL"]
        (checkpoint / "state.json").write_text(json.dumps(state))
    return other
