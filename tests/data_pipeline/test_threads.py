"""Threads end with what they serve: cleanly, soon, and before the interpreter does."""

import subprocess
import sys
import threading
import time

from data_pipeline.workers import Threads


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
