"""TensorBoard's HParams page: what its own backend finds in real runs."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from whole_runs import DATASETS, small

from data_pipeline.registry import load_registry
from data_pipeline.windows.schedule import Schedule, Source
from fm.config import recipe_to_dict
from fm.datasets import build_model, open_split
from fm.training.record import RunRecord
from fm.training.tensorboard import flat_settings
from fm.training.trainer import train

SECTIONS: dict[str, dict[str, Any]] = {"train": {"steps": 6}, "validation": {"every": 3, "windows": 1, "rollouts": 0}}


def found(directory: Path) -> tuple[Any, Any, int | None]:
    """The columns, the session's settings, and its state, as the page gets them."""
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    content = board.PluginTagToContent(metadata.PLUGIN_NAME)
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    end = content.get(metadata.SESSION_END_INFO_TAG)
    return experiment, start, None if end is None else metadata.parse_session_end_info_plugin_data(end).status


def test_a_continued_run_is_one_session_that_ends_well(tiny_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train(small(tiny_shards, directory, run={"stop_at": 3}, **SECTIONS)) == 0
    assert found(directory)[2] is None  # to be continued
    assert train(small(tiny_shards, directory, **{**SECTIONS, "train": {"steps": 6, "clip": 0.5}})) == 0
    experiment, start, state = found(directory)
    assert state == api_pb2.STATUS_SUCCESS
    assert start.hparams["train.clip"].number_value == 0.5  # what the run went on with
    assert start.hparams["train.steps"].number_value == 6
    assert start.hparams["sampling.scheme"].string_value == "sqrt"
    assert start.hparams["model.width"].number_value == 16
    assert start.hparams["model.cpe"].WhichOneof("kind") == "bool_value"
    assert start.hparams["data.datasets"].string_value == "2 datasets"
    assert "finetune.objective" in {column.name for column in experiment.hparam_infos}
    assert "finetune.objective" not in start.hparams
    scores = [column.name.tag for column in experiment.metric_infos]
    assert scores[0] == "valid_over_persistence/geometric_mean"
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert set(scores) <= set(board.Tags()["scalars"])
    assert len(list((directory / "tensorboard").glob("*.hparams"))) == 1


def test_a_failed_run_is_marked_until_it_is_continued(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", **SECTIONS)
    registry = load_registry(None)
    model = build_model(recipe, open_split(recipe, registry, "train"), registry)
    schedule = Schedule([Source(name, 100, 16, (100,)) for name in DATASETS], 4, seed=0)
    with pytest.raises(RuntimeError, match="a cable"), RunRecord(recipe, schedule, model, 0, "one process"):
        raise RuntimeError("a cable")
    assert found(tmp_path / "run")[2] == api_pb2.STATUS_FAILURE
    assert train(recipe) == 0
    assert found(tmp_path / "run")[2] == api_pb2.STATUS_SUCCESS


def test_settings_are_flat_and_plain(tmp_path: Path) -> None:
    recipe = small(tmp_path, tmp_path, finetune={"pretrained": "runs/x", "objective": "bptt"})
    settings = flat_settings(recipe_to_dict(recipe), DATASETS[:1])
    assert settings["finetune.objective"] == "bptt"
    assert settings["data.datasets"] == DATASETS[0]
    assert "train.betas" not in settings  # two numbers
    assert "train.micro_batch" not in settings  # null
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())
