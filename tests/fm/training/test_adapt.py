"""A pretrained model learns a dataset that it did not know: what moves, what is drawn, and what stays, bit for bit."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from whole_runs import DATASETS, last_weights, log, small

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers, sources
from data_pipeline.windows.schedule import sampling_shares
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.config import Recipe
from fm.training.optim import part_of
from fm.training.trainer import train

NEW = "shear_flow"  # the pretrained model has rows for its velocities and pressure, none for its tracer
THREE = [*DATASETS, NEW]
ALONE, STEPS = 3, 8


@pytest.fixture(scope="module")
def pretrained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    assert train(small(tiny_shards, run)) == 0
    return run


def recipe(shards: Path, run: Path, pretrained: Path, **sections: dict[str, Any]) -> Recipe:
    """Two draws a step, every checkpoint kept."""
    defaults: dict[str, dict[str, Any]] = {
        "data": {"datasets": THREE},
        "train": {"steps": STEPS, "draws": 2},
        "finetune": {"pretrained": str(pretrained), "unroll_steps": 1},
        "adapt": {"datasets": [NEW], "alone_steps": ALONE, "share": 0.5, "rates": {"trunk": 0.1}},
        "checkpoint": {"every": 1, "keep": 100},
    }
    merged = {key: {**defaults.get(key, {}), **sections.get(key, {})} for key in defaults | sections}
    return small(shards, run, **merged)


@pytest.fixture(scope="module")
def unbroken(tiny_shards: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(recipe(tiny_shards, run, pretrained)) == 0
    return run


def tensors(run: Path, step: int, kind: str) -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/step_{step:08d}/{kind}.safetensors")


def before(pretrained: Path) -> dict[str, Tensor]:
    return load_file(find_checkpoint(pretrained) / "ema.safetensors")


def is_own(name: str) -> bool:
    return name.startswith((f"heads.{NEW}.", f"task_vectors.{NEW}", "lifting.rows.tracer"))


def test_alone_only_the_parts_of_the_dataset_move_weights_and_average(unbroken: Path, pretrained: Path) -> None:
    known = before(pretrained)
    for kind in ("model", "ema"):
        first, last = tensors(unbroken, 1, kind), tensors(unbroken, ALONE, kind)
        own = {name for name in last if is_own(name)}
        assert own == last.keys() - known.keys()
        assert all(torch.equal(last[name], known[name]) for name in known)
        assert all(not torch.equal(last[name], first[name]) for name in own)
    moved = {name.rpartition("/")[0] for name in tensors(unbroken, ALONE, "optimizer")}
    assert moved == own
    after = tensors(unbroken, STEPS, "model")
    assert all(not torch.equal(after[name], known[name]) for name in known if part_of(name) == "trunk")


def test_what_the_model_knew_it_predicts_as_before_while_a_dataset_learns_alone(
    tiny_shards: Path, unbroken: Path, pretrained: Path
) -> None:
    reader = open_readers(tiny_shards, [DATASETS[0]], "test")[DATASETS[0]]
    state, constants = torch.from_numpy(reader.trajectory_frames(0, 0, 1)), torch.from_numpy(reader.constants(0))[None]
    old = load_pretrained(pretrained)
    alone, after = (load_pretrained(unbroken / f"checkpoints/step_{step:08d}") for step in (ALONE, STEPS))
    with torch.no_grad():
        predictions = [model(state, constants, DATASETS[0]) for model in (old, alone, after)]
    assert torch.equal(predictions[0], predictions[1])
    assert not torch.equal(predictions[0], predictions[2])


def test_alone_only_the_dataset_is_drawn_then_its_share(tiny_shards: Path, unbroken: Path) -> None:
    drawn = [line["dataset"] for line in log(unbroken)]
    assert set(drawn[:ALONE]) == {f"{NEW}+{NEW}"}
    history = json.loads((find_checkpoint(unbroken) / "state.json").read_text())["sampling"]["history"]
    assert [first for first, _ in history] == [0, 2 * ALONE]
    assert history[0][1] == {NEW: 1.0, **dict.fromkeys(DATASETS, 0.0)}
    base = sampling_shares(sources(open_readers(tiny_shards, THREE, "train"), 2), "sqrt")
    rest = base[DATASETS[0]] + base[DATASETS[1]]
    expected = {NEW: 0.5, **{name: 0.5 * base[name] / rest for name in DATASETS}}
    assert history[1][1] == pytest.approx(expected)


@pytest.mark.parametrize("step", [1, ALONE, ALONE + 1])
def test_continuing_from_either_side_equals_the_unbroken_run(
    tiny_shards: Path, pretrained: Path, unbroken: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run / f"checkpoints/step_{later:08d}")
    assert train(recipe(tiny_shards, run, pretrained)) == 0
    assert log(run) == log(unbroken)
    assert last_weights(run) == last_weights(unbroken)


def test_more_steps_alone_begin_where_the_run_continues(
    tiny_shards: Path, pretrained: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for later in range(ALONE + 2, STEPS + 1):
        shutil.rmtree(run / f"checkpoints/step_{later:08d}")
    assert train(recipe(tiny_shards, run, pretrained, adapt={"alone_steps": 6})) == 0
    state = json.loads((find_checkpoint(run) / "state.json").read_text())
    assert [first for first, _ in state["sampling"]["history"]] == [0, 2 * ALONE, 2 * ALONE + 2, 12]
    assert {line["dataset"] for line in log(run)[ALONE + 1 : 6]} == {f"{NEW}+{NEW}"}


def test_a_frozen_part_is_the_pretrained_one_and_has_no_moments(
    tiny_shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    frozen = {"datasets": [], "alone_steps": 0, "share": None, "rates": {"trunk": 0.0}}
    hot = {"weight_decay": 0.1, "learning_rate": 0.1, "warmup_steps": 0}
    run, known = tmp_path / "run", before(pretrained)
    assert train(recipe(tiny_shards, run, pretrained, data={"datasets": DATASETS}, adapt=frozen, train=hot)) == 0
    for kind in ("model", "ema"):
        for name, tensor in tensors(run, STEPS, kind).items():
            assert torch.equal(tensor, known[name]) == (part_of(name) == "trunk"), name
    moved = {part_of(name) for name in tensors(run, STEPS, "optimizer")}
    assert moved == {"embedding", "head"}


def test_rates_are_factors_on_the_learning_rate(tiny_shards: Path, pretrained: Path, tmp_path: Path) -> None:
    """Half of twice the rate is the rate, to the last bit."""
    plain = {"datasets": [], "alone_steps": 0, "share": None}
    twice = {"adapt": {**plain, "rates": dict.fromkeys(("embedding", "trunk", "head"), 0.5)}}
    train_twice = {"learning_rate": 6e-3, "weight_decay": 0.1}
    train_once = {"learning_rate": 3e-3, "weight_decay": 0.1}
    data = {"datasets": DATASETS}
    assert train(recipe(tiny_shards, tmp_path / "twice", pretrained, data=data, train=train_twice, **twice)) == 0
    once = recipe(tiny_shards, tmp_path / "once", pretrained, data=data, train=train_once, adapt=plain)
    assert train(replace(once, adapt=None)) == 0
    assert last_weights(tmp_path / "twice") == last_weights(tmp_path / "once")
    assert [line["lr"] for line in log(tmp_path / "twice")] == [2 * line["lr"] for line in log(tmp_path / "once")]


def test_tensorboard_has_the_rate_of_every_part(unbroken: Path) -> None:
    board = EventAccumulator(str(unbroken / "tensorboard")).Reload()
    rates = {line["step"]: line["lr"] for line in log(unbroken)}

    def shown(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in board.Scalars(tag)}

    assert shown("train/lr") == pytest.approx({step: rates[step] for step in (2, 4, 6, 8)})
    assert shown("learning_rate/own_head") == pytest.approx(shown("train/lr"))
    assert shown("learning_rate/trunk") == pytest.approx({2: 0.0, **{step: 0.1 * rates[step] for step in (4, 6, 8)}})
    assert shown("learning_rate/head")[2] == 0.0
    assert shown(f"sampling/target_share/{NEW}") == pytest.approx({2: 1.0, 4: 0.5, 6: 0.5, 8: 0.5})


def test_one_step_finetuning_is_plain_training_whatever_the_objective(
    tiny_shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    for objective in ("scheduled_sampling", "bptt", "pushforward"):
        finetune = {"pretrained": str(pretrained), "unroll_steps": 1, "objective": objective, "forcing_start": 0.0}
        assert train(small(tiny_shards, tmp_path / objective, train={"steps": 3}, finetune=finetune)) == 0
    assert last_weights(tmp_path / "bptt") == last_weights(tmp_path / "scheduled_sampling")
    assert last_weights(tmp_path / "bptt") == last_weights(tmp_path / "pushforward")
    # the same windows as a run without a pretrained model
    assert train(small(tiny_shards, tmp_path / "plain", train={"steps": 3})) == 0
    assert [line["windows"] for line in log(tmp_path / "plain")] == [line["windows"] for line in log(tmp_path / "bptt")]


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        ({"alone_steps": -1}, "adapt.alone_steps: Input should be greater than or equal to 0 (got -1)"),
        ({"alone_steps": STEPS}, "adapt.alone_steps: expected fewer than the 8 of train.steps, got 8"),
        ({"share": 1.0}, "adapt.share: Input should be less than 1 (got 1.0)"),
        ({"datasets": []}, "alone_steps and share are the new datasets', expected their names in datasets"),
        ({"rates": {"trunk": -0.1}}, "adapt.rates.trunk: Input should be greater than or equal to 0 (got -0.1)"),
        ({"rates": {"trunk": 0, "head": 0, "embedding": 0}}, "adapt.rates: expected one factor above 0 at least"),
        ({"rates": {"body": 0.1}}, "unknown key adapt.rates.body"),
    ],
)
def test_settings_are_checked(tiny_shards: Path, tmp_path: Path, adapt: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        recipe(tiny_shards, tmp_path / "run", tmp_path, adapt=adapt)


def test_adapting_is_for_pretrained_models_and_sets_the_shares(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapt: it is for pretrained models, expected the section finetune beside it"):
        small(tiny_shards, tmp_path / "run", adapt={"rates": {"trunk": 0.1}})
    adaptive = {"sampling": {"scheme": "adaptive"}, "validation": {"every": 2}}
    with pytest.raises(UserError, match="scheme: adaptive sets the shares itself, expected another scheme beside"):
        recipe(tiny_shards, tmp_path / "run", tmp_path, **adaptive)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapt": {"datasets": ["shear_flaw"]}}, "no dataset 'shear_flaw' in this run. Did you mean 'shear_flow'?"),
        ({"data": {"datasets": [NEW]}}, "expected datasets beside the new ones to divide the other draws among"),
        (
            {"sampling": {"scheme": "weights", "weights": dict.fromkeys(DATASETS, 1.0) | {NEW: 0.0}}},
            "sampling.weights gives shear_flow no share",
        ),
        (
            {"sampling": {"scheme": "weights", "weights": dict.fromkeys(DATASETS, 0.0) | {NEW: 1.0}}},
            "sampling.weights leaves the other datasets no share",
        ),
        ({"adapt": {"rates": {"embedding": 0.0, "head": 0.0}}}, "alone_steps: nothing would move in them, shear_flow"),
    ],
)
def test_datasets_and_shares_must_fit(
    tiny_shards: Path, pretrained: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        train(recipe(tiny_shards, tmp_path / "run", pretrained, **sections))
