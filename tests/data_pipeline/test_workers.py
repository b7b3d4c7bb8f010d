"""Threads that end with the process, and tasks in real worker processes."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.workers import Threads, run_tasks


def test_tasks_run_in_order_and_hand_over_results_and_errors() -> None:
    threads = Threads(1)
    done: list[int] = []
    futures = [threads.submit(done.append, number) for number in range(5)]
    failing = threads.submit(int, "none")
    assert [future.result() for future in futures] == [None] * 5
    assert done == list(range(5))
    assert isinstance(failing.exception(), ValueError)


def test_what_has_not_begun_is_cancelled_and_what_runs_is_waited_for() -> None:
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        time.sleep(0.2)
        done.set()

    threads = Threads(1)
    running, waiting = threads.submit(work), threads.submit(work)
    begun.wait()
    del threads
    assert done.is_set()
    assert running.done()
    assert waiting.cancelled()


PROGRAM = """
import sys, time
import numpy as np, torch
from data_pipeline.workers import Threads

def work():
    while True:
        torch.from_numpy(np.ones(100_000)).clone()
        if sys.argv[1] == "ends":
            return time.sleep(0.3)
        time.sleep(60)

threads = Threads(2)
futures = [threads.submit(work) for _ in range(2)]
time.sleep(0.1)
sys.exit(7)
"""


def test_the_process_ends_with_its_own_exit_code() -> None:
    for kind in ("ends", "hangs"):
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True)
        assert done.returncode == 7, done.stderr
        assert not done.stderr
        assert time.monotonic() - begun < 30  # not the minute that the hanging one wants


VARIABLES = ("OMP_NUM_THREADS", "WAVELIT_TEST_WORKERS")


def report_environment(number: int, on_bytes: Callable[[int], None]) -> tuple[int, list[str | None]]:
    on_bytes(1)
    return number * number, [os.environ.get(name) for name in VARIABLES]


def fail_once_the_others_work(task: tuple[Path, int], on_bytes: Callable[[int], None]) -> None:
    """Task 0 fails when task 1 has begun; task 1 reports for ever, and says so when it is stopped in good order."""
    folder, number = task
    if number == 0:
        while not (folder / "begun").exists():
            time.sleep(0.01)
        raise UserError("task 0 cannot go on")
    try:
        (folder / "begun").touch()
        while True:
            time.sleep(0.01)
            on_bytes(1)
    finally:
        (folder / "tidied").touch()


def fail_while_another_is_busy(task: tuple[Path, int], on_bytes: Callable[[int], None]) -> None:
    """The same, but task 1 is too busy to report for longer than any test may take."""
    folder, number = task
    if number == 1:
        (folder / "begun").touch()
        time.sleep(3600)
    fail_once_the_others_work(task, on_bytes)


def return_or_work_for_ever(task: tuple[Path, int], on_bytes: Callable[[int], None]) -> int:
    if task[1] != 1:
        while not (task[0] / "begun").exists():
            time.sleep(0.01)
        return task[1]
    fail_once_the_others_work(task, on_bytes)
    raise AssertionError("it works for ever")


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_task_gives_its_own_result(jobs: int) -> None:
    results = list(run_tasks(report_environment, range(7), jobs, 7, "squares", unit="task"))
    assert sorted((task, square) for task, (square, _) in results) == [(number, number**2) for number in range(7)]


def test_workers_get_an_environment_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("WAVELIT_TEST_WORKERS", raising=False)
    runs = run_tasks(report_environment, range(4), 2, 4, "", environment=dict.fromkeys(VARIABLES, "1"))
    for _, (_, seen) in runs:
        assert seen == ["1", "1"]
        assert [os.environ.get(name) for name in VARIABLES] == ["5", None]


def test_an_error_stops_the_other_tasks_at_their_next_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task 0 cannot go on"):
        list(run_tasks(fail_once_the_others_work, [(tmp_path, 0), (tmp_path, 1)], 2, 2, ""))
    assert (tmp_path / "tidied").exists()


def test_an_error_cuts_short_tasks_that_do_not_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task 0 cannot go on"):
        list(run_tasks(fail_while_another_is_busy, [(tmp_path, 0), (tmp_path, 1)], 2, 2, "", cut_short=True))
    assert (tmp_path / "begun").exists()
    assert not (tmp_path / "tidied").exists()


def test_closing_the_results_stops_the_tasks(tmp_path: Path) -> None:
    tasks = [(tmp_path, number) for number in (2, 1)]
    results = run_tasks(return_or_work_for_ever, tasks, 2, 2, "")
    assert next(results) == ((tmp_path, 2), 2)
    results.close()
    assert (tmp_path / "tidied").exists()
