"""Anomalous steps: stopped, skipped, or passed over after a rollback, and replayed; the one-step regression limit."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from error_files import block_scores, dataset_scores, made_scores, window_scores
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import DATASETS, finish, fork, last_weights, log, small, spoil

from data_pipeline.errors import UserError
from data_pipeline.shards.format import Manifest
from data_pipeline.windows.reader import ShardReader
from fm.cli import main
from fm.config import FinetuneSettings, GuardSettings, Recipe, ValidationSettings
from fm.evaluation.evaluate import ValidationResult
from fm.lab.replay import replay
from fm.training.guard import AnomalyDetector, RegressionLimit, SlowSteps, slow_steps_warning
from fm.training.trainer import train


def judge(guard: AnomalyDetector, loss: float, norm: float = 1.0, dataset: str = "a") -> str | None:
    return guard.find([dataset], [loss], norm)


def used_to(losses: list[float], **settings: Any) -> AnomalyDetector:
    guard = AnomalyDetector(GuardSettings(**{"spike": 6.0, **settings}))
    for loss in losses:
        assert judge(guard, loss) is None
    return guard


USUAL = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.2, 0.8] * 4


def test_what_is_not_finite_is_named() -> None:
    guard = AnomalyDetector(GuardSettings())
    assert judge(guard, float("nan")) == "the loss of a is not finite"
    assert judge(guard, 1.0, float("inf")) == "the gradient norm of a is not finite"
    assert guard.find(["a", "b"], [float("inf"), 1.0], float("nan")) == (
        "the loss of a is not finite; the gradient norm is not finite"
    )
    assert judge(guard, 1e30) is None  # without guard.spike, finite is good enough


def test_a_spike_is_far_above_the_median_in_spreads_of_its_own_dataset() -> None:
    guard = used_to(USUAL)
    assert judge(guard, 1.6) is None
    said = judge(guard, 4.0)
    assert said is not None
    assert said.startswith("the loss of a is 4, ")
    assert "spreads above its median 1 (guard.spike: 6)" in said
    assert judge(guard, 1e-6) is None  # far below is no harm
    assert judge(guard, 1.0, norm=9.0).startswith("the gradient norm of a is 9")
    assert judge(guard, 1000.0, dataset="b") is None  # nothing is known of it yet


def test_what_was_refused_does_not_become_usual() -> None:
    guard = used_to(USUAL)
    assert all(judge(guard, 4.0) for _ in range(100))
    rising = used_to(USUAL)
    assert all(judge(rising, 1.0 + 0.01 * number) is None for number in range(100))  # slow is usual


def test_little_variation_is_no_reason_for_alarm() -> None:
    guard = used_to([1.0] * 40)
    assert judge(guard, 1.2) is None
    assert judge(guard, 1.5) is not None


def test_the_state_judges_alike() -> None:
    guard = used_to(USUAL, history=16)
    guard.count_refused(7)
    other = AnomalyDetector(guard.settings)
    other.restore(json.loads(json.dumps(guard.state())))
    for loss in (1.3, 0.7, 1.7, 2.5, 1.1, 4.0):
        assert judge(guard, loss) == judge(other, loss)
    assert other.state() == guard.state()
    assert other.refused == {7}


def test_too_many_are_the_end() -> None:
    guard = AnomalyDetector(GuardSettings(max_events=1))
    guard.count_refused(5)
    guard.count_refused(5)  # the same step, in another attempt
    with pytest.raises(UserError, match=r"the guard has refused 2 steps, more than guard.max_events=1"):
        guard.count_refused(9)


@pytest.fixture(scope="module")
def spoilt(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with two frames, of one trajectory, that are a thousand times too large."""
    return spoil(
        tiny_shards, tmp_path_factory.mktemp("spoilt") / "shards", lambda frames: np.multiply(frames, 1e3, out=frames)
    )


def guarded(shards: Path, directory: Path, action: str, **sections: dict[str, Any]) -> Recipe:
    guard = {"action": action, "spike": 20.0, "history": 8}
    data = {"datasets": DATASETS[:1]}
    sections = {"train": {"steps": 40}, "checkpoint": {"every": 4, "keep": 100}, **sections}
    return small(shards, directory, guard=guard, data=data, **sections)


