"""`fm status` at every stage of a run, and TensorBoard's curves over kills: every point once, with the same value."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import DATASETS, finish, fm, fork, log, small, wait_for

from data_pipeline.errors import UserError
from data_pipeline.schema import sealed
from fm.config import Recipe
from fm.lab.status import read_status, status_text
from fm.training.trainer import train

VALIDATED: dict[str, dict[str, Any]] = {
    "train": {"steps": 12},
    "validation": {"every": 4, "windows": 2, "rollouts": 0},
    "checkpoint": {"every": 1, "keep": 20},
}


def validated(shards: Path, directory: Path, **sections: dict[str, Any]) -> Recipe:
    names = VALIDATED.keys() | sections.keys()
    return small(shards, directory, **{name: {**VALIDATED.get(name, {}), **sections.get(name, {})} for name in names})


def events(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of events.jsonl; a run may be writing the last one."""
    path = directory / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curves(directory: Path) -> dict[str, list[Any]]:
    """Every point of every scalar but the throughput, which differs from run to run, and the steps of the images."""
    board = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = [tag for tag in board.Tags()["scalars"] if not tag.startswith("throughput/")]
    found: dict[str, list[Any]] = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in scalars}
    found["speed"] = [e.step for e in board.Scalars("throughput/samples_per_s")]
    return found | {tag: [e.step for e in board.Images(tag)] for tag in board.Tags()["images"]}


