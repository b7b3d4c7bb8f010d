"""Other trackers beside TensorBoard: accelerate's own for TensorBoard needs no network."""

import time
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import fm, small

from data_pipeline.files import UserError
from fm.config import dump_recipe
from fm.training.tensorboard import check_trackers
from fm.training.trainer import train

SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": 6},
    "validation": {"every": 3, "windows": 1, "rollouts": 0},
    "tracking": {"log_with": ["tensorboard"]},
}


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_every_scalar_goes_to_the_other_tracker_once(tiny_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train(small(tiny_shards, directory, run={"stop_at": 4}, **SECTIONS)) == 0
    time.sleep(1.1)  # TensorBoard orders event files by the second in which they were begun
    assert train(small(tiny_shards, directory, **SECTIONS)) == 0
    own, other = curves(directory / "tensorboard"), curves(directory / "trackers" / "wavelit-fm")
    assert len(own) > 20
    assert own == other
    (settings, _) = sorted((directory / "trackers").rglob("hparams.yml"))
    assert "train.learning_rate: 0.003" in settings.read_text()


def test_a_tracker_that_is_not_there_is_refused_before_the_first_step(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", tracking={"log_with": ["wandbee"]})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    done = fm("train", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 2
    assert "tracking.log_with: expected trackers among aim, " in done.stderr
    assert "got 'wandbee'; available here: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_known_tracker_whose_package_is_missing_is_named() -> None:
    missing = sorted(set(LOGGER_TYPE_TO_CLASS) - {str(name) for name in get_available_trackers()})
    assert missing
    with pytest.raises(UserError, match=f"the package of {missing[0]} is not installed, got '{missing[0]}'; available"):
        check_trackers(["tensorboard", missing[0]])
