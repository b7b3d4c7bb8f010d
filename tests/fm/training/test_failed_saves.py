"""A run whose checkpoints cannot be written: it ends, or goes on and says so."""

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import file_size_limit, finish, fork, log, saved_steps, small, start, wait_for

from data_pipeline.errors import UserError
from fm.config import dump_recipe
from fm.training.trainer import train


def test_by_default_a_failed_save_ends_the_run_at_the_next_step(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 30}, checkpoint={"every": 10})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("not a folder")
    with pytest.raises(UserError, match=r"checkpoints/step_00000010: Not a directory"):
        train(recipe)
    assert 10 <= len(log(tmp_path / "run")) < 20


@pytest.mark.parametrize("stop_at", [None, 7])
def test_told_to_continue_a_run_says_so_and_only_its_last_save_ends_it(
    tiny_shards: Path, tmp_path: Path, capsys: Any, stop_at: int | None
) -> None:
    recipe = small(
        tiny_shards, tmp_path / "run", checkpoint={"every": 3, "on_error": "continue"}, run={"stop_at": stop_at}
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("not a folder")
    last = stop_at or 8
    with pytest.raises(UserError, match=rf"checkpoints/step_0000000{last}: Not a directory"):
        train(recipe)
    assert len(log(tmp_path / "run")) == last
    console = capsys.readouterr().err
    for step in (3, 6):
        assert f"could not save the checkpoint {tmp_path}/run/checkpoints/step_0000000{step}" in console
    assert "saved step" not in console
    (tmp_path / "run" / "checkpoints").unlink()
    assert train(recipe) == 0
    assert saved_steps(tmp_path / "run" / "checkpoints") == [3, 6, last]


def test_a_run_on_a_full_disk_goes_on_and_writes_all_of_it_once_there_is_space(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """For a while no file of a run in its own process can grow: checkpoints, logs and TensorBoard's files."""
    directory = tmp_path / "run"
    recipe = small(tiny_shards, directory, train={"steps": 100}, checkpoint={"every": 5, "on_error": "continue"})
    process = start(recipe)
    assert process.stderr is not None
    wait_for(lambda: (directory / "log.jsonl").is_file() and "\n" in (directory / "log.jsonl").read_text(), process)
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, unlimited))
    printed = ""
    while "could not save the checkpoint" not in printed:
        assert process.poll() is None, printed
        printed += process.stderr.readline()
    held = (directory / "log.jsonl").read_text()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    code, output = finish(process)
    printed += output
    assert code == 0, printed
    assert "File too large" in printed
    assert "Training goes on (checkpoint.on_error: continue)" in printed
    for name in ("log.jsonl", "events.jsonl"):
        assert printed.count(f"{directory / name}: cannot be written (File too large); what comes is kept") == 1
    assert len(held.splitlines()) < 100
    assert [line["step"] for line in log(directory)] == list(range(1, 101))
    assert saved_steps(directory / "checkpoints") == [90, 95, 100]
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 101, 2))
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("events/text_summary")]
    assert any("could not save the checkpoint" in text for text in texts)


@pytest.mark.parametrize(
    ("on_error", "message"),
    [
        ("stop", r"tensorboard/events.out.tfevents\S+: cannot be written \(File too large\). Free some space"),
        ("continue", r"could not save the checkpoint \S+step_00000008: File too large"),
    ],
)
def test_a_disk_that_is_full_from_the_beginning(tiny_shards: Path, tmp_path: Path, on_error: str, message: str) -> None:
    recipe = small(tiny_shards, tmp_path / "run", checkpoint={"every": 100, "on_error": on_error})
    with file_size_limit(len(dump_recipe(recipe)) + 400), pytest.raises(UserError, match=message):
        train(recipe)


def test_a_run_whose_folder_vanishes_makes_it_again(tiny_shards: Path, tmp_path: Path) -> None:
    """With a save every step, so that each waits for the one before it."""
    root = tmp_path / "run" / "checkpoints"
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 4}, checkpoint={"every": 1})
    assert train(recipe) == 0
    assert saved_steps(root) == [2, 3, 4]
    process = fork(small(tiny_shards, tmp_path / "run", train={"steps": 90}, checkpoint={"every": 30}))
    wait_for(lambda: len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) > 6, process)
    shutil.rmtree(root)
    code, output = finish(process)
    assert code == 0, output
    assert saved_steps(root) == [30, 60, 90]