@pytest.fixture(scope="module")
def unbroken(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, validated after 4, 8 and 12, saved after each. Read only."""
    directory = tmp_path_factory.mktemp("status") / "run"
    assert train(validated(tiny_shards, directory)) == 0
    return directory


@pytest.fixture
def copied(unbroken: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


def test_a_finished_run(unbroken: Path) -> None:
    done = fm("status", str(unbroken), "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["name"], status["step"], status["steps"], status["state"]) == ("small", 12, 12, "finished")
    assert status["process"]["world_size"] == 1
    assert status["rate"]["samples_per_s"] == pytest.approx(4 * status["rate"]["steps_per_s"])
    assert status["rate"]["seconds_left"] is None
    assert status["checkpoint"]["step"] == 12
    assert status["validation"]["step"] == 12
    assert set(status["validation"]["datasets"]) == set(DATASETS)
    assert all(cell["over_persistence"] > 0 for cell in status["validation"]["datasets"].values())
    assert [event["kind"] for event in status["events"]] == ["start", "end"]
    assert status["disk_bytes"].keys() == {".", "checkpoints", "tensorboard"}
    assert status["problems"] == []


def test_the_text_says_the_same(unbroken: Path) -> None:
    text = fm("status", str(unbroken)).stdout
    for line in (
        r"state +finished: finished after step 12",
        r"step +12 of 12 \(100\.0%\)",
        r"rate +[\d.e+]+ steps/s, [\d.e+]+ samples/s while stepping",
        r"checkpoint +step 12, \d+ s ago, sizes verified, bytes not hashed: .*step_00000012",
        r"validation +after step 12, one step, averaged weights; VRMSE / persistence, geometric mean \d\.\d+",
        rf"  {DATASETS[1]} +VRMSE \d\.\d+  / persistence \d\.\d+",
        r"disk +[\d.]+ MB: .*checkpoints [\d.]+",
    ):
        assert re.search(line, text), (line, text)


def test_a_run_that_trains_and_is_killed_before_its_first_checkpoint(tiny_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    recipe = small(tiny_shards, directory, train={"steps": 50_000}, checkpoint={"every": 50_000})
    process = fork(recipe)
    wait_for(lambda: len([line for line in events(directory) if line["kind"] == "pace"]) > 3, process)
    status = read_status(directory)
    assert status.state == "running"
    assert f"process {process.pid} on " in status.why
    assert 6 < status.step < status.steps == 50_000
    assert status.rate is not None
    assert status.rate.seconds_left is not None
    assert status.rate.seconds_left > 100
    assert status.checkpoint is None
    assert re.search(r"left +.*, ends 2\d{3}-", status_text(status))
    process.kill()
    process.communicate()
    status = read_status(directory)
    assert status.state == "killed"
    assert "is gone and wrote no end event" in status.why
    assert status.rate is not None
    assert status.rate.seconds_left is None
    text = status_text(status)
    assert "checkpoint   none yet" in text
    assert "validation   none yet" in text
    assert train(small(tiny_shards, directory, train={"steps": 4})) == 0  # from the beginning again
    assert [line["step"] for line in log(directory)] == [1, 2, 3, 4]
    assert [step for step, _ in curves(directory)["train/loss"]] == [2, 4]
    assert [e["text"] for e in read_status(directory).events] == ["started", "started", "finished after step 4"]


def test_a_stopped_and_a_failed_run_leave_a_last_word(tiny_shards: Path, tmp_path: Path) -> None:
    process = fork(small(tiny_shards, tmp_path / "asked", train={"steps": 50_000}, checkpoint={"every": 50_000}))
    wait_for(lambda: len([line for line in events(tmp_path / "asked") if line["kind"] == "pace"]) > 1, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130
    status = read_status(tmp_path / "asked")
    assert (status.state, status.why) == ("interrupted", f"ended after step {status.step}, as asked")
    assert status.checkpoint is not None
    assert status.checkpoint.step == status.step
    hot = {"learning_rate": 1e30, "clip": 1e30, "warmup_steps": 0}
    with pytest.raises(UserError):
        train(small(tiny_shards, tmp_path / "hot", train=hot, guard={"action": "skip", "max_events": 2}))
    status = read_status(tmp_path / "hot")
    assert status.state == "failed"
    assert re.search(r"UserError: step \d+: the guard has refused 3 steps", status.why)
    assert [event["kind"] for event in status.events] == ["start", "guard", "guard", "end"]


def test_damaged_lines_are_left_out_and_told(copied: Path) -> None:
    for name in ("log.jsonl", "events.jsonl"):
        with (copied / name).open("ab") as file:
            file.write(b'{"step": 12, "da\n\xff\xfe\n')
    status = read_status(copied)
    assert status.step == 12
    assert status.state == "finished"
    assert status.problems == [f"{name}: 2 damaged lines, left out here" for name in ("log.jsonl", "events.jsonl")]
    assert "problems\n  log.jsonl: 2 damaged lines" in status_text(status)


def test_a_truncated_checkpoint_is_told_and_the_one_before_named(copied: Path) -> None:
    weights = copied / "checkpoints/step_00000012/ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (copied / "checkpoints/step_00000011/state.json").unlink()
    status = read_status(copied)
    assert status.checkpoint is not None
    assert status.checkpoint.step == 10
    assert ["its size differs" in problem for problem in status.problems] == [True, False]
    assert "step_00000011/state.json: cannot be read as JSON" in status.problems[1]


def test_a_clock_that_is_behind_gives_no_negative_times(copied: Path) -> None:
    checkpoint = copied / "checkpoints/step_00000012"
    later = time.time() + 3600
    os.utime(checkpoint, (later, later))
    status = read_status(copied)
    assert status.checkpoint is not None
    assert status.checkpoint.seconds_old == 0
    assert "step 12, 0 s ago" in status_text(status)


def test_the_last_verdict_of_the_gate_is_shown(copied: Path) -> None:
    assert read_status(copied).gate is None
    assert "gate " not in status_text(read_status(copied))
    lines = [{"kind": "gate", "step": step, "time": 1.0, "text": f"verdict {step}"} for step in (4, 8)]
    with (copied / "events.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    done = fm("status", str(copied), "--json")
    assert json.loads(done.stdout)["gate"] == lines[-1]
    assert "gate         after step 8: verdict 8" in status_text(read_status(copied))


def test_a_run_of_another_machine_is_judged_by_its_silence(copied: Path) -> None:
    lines = [line for line in (copied / "events.jsonl").read_text().splitlines() if '"end"' not in line]
    (copied / "events.jsonl").write_text("\n".join(lines) + "\n")
    facts = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**facts, "host": "elsewhere"}))
    assert "its content differs from the digest in it" in read_status(copied).problems[0]
    del facts["digest"]
    (copied / "run.json").write_text(json.dumps(sealed({**facts, "host": "elsewhere"})))
    assert read_status(copied).state == "running"
    for file in copied.iterdir():
        if file.is_file():
            os.utime(file, (1e9, 1e9))
    status = read_status(copied)
    assert status.state == "unknown"
    assert status.why.startswith("on elsewhere, another machine; last line ")
    # its pid is another process's now
    (copied / "run.json").write_text(json.dumps(sealed({**facts, "process_start": 1.0})))
    assert read_status(copied).state == "killed"
    (copied / "run.json").write_text(json.dumps(sealed({})))
    assert "run.json: missing key 'host'); whether its process lives is not known" in read_status(copied).problems[0]
    (copied / "recipe.yaml").write_text("train: [")
    status = read_status(copied)
    assert status.steps is None
    assert "the length of the run is not known" in status_text(status)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    done = fm("status", str(tmp_path))
    assert done.returncode == 2
    assert "not a run directory, it has no recipe.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("step", [0, 2, 3, 4, 8])
def test_curves_of_a_continued_run_are_those_of_the_unbroken_one(
    tiny_shards: Path, unbroken: Path, copied: Path, step: int
) -> None:
    """Continued from `step` although TensorBoard has all later points, as after a kill just before the next save."""
    for repeat in range(2):
        for later in range(step + 1, 13):
            shutil.rmtree(copied / f"checkpoints/step_{later:08d}")
        if step == 0:
            shutil.rmtree(copied / "checkpoints")
        assert train(validated(tiny_shards, copied)) == 0
        assert curves(copied) == curves(unbroken)
        starts = [line["text"] for line in events(copied) if line["kind"] == "start"]
        assert starts == ["started", *[f"continued from step {step}" if step else "started"] * (repeat + 1)]
        assert [line["step"] for line in events(copied) if line["kind"] == "validation"] == [4, 8, 12]
        assert [line["step"] for line in events(copied) if line["kind"] == "pace"] == [2, 4, 6, 8, 10, 12]


def test_curves_over_kills(tiny_shards: Path, unbroken: Path, tmp_path: Path) -> None:
    """kill -9 after a save and before its validation, after a validation and before the next save, and in between."""
    directory, recipe = tmp_path / "run", validated(tiny_shards, tmp_path / "run")

    def seen(kind: str, step: int) -> bool:
        return any(line["kind"] == kind and line["step"] >= step for line in events(directory)[1:])

    moments = [
        lambda: (directory / "checkpoints/step_00000004").is_dir(),
        lambda: seen("validation", 4),
        lambda: seen("save", 8),
        lambda: (directory / "checkpoints/step_00000012").is_dir(),  # only the last validation is missing
    ]
    kills = 0
    for moment in moments:
        process = fork(recipe)
        wait_for(moment, process)
        process.kill()
        process.communicate()
        kills += read_status(directory).state == "killed"
    assert kills >= len(moments) - 1  # the last moment is short
    assert train(recipe) == 0
    assert curves(directory) == curves(unbroken)
    assert log(directory) == log(unbroken)


def test_a_finished_run_is_validated_once(copied: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = validated(tiny_shards, copied)
    before = curves(copied)
    assert train(recipe) == 0
    assert "is finished at step 12; nothing to train" in capsys.readouterr().out
    kept = [
        line for line in (copied / "events.jsonl").read_text().splitlines() if '"validation", "step": 12' not in line
    ]
    (copied / "events.jsonl").write_text("\n".join(kept) + "\n")  # as if killed before its end
    assert train(recipe) == 0
    assert "nothing to train" not in capsys.readouterr().out
    assert curves(copied) == before
    assert read_status(copied).state == "finished"
    assert train(recipe) == 0
    assert "nothing to train" in capsys.readouterr().out