def lines_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def stopped(spoilt: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that the guard has stopped, and the step that it refused."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(UserError, match=r"step \d+: the loss of acoustic\w+ is .* spreads above its median"):
        train(guarded(spoilt, directory, "stop"))
    return directory, len(log(directory)) + 1


@pytest.fixture(scope="module")
def skipped(spoilt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose refused steps were skipped. Read only."""
    directory = tmp_path_factory.mktemp("skipped") / "run"
    assert train(guarded(spoilt, directory, "skip")) == 0
    return directory


def test_a_spike_stops_the_run_and_says_which_windows(spoilt: Path, stopped: tuple[Path, int]) -> None:
    directory, step = stopped
    assert 8 < step < 40
    (event,) = lines_of(directory, "guard")
    assert (event["refused"], event["action"], event["step"]) == (step, "stop", step)
    windows = event["windows"][DATASETS[0]]
    assert len(windows) == 4
    assert f"{DATASETS[0]} windows {', '.join(map(str, windows))}" in event["text"]
    index = ShardReader(spoilt, DATASETS[0], "train").index(2)
    assert {(0, 0), (0, 1)} & set(zip(*(part.tolist() for part in index.locate(np.array(windows))), strict=True))
    assert [path.name for path in (directory / "incidents").iterdir()] == [f"step_{step - 1:08d}"]
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    assert any(b"refused" in e.tensor_proto.string_val[0] for e in board.Tensors("events/text_summary"))


def test_windows_of_two_draws_of_one_dataset_are_all_named(spoilt: Path, tmp_path: Path) -> None:
    batches = {"steps": 24, "global_batch": 4, "draws": 2, "micro_batch": 1}
    assert train(guarded(spoilt, tmp_path / "run", "skip", train=batches)) == 0
    refused = lines_of(tmp_path / "run", "guard")
    assert refused
    assert {len(event["windows"][DATASETS[0]]) for event in refused} == {4}
    last = replay(tmp_path / "run", refused[-1]["refused"])
    assert last.again == 0
    assert [draw.dataset for draw in last.draws] == DATASETS[:1] * 2
    assert sum(draw.loss for draw in last.draws) / 2 == last.logged


def test_skipped_steps_leave_the_weights_alone(spoilt: Path, tmp_path: Path, stopped: tuple[Path, int]) -> None:
    directory, step = tmp_path / "run", stopped[1]
    assert train(guarded(spoilt, directory, "skip", checkpoint={"every": 1, "keep": 100})) == 0
    refused = [event["refused"] for event in lines_of(directory, "guard")]
    assert step in refused
    for number in range(2, 41):
        before, after = (
            load_file(directory / f"checkpoints/step_{n:08d}/model.safetensors") for n in (number - 1, number)
        )
        assert all(torch.equal(before[name], after[name]) for name in before) == (number in refused)
    assert [line["step"] for line in log(directory)] == list(range(1, 41))


def test_a_roll_back_passes_the_step_over_and_says_so(
    spoilt: Path, tmp_path: Path, stopped: tuple[Path, int], skipped: Path
) -> None:
    """The end is that of a run which skips: the state before a refused step is the same either way."""
    back, skip = tmp_path / "back", skipped
    assert train(guarded(spoilt, back, "rollback")) == 0
    assert [event["refused"] for event in lines_of(back, "guard")] == [
        event["refused"] for event in lines_of(skip, "guard")
    ]
    (first, *_) = lines_of(back, "guard")
    assert first["step"] == (stopped[1] - 1) // 4 * 4  # the checkpoint that it went back to
    assert last_weights(back) == last_weights(skip)
    board = EventAccumulator(str(back / "tensorboard"), {"tensors": 0})  # all of them
    board.Reload()
    told = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("events/text_summary")]
    # as sets: event files of one second have no order in TensorBoard, which then shows what another has replaced
    assert {text for text in told if "refused" in text} == {event["text"] for event in lines_of(back, "guard")}
    assert [(line["step"], line["windows"]) for line in log(back)] == [
        (line["step"], line["windows"]) for line in log(skip)
    ]
    assert [line["text"] for line in lines_of(back, "start")][1] == f"continued from step {first['step']}"


def test_a_roll_back_needs_checkpoints_to_return_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollback returns to a checkpoint, expected checkpoint\.resume: auto"):
        guarded(tmp_path, tmp_path / "run", "rollback", checkpoint={"resume": "never"})


def test_a_roll_back_before_the_first_checkpoint_begins_again(spoilt: Path, tmp_path: Path, skipped: Path) -> None:
    """Twice, until the second refused step is passed over, too."""
    first, second, *_ = (event["refused"] for event in lines_of(skipped, "guard"))
    sections = {"checkpoint": {"every": 1000}, "run": {"stop_at": second + 1}}
    assert train(guarded(spoilt, tmp_path / "run", "rollback", **sections)) == 0
    told = [(event["refused"], event["step"]) for event in lines_of(tmp_path / "run", "guard")]
    assert told == [(first, 0), (second, 0)]
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, second + 2))


def test_a_guarded_run_in_parts_is_the_whole_run(
    spoilt: Path, tmp_path: Path, stopped: tuple[Path, int], skipped: Path
) -> None:
    """What is usual, and what was refused, are in the checkpoint."""
    for stop_at in (stopped[1] - 1, stopped[1], stopped[1] + 3, None):
        assert train(guarded(spoilt, tmp_path / "parts", "skip", run={"stop_at": stop_at})) == 0
    assert log(tmp_path / "parts") == log(skipped)
    assert last_weights(tmp_path / "parts") == last_weights(skipped)


def test_a_refused_step_is_replayed_from_its_incident(
    spoilt: Path, stopped: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, step = stopped
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert main(["replay", str(directory), "--step", str(step)]) == 0
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert f"step {step}, from {directory}/incidents/step_{step - 1:08d} (0 steps run again)" in said
    (event,) = lines_of(directory, "guard")
    result = replay(directory, step)
    (draw,) = result.draws
    loss = float(event["reason"].partition(" is ")[2].partition(",")[0])
    assert draw.loss == pytest.approx(loss, rel=1e-3)
    assert {window for window, *_ in draw.windows} == set(event["windows"][DATASETS[0]])
    trajectory, frame = draw.windows[0][1:3]
    assert (trajectory, frame) in ((0, 0), (0, 1))  # the spoilt frames
    assert "pressure" in said
    manifest = Manifest.load(spoilt / DATASETS[0] / "train" / "manifest.json")
    assert [channel.name for channel in draw.channels] == list(manifest.state_channels)


def test_a_step_between_checkpoints_is_run_up_to(spoilt: Path, stopped: tuple[Path, int], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(stopped[0], directory)
    result = replay(directory, 7)
    assert (result.again, result.state.name) == (2, "step_00000004")
    assert result.draws[0].loss == result.logged == log(directory)[6]["loss"]
    assert all(norm > 0 for norm in result.gradient.values())
    assert {"lifting", "blocks.0", f"heads.{DATASETS[0]}", f"task_vectors.{DATASETS[0]}"} == result.gradient.keys()
    shutil.rmtree(directory / "checkpoints/step_00000004")
    with pytest.raises(UserError, match="no state before step 7 is kept"):
        replay(directory, 7)
    with pytest.raises(UserError, match="--step: expected 1 to 40, the length of"):
        replay(directory, 41)
    with pytest.raises(UserError, match="not a run directory"):
        replay(tmp_path, 1)


def limited(limit: float = 1.2, **validation: Any) -> RegressionLimit:
    return RegressionLimit(FinetuneSettings(pretrained="x", gate=limit), ValidationSettings(**validation))


def validated(one_step: dict[str, float | None], rollout: list[float | None]) -> ValidationResult:
    """One-step VRMSE by dataset; the first of them has the rollout scores, one a window."""
    windows = {str(number): window_scores(ratio, ratio) for number, ratio in enumerate(rollout)}
    datasets = {}
    for name, value in one_step.items():
        datasets[name] = dataset_scores(block_scores(value, value), {"w": None} if datasets else windows)
    return ValidationResult(made_scores(datasets), {})


def test_worsening_is_the_geometric_mean_and_its_worst_dataset_is_named() -> None:
    watching = limited()
    assert watching.judge(validated({"a": 0.1, "b": 0.2}, [1.0])).within_limit
    verdict = watching.judge(validated({"a": 0.1, "b": 0.32}, [1.0]))
    assert verdict.worsening == pytest.approx(1.6**0.5)
    assert verdict.worst == "b"
    assert not verdict.within_limit
    assert watching.ends_run
    assert not watching.judge(validated({"a": None, "b": 0.2}, [1.0])).within_limit
    assert watching.judge(validated({"a": 0.11, "b": 0.2}, [1.0])).within_limit
    assert not watching.ends_run


def test_the_best_has_the_fewest_diverged_rollouts_and_then_the_lowest_score() -> None:
    watching = limited()
    scores: list[tuple[list[float | None], bool]] = [
        ([None, 0.5], True),  # the pretrained model
        ([None, 0.6], False),
        ([None, 0.4], True),
        ([0.9, 0.9], True),
        ([None, 0.1], False),
        ([0.9, 0.8], True),
    ]
    for rollout, best in scores:
        verdict = watching.judge(validated({"a": 0.1}, rollout))
        assert verdict.best == best, rollout
        assert verdict.diverged == rollout.count(None)
    assert "1 rollout scores diverged" in limited().judge(validated({"a": 0.1}, [None, 0.5])).text


def test_a_lower_limit_drops_a_best_that_exceeds_it_and_a_newer_best_counts() -> None:
    wide = limited(2.0)
    wide.judge(validated({"a": 0.1}, [1.0]))
    wide.judge(validated({"a": 0.18}, [0.5]))
    narrow = limited(1.1)
    narrow.restore(wide.state(), None, 2)
    assert narrow.judge(validated({"a": 0.105}, [0.9])).best
    behind = limited(2.0)
    behind.restore(limited_at_start().state(), wide.state(), 0)  # <run>/best was written after the checkpoint
    assert not behind.judge(validated({"a": 0.1}, [0.8])).best


def limited_at_start() -> RegressionLimit:
    fresh = limited(2.0)
    fresh.judge(validated({"a": 0.1}, [1.0]))
    return fresh


def test_states_that_do_not_compare_are_refused() -> None:
    with pytest.raises(UserError, match="began without it"):
        limited().restore(RegressionLimit(None, ValidationSettings()).state(), None, 5)
    with pytest.raises(UserError, match=r"validated with protocol, windows and rollouts \['wavelit', 64, 1\], now"):
        limited(windows=8).restore(limited_at_start().state(), None, 5)
    with pytest.raises(UserError, match="no trajectory of the valid split covers a window of the protocol thirds"):
        limited().judge(validated({"a": 0.1}, []))
    RegressionLimit(None, ValidationSettings()).restore(limited().state(), None, 5)  # no gate, nothing to restore


def found(times: list[float], kind: str = "a", slow: SlowSteps | None = None) -> list[float | None]:
    slow = slow or SlowSteps()
    return [slow.find(kind, seconds) for seconds in times]


def test_three_steps_in_a_row_that_take_ten_times_as_long_are_found_once() -> None:
    usual = [9.0, 0.125, 0.125, 0.125]  # the first one was compiled
    assert found([*usual, 1.25, 1.5, 2.0, 2.0, 2.0]) == [*[None] * 6, 12.0, None, None]
    assert found([*usual, 1.25, 1.5, 0.125, 1.25, 1.5]) == [None] * 9  # pauses
    assert found([*usual, 1.125, 1.125, 1.125, 1.125]) == [None] * 8  # nine times
    assert found([0.125, 0.125, 2.0, 2.0, 2.0]) == [None] * 5  # two steps say nothing of the third
    assert found([0.0] * 4 + [2.0] * 4) == [None] * 8  # all of their time was waiting for data


def test_steps_are_compared_with_those_of_their_own_kind() -> None:
    slow = SlowSteps()
    assert found([0.125] * 4, "a", slow) + found([2.0] * 4, "b", slow) == [None] * 8
    assert found([1.25, 1.5], "a", slow) + found([40.0], "b", slow) == [None, None, 12.0]


def test_the_warning_of_slow_steps_names_what_to_set() -> None:
    assert slow_steps_warning(14.2, threads=2, processes=1, device="cpu") == (
        "steps take 14 times as long as before. Likely cause: other programs use the cores, and the 2 threads of each "
        "process wait for each other. What to do: set OMP_NUM_THREADS=1"
    )
    assert "start fewer processes (--processes, now 4)" in slow_steps_warning(14.2, 1, 4, "cpu")
    alone = slow_steps_warning(14.2, 1, 1, "cuda")
    assert "other programs use the GPU or the cores. What to do: end those programs" in alone


def test_a_run_whose_steps_become_slow_says_why_once(tiny_shards: Path, tmp_path: Path) -> None:
    """The process is stopped most of the time, as one is whose core others use."""
    run = tmp_path / "run"
    endless = {"train": {"steps": 100_000}, "sampling": {"max_passes": None}}
    process = fork(small(tiny_shards, run, data={"datasets": DATASETS[:1]}, **endless))

    def events(kind: str) -> list[dict]:
        lines = (run / "events.jsonl").read_text().split("\n")[:-1] if (run / "events.jsonl").exists() else []
        return [line for line in map(json.loads, lines) if line["kind"] == kind]

    while sum(line["steps"] for line in events("pace")) < 10:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    while not events("warning"):
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 130, output
    (warning,) = events("warning")
    assert "Likely cause: other programs use the cores" in warning["text"]
    assert output.count("times as long as before") == 1
    assert f"step {warning['step']}: warning: steps take " in output
