"""Adaptive sampling in whole runs: the history of shares, exact resume, processes and threads; the repeat warning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from handmade import make_spec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import DATASETS, last_weights, log, rewrite_state, small

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers, sources
from data_pipeline.windows.schedule import Schedule, Source, adaptive_shares, sampling_shares
from fm.config import Recipe
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.mixing import Mixing
from fm.training.record import RunRecord, StepResult, passes_warning
from fm.training.trainer import train

ADAPTIVE: dict[str, dict[str, Any]] = {
    "sampling": {"scheme": "adaptive", "power": 2.0, "floor": 0.05},
    "train": {"steps": 9, "global_batch": 8, "draws": 2},
    "validation": {"every": 3, "windows": 3, "rollouts": 0},
    "checkpoint": {"every": 1, "keep": 20},
}


def adaptive(shards: Path, directory: Path, **sections: dict[str, Any]) -> Recipe:
    names = ADAPTIVE.keys() | sections.keys()
    merged = {name: {**ADAPTIVE.get(name, {}), **sections.get(name, {})} for name in names}
    return small(shards, directory, **merged)


def state(directory: Path, step: int) -> dict[str, Any]:
    return json.loads((directory / f"checkpoints/step_{step:08d}/state.json").read_text())


def events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory / "tensorboard")).Reload()


def event_texts(directory: Path) -> list[str]:
    tensors = events(directory)
    if "events/text_summary" not in tensors.Tags()["tensors"]:
        return []
    return [e.tensor_proto.string_val[0].decode() for e in tensors.Tensors("events/text_summary")]


@pytest.fixture(scope="module")
def unbroken(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps whose shares change after steps 3 and 6. Read only."""
    directory = tmp_path_factory.mktemp("adaptive") / "run"
    assert train(adaptive(tiny_shards, directory)) == 0
    return directory


def test_shares_follow_the_scores_and_the_draws_follow_the_shares(tiny_shards: Path, unbroken: Path) -> None:
    found = sources(open_readers(tiny_shards, DATASETS, "train"), 2)
    base = sampling_shares(found, "sqrt")
    saved = state(unbroken, 9)["sampling"]
    assert [first for first, _ in saved["history"]] == [0, 6, 12]  # two draws a step
    assert saved["history"][0][1] == base
    assert saved["history"][2][1] == adaptive_shares(base, saved["scores"], 2.0, 0.05)
    assert len({shares[DATASETS[0]] for _, shares in saved["history"]}) == 3
    schedule = Schedule(found, 4, seed=0).with_history(saved["history"])
    expected = ["+".join(schedule.draw(2 * step + micro).dataset for micro in (0, 1)) for step in range(9)]
    assert [line["dataset"] for line in log(unbroken)] == expected


