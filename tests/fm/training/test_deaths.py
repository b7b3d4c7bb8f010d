"""Launched runs whose processes are killed, told to stop, or fail: all of them end, and the same command continues.

A launcher's own exit code is 1 in every case; what its processes say and leave is what counts.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from whole_runs import accelerate, finish, log, small, start, wait_for

from data_pipeline.errors import UserError
from fm.checkpoint import list_checkpoints, verify_checkpoint
from fm.config import Recipe
from fm.distributed import make_accelerator
from fm.training.trainer import train

STEPS = 60
LOST = "another process of this run has ended"


def recipe_of(shards: Path, directory: Path, **sections: dict[str, Any]) -> Recipe:
    """Long enough to be killed in the middle; a low rate, or differences of rounding would grow."""
    return small(shards, directory, **{"train": {"steps": STEPS, "learning_rate": 3e-4}, **sections})


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of the run in one process, from its beginning to its end."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(recipe_of(tiny_shards, directory)) == 0
    return directory


def assert_same_run(directory: Path, undisturbed: Path) -> None:
    """Each step once, the same windows, and losses that differ by the order of summation only."""
    lines, expected = log(directory), log(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["windows"] for line in lines] == [line["windows"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def members(directory: Path) -> list[psutil.Process]:
    """Launchers and ranks of a run, also those that have lost their parent."""
    file = str(directory.with_suffix(".yaml"))
    return [process for process in psutil.process_iter(["cmdline"]) if file in (process.info["cmdline"] or ())]


def ranks(directory: Path) -> dict[int, psutil.Process]:
    found = {}
    for process in members(directory):
        with suppress(psutil.Error, KeyError):
            found[int(process.environ()["RANK"])] = process
    return found


@contextmanager
def running(recipe: Recipe, *launchers: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """The recipe under each of the launchers, as from terminals of their own. None of its processes outlives the test.

    Ranks are no part of a launcher's process group, so it is not enough to kill that.
    """
    directory = recipe.run.directory
    processes = [start(recipe, *launcher, start_new_session=True) for launcher in launchers]
    try:
        yield processes
    finally:
        for process in members(directory):
            with suppress(psutil.Error):
                process.kill()
        for launcher in processes:
            launcher.communicate()


def wait_for_steps(directory: Path, process: subprocess.Popen[str], steps: int = 7) -> None:
    def done() -> bool:
        time.sleep(0.02)
        return (directory / "log.jsonl").is_file() and len((directory / "log.jsonl").read_text().splitlines()) >= steps

    wait_for(done, process)


def assert_ended(directory: Path, process: subprocess.Popen[str], seconds: float = 60) -> str:
    """The launcher fails within that time, and nothing of the run is left; returns the output."""
    output = "".join(process.communicate(timeout=seconds))
    assert process.returncode == 1, output
    assert members(directory) == []
    return output


def test_one_that_is_killed_takes_the_others_along_and_the_run_continues(
    tiny_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """The launcher starts all again once, as its option says, then ends; the same command continues."""
    directory = tmp_path / "run"
    recipe = recipe_of(tiny_shards, directory)
    with running(recipe, accelerate("cpu2", "--max_restarts", "1")) as (launcher,):
        wait_for_steps(directory, launcher)
        first = ranks(directory)
        first[0].kill()
        wait_for(lambda: ranks(directory).keys() == {0, 1} and not {*first.values()} & {*ranks(directory).values()},
                 launcher)  # fmt: skip
        wait_for_steps(directory, launcher, len(log(directory)) + 3)
        ranks(directory)[1].kill()
        output = assert_ended(directory, launcher)
    assert output.count("continuing") == 1
    assert LOST in output
    assert "exitcode  : -9" in output
    assert "[rank" not in output  # as torch begins the lines of a rank's traceback
    assert train(recipe) == 0
    assert_same_run(directory, undisturbed)


def ctrl_c(launcher: subprocess.Popen[str], directory: Path) -> None:
    """What a terminal does: to all processes of the foreground group."""
    os.killpg(launcher.pid, signal.SIGINT)


def terminate(launcher: subprocess.Popen[str], directory: Path) -> None:
    """What a cluster does that knows the launcher only."""
    launcher.terminate()


def warn(launcher: subprocess.Popen[str], directory: Path) -> None:
    """What Slurm does before the time is up, if told to leave the launchers out."""
    for rank in ranks(directory).values():
        rank.send_signal(signal.SIGUSR1)


def test_all_that_are_asked_to_stop_finish_the_step_and_save(
    tiny_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    directory, saved = tmp_path / "run", []
    recipe = recipe_of(tiny_shards, directory, checkpoint={"every": 1000})
    for ask in (ctrl_c, terminate, warn):
        with running(recipe, accelerate("cpu2")) as (launcher,):
            wait_for_steps(directory, launcher, sum(saved[-1:]) + 7)
            ask(launcher, directory)
            output = assert_ended(directory, launcher)
        saved.append(log(directory)[-1]["step"])
        assert f"interrupted: saved step {saved[-1]}" in output
        assert "[rank" not in output
        assert sorted(list_checkpoints(directory / "checkpoints")) == saved
    assert saved[-1] < STEPS
    assert train(recipe) == 0
    assert_same_run(directory, undisturbed)


def test_a_second_ctrl_c_ends_all_at_once(tiny_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train(recipe_of(tiny_shards, directory, run={"stop_at": 4})) == 0
    minutes = {"steps": STEPS, "global_batch": 40_000, "micro_batch": 1}  # a step
    recipe = recipe_of(tiny_shards, directory, train=minutes, sampling={"max_passes": None}, checkpoint={"every": 1})
    with running(recipe, accelerate("cpu2")) as (launcher,):
        wait_for(lambda: "continued from step 4" in (directory / "events.jsonl").read_text(), launcher)
        ctrl_c(launcher, directory)
        time.sleep(3)
        assert len(ranks(directory)) == 2
        ctrl_c(launcher, directory)
        assert "interrupted: what was saved is kept" in assert_ended(directory, launcher, seconds=15)
    assert len(log(directory)) == 4
    saved = list_checkpoints(directory / "checkpoints")
    assert sorted(saved) == [3, 4]
    for path in saved.values():
        verify_checkpoint(path)


def test_a_failure_of_the_main_process_alone_ends_all_and_is_explained(tiny_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "checkpoints/step_00000003").write_text("a file where a folder should be")
    with running(recipe_of(tiny_shards, directory), accelerate("cpu2")) as (launcher,):
        output = assert_ended(directory, launcher, seconds=180)
    assert "error: could not save the checkpoint" in output
    assert "step_00000003: Not a directory" in output
    assert "[rank" not in output


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Launchers of a process each that find each other under the address and port of the first."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    first = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--rdzv_backend", "c10d"]

    def launchers(*options: str) -> list[list[str]]:
        # both are at that address; the second must not take the port before the first
        machines = [["--machine_rank", str(machine), "--rdzv_conf", f"is_host={1 - machine}"] for machine in (0, 1)]
        return [accelerate("multinode", "--num_machines", "2", *first, *machine, *options) for machine in machines]

    return launchers


def test_machines_end_together_continue_and_start_again_together(
    tiny_shards: Path, tmp_path: Path, undisturbed: Path, two_machines: Callable[..., list[list[str]]]
) -> None:
    directory = tmp_path / "run"
    recipe = recipe_of(tiny_shards, directory)
    with running(recipe, *two_machines()) as launchers:
        wait_for_steps(directory, launchers[0])
        ranks(directory)[1].kill()
        outputs = [launcher.communicate(timeout=60) for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [1, 1], outputs
    assert LOST in str(outputs)
    done = len(log(directory))
    with running(recipe, *two_machines("--max_restarts", "3")) as launchers:
        wait_for_steps(directory, launchers[0], done + 7)
        ranks(directory)[0].kill()
        ends = [finish(launcher) for launcher in launchers]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "continuing" in str(ends)
    assert_same_run(directory, undisturbed)


def test_machines_that_would_hang_when_they_start_again_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"USE_AGENT_STORE": "True", "MAX_RESTARTS": "1", "RESTART_COUNT": "0"}
    for name, value in launcher.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several machines with --max_restarts would hang"):
        make_accelerator(clip=1.0)