@pytest.mark.parametrize("step", [2, 3, 5, 6, 8])  # 3 and 6: saved before the validation that changes the shares
def test_continuing_from_any_step_equals_the_unbroken_run(
    tiny_shards: Path, unbroken: Path, tmp_path: Path, step: int
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(unbroken, directory)
    for later in range(step + 1, 10):
        shutil.rmtree(directory / f"checkpoints/step_{later:08d}")
    assert train(adaptive(tiny_shards, directory)) == 0
    assert log(directory) == log(unbroken)
    assert state(directory, 9)["sampling"] == state(unbroken, 9)["sampling"]
    assert last_weights(directory) == last_weights(unbroken)


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_that_ended_and_is_prolonged_equals_the_unbroken_run(
    tiny_shards: Path, unbroken: Path, tmp_path: Path, step: int
) -> None:
    assert train(adaptive(tiny_shards, tmp_path / "run", train={"steps": step})) == 0
    assert train(adaptive(tiny_shards, tmp_path / "run")) == 0
    assert log(tmp_path / "run") == log(unbroken)
    assert last_weights(tmp_path / "run") == last_weights(unbroken)


@pytest.mark.parametrize("workers", [0, 3])  # 1 in the unbroken run
def test_threads_do_not_read_ahead_with_the_shares_of_before(
    tiny_shards: Path, unbroken: Path, tmp_path: Path, workers: int
) -> None:
    assert train(adaptive(tiny_shards, tmp_path / "run", data={"workers": workers})) == 0
    assert log(tmp_path / "run") == log(unbroken)


def test_tensorboard_and_console_tell_of_new_shares(tiny_shards: Path, tmp_path: Path, capsys: Any) -> None:
    directory = tmp_path / "run"
    assert train(adaptive(tiny_shards, directory, tracking={"every": 1})) == 0
    history = state(directory, 9)["sampling"]["history"]
    board = events(directory)
    for name in DATASETS:
        targets = [event.value for event in board.Scalars(f"sampling/target_share/{name}")]
        assert targets == pytest.approx([shares[name] for _, shares in history for _ in range(3)])
    layout = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    for tag in ("target_share", "drawn_share", "passes"):
        assert f"sampling/{tag}/{DATASETS[0]}$".encode() in layout  # $: a tag is a regular expression, a prefix matches
    first, second = (shares[DATASETS[0]] for _, shares in history[:2])
    line = f"{DATASETS[0]} {first:.4f} -> {second:.4f}"
    told = [text for text in event_texts(directory) if text.startswith("sampling shares from here on")]
    assert len(told) == 2
    assert f"- {line}" in told[0]
    console = capsys.readouterr().err
    assert "step 3: sampling shares, largest changes:" in console
    assert line in console


def test_a_changed_scheme_begins_where_the_run_continues(tiny_shards: Path, tmp_path: Path) -> None:
    plain = {"checkpoint": {"every": 100}, "validation": {"every": 0}}
    names = {"datasets": DATASETS}
    assert train(small(tiny_shards, tmp_path / "run", train={"steps": 5}, **plain)) == 0
    weights = {"scheme": "weights", "weights": {DATASETS[0]: 0.0, DATASETS[1]: 1.0}}
    assert train(small(tiny_shards, tmp_path / "run", data=names, sampling=weights, **plain)) == 0
    found = sources(open_readers(tiny_shards, DATASETS, "train"), 2)
    history = [[0, sampling_shares(found, "sqrt")], [5, {DATASETS[0]: 0.0, DATASETS[1]: 1.0}]]
    assert state(tmp_path / "run", 8)["sampling"]["history"] == history
    schedule = Schedule(found, 4, seed=0).with_history(history)
    assert [line["dataset"] for line in log(tmp_path / "run")] == [schedule.draw(i).dataset for i in range(8)]


def test_a_history_that_does_not_fit_is_refused(tiny_shards: Path, tmp_path: Path, unbroken: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(unbroken, directory)
    longer = {"steps": 12, "global_batch": 4, "draws": 1}
    with pytest.raises(UserError, match=r"it goes beyond draw 9, where step 9 begins with this train.draws"):
        train(adaptive(tiny_shards, directory, train=longer))
    file = directory / "checkpoints/step_00000009/state.json"
    for history in ([], [[0, {"a": 1.0}]], [[3, {}]], "none", [[0]], [["0", {}]]):
        rewrite_state(file, sampling={"history": history, "scores": {}})
        with pytest.raises(UserError, match="history of sampling shares does not fit this run"):
            train(adaptive(tiny_shards, directory, train={"steps": 12}))


def recipe_and_mixing(tmp_path: Path, **sections: dict[str, Any]) -> tuple[Recipe, Mixing]:
    recipe = adaptive(tmp_path, tmp_path / "run", **sections)
    return recipe, Mixing(recipe, [Source(name, 100, 256, (100,)) for name in DATASETS])


def test_a_missing_score_leaves_the_last_one_standing_and_is_told(tmp_path: Path, capsys: Any) -> None:
    recipe, mixing = recipe_and_mixing(tmp_path, sampling={"power": 1.0})
    accelerator = Accelerator(cpu=True)
    assert mixing.follow({DATASETS[0]: 0.9, DATASETS[1]: 0.1}, 3, accelerator) == []
    assert mixing.schedule.shares == pytest.approx({DATASETS[0]: 0.9, DATASETS[1]: 0.1})
    assert mixing.follow({DATASETS[0]: None}, 6, accelerator) == DATASETS
    assert mixing.schedule.shares == pytest.approx({DATASETS[0]: 0.9, DATASETS[1]: 0.1})
    assert mixing.follow({DATASETS[0]: 100.0, DATASETS[1]: float("inf")}, 9, accelerator) == DATASETS[1:]
    assert mixing.schedule.shares == pytest.approx({DATASETS[0]: 0.95, DATASETS[1]: 0.05})
    with RunRecord(recipe, mixing.schedule, tiny_model(), 0, "one process") as record:
        record.log_shares(mixing.schedule, DATASETS[1:], 6)
    note = f"no finite score of {DATASETS[1]}: its last one stands, or else the average"
    assert f"step 6: {note}" in capsys.readouterr().err
    assert any(f"- {note}" in text for text in event_texts(tmp_path / "run"))


def tiny_model() -> WaveLiTFM:
    return WaveLiTFM(ModelConfig(width=16, depth=1, heads=2, wavelet="haar"), [make_spec(name) for name in DATASETS])


def test_repeats_planned_are_told_at_the_start(tiny_shards: Path, tmp_path: Path, capsys: Any) -> None:
    found = sources(open_readers(tiny_shards, DATASETS, "train"), 2)
    planned = Schedule(found, 4, seed=0).passes(8)
    most = max(planned, key=lambda name: planned[name])
    limit = (sum(planned.values())) / 2
    assert min(planned.values()) < limit < planned[most]
    assert train(small(tiny_shards, tmp_path / "run", sampling={"max_passes": limit})) == 0
    warning = (
        f"8 steps pass {planned[most]:.1f} times over {most}, more than sampling.max_passes={limit:g}; it may be "
        "learned by heart. Add trajectories, lower its share (sampling.scheme, sampling.weights) or train.steps, or "
        "raise the limit (null: no limit)."
    )
    assert passes_warning(most, planned[most], limit, 8) == warning
    console = capsys.readouterr().err
    assert console.count("warning: ") == 1
    assert f"warning: {warning}" in console
    assert event_texts(tmp_path / "run") == [warning]
    assert train(small(tiny_shards, tmp_path / "never", sampling={"max_passes": None})) == 0
    assert "warning" not in capsys.readouterr().err


def test_repeats_that_shares_bring_about_are_told_once_when_they_happen(tmp_path: Path, capsys: Any) -> None:
    recipe, mixing = recipe_and_mixing(tmp_path, train={"steps": 40}, sampling={"max_passes": 2.0})
    with RunRecord(recipe, mixing.schedule, tiny_model(), 0, "one process") as record:
        assert "warning" not in capsys.readouterr().err  # 80 draws of 4 windows out of 2 x 100: 1.6 passes
        mixing.follow({DATASETS[0]: 0.1, DATASETS[1]: 9.0}, 3, Accelerator(cpu=True))
        record.log_shares(mixing.schedule, [], 3)
        for step in (10, 20, 30, 40):
            record.log_step(finished_step(step))
    passes = {step: mixing.schedule.passes(2 * step)[DATASETS[1]] for step in (20, 30)}
    assert passes[20] <= 2.0 < passes[30]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert told == [f"warning: {passes_warning(DATASETS[1], passes[30], 2.0, 30)}"]


def test_a_forecast_of_repeats_says_that_shares_may_change(tmp_path: Path, capsys: Any) -> None:
    recipe, mixing = recipe_and_mixing(tmp_path, train={"steps": 40}, sampling={"max_passes": 1.0})
    passes = mixing.schedule.passes(80)[DATASETS[0]]
    assert passes > 1
    with RunRecord(recipe, mixing.schedule, tiny_model(), 0, "one process"):
        forecast = f"warning: at the present shares, 40 steps pass {passes:.1f} times over {DATASETS[0]}"
        assert forecast in capsys.readouterr().err


def test_throughput_is_that_of_the_steps_whatever_lies_between_them(tmp_path: Path) -> None:
    recipe, mixing = recipe_and_mixing(tmp_path, tracking={"every": 4})
    with RunRecord(recipe, mixing.schedule, tiny_model(), 0, "one process") as record:
        for step in (1, 2, 3, 4):  # a validation after step 3
            record.log_step(finished_step(step))
    assert [event.value for event in events(tmp_path / "run").Scalars("throughput/samples_per_s")] == [8.0]


def test_finetuning_follows_the_scores_and_continues(tiny_shards: Path, unbroken: Path, tmp_path: Path) -> None:
    finetune = {"finetune": {"pretrained": str(unbroken), "unroll_steps": 3}}
    assert train(adaptive(tiny_shards, tmp_path / "whole", **finetune)) == 0
    assert train(adaptive(tiny_shards, tmp_path / "parts", **finetune)) == 0
    for later in range(4, 10):
        shutil.rmtree(tmp_path / f"parts/checkpoints/step_{later:08d}")
    assert train(adaptive(tiny_shards, tmp_path / "parts", **finetune)) == 0
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert last_weights(tmp_path / "parts") == last_weights(tmp_path / "whole")
    assert len({shares[DATASETS[0]] for _, shares in state(tmp_path / "whole", 9)["sampling"]["history"]}) == 3


def finished_step(step: int) -> StepResult:
    return StepResult(
        step=step,
        datasets=(DATASETS[0], DATASETS[0]),
        grids=((16, 16), (16, 16)),
        windows="",
        losses=(1.0, 1.0),
        mse=1.0,
        wavelet_l1=1.0,
        grad_norm=1.0,
        lr=1e-3,
        samples=8,
        model_calls=(1, 1),
        data_seconds=0.0,
        seconds=1.0,
        cpu_seconds=1.0,
        stop=False,
    )


def test_adaptive_without_validation_is_refused_and_too_little_of_it_told(
    tiny_shards: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(UserError, match=r"the test: sampling.scheme: adaptive follows the validation scores, expected"):
        adaptive(tiny_shards, tmp_path / "run", validation={"every": 0})
    assert train(adaptive(tiny_shards, tmp_path / "run", validation={"every": 9})) == 0
    assert "adaptive changes nothing in 9 steps, since the first validation is after 9" in capsys.readouterr().err
    assert len(state(tmp_path / "run", 9)["sampling"]["history"]) == 1


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"power": -1.0}, r"sampling\.power: Input should be greater than or equal to 0 \(got -1.0\)"),
        ({"power": float("nan")}, r"sampling\.power: Input should be a finite number \(got nan\)"),
        ({"floor": 1.0}, r"sampling\.floor: Input should be less than 1 \(got 1.0\)"),
        ({"max_passes": 0}, r"sampling\.max_passes: Input should be greater than 0 \(got 0\)"),
    ],
)
def test_sampling_settings_are_checked(tmp_path: Path, sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adaptive(tmp_path, tmp_path / "run", sampling=sampling)


def test_a_floor_too_high_for_the_datasets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampling.floor: expected less than 1 / 2 = 0.5"):
        recipe_and_mixing(tmp_path, sampling={"floor": 0.5})
