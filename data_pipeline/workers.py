"""Runs tasks in worker processes, with one progress bar for all of them."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import TypeVar

from tqdm import tqdm

from data_pipeline.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
OnBytes = Callable[[int], None]
_POLL_SECONDS = 0.2


class Stopped(Exception):
    """Another task failed or the user interrupted, so this one ends."""


def run_tasks(
    function: Callable[[T, OnBytes], R],
    tasks: Sequence[T],
    jobs: int,
    num_bytes: int,
    title: str,
    *,
    unit: str = "B",
    environment: Mapping[str, str] | None = None,
    cut_short: bool = False,
) -> Generator[tuple[T, R]]:
    """Yields (task, function(task, on_bytes)) as tasks end, in any order; `function` reports its work to on_bytes.

    The work is `num_bytes` in all; given another `unit`, it is that many of them, counted in place of bytes. With one
    job or task everything runs in this process; workers get the variables of `environment` added to their own. The
    first error, an interrupt, or closing the generator stops all tasks: each at its next report, or, with `cut_short`,
    at once and half way. The error is raised.
    """
    if not tasks:
        return
    jobs = min(jobs, len(tasks))
    with tqdm(total=num_bytes, desc=title, unit=unit, unit_scale=unit == "B", unit_divisor=1024, disable=None) as bar:
        if jobs <= 1:
            yield from ((task, function(task, bar.update)) for task in tasks)
        else:
            yield from _run_in_workers(function, tasks, jobs, bar, environment or {}, cut_short)


def _run_in_workers(
    function: Callable[[T, OnBytes], R],
    tasks: Sequence[T],
    jobs: int,
    bar: tqdm,
    environment: Mapping[str, str],
    cut_short: bool,
) -> Iterator[tuple[T, R]]:
    context = get_context("spawn")  # the same on Linux and macOS, and safe when the caller has threads
    counter, stop = context.Value("q", 0), context.Event()
    lifeline, end = context.Pipe(duplex=False)
    with (
        _deferred_interrupt() as interrupted,
        ProcessPoolExecutor(jobs, context, _start_worker, (counter, stop, lifeline)) as pool,
    ):
        try:
            with _added_to_environment(environment):  # submitting starts the workers
                waiting: dict[Future[R], T] = {pool.submit(_run_task, function, task): task for task in tasks}
            while waiting:
                done, _ = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                if interrupted.is_set():
                    raise KeyboardInterrupt
                bar.update(counter.value - bar.n)
                for future in done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            end.close()  # the executor forgets a worker that was starting when another was killed: end it
            if interrupted.is_set():  # it also reached a worker that had not yet begun to ignore it
                raise KeyboardInterrupt from error
            raise UserError(
                "a worker process was killed, most likely for want of memory; run the same command with fewer --jobs"
            ) from error
        except BaseException:
            if cut_short:
                end.close()
            raise
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            end.close()
            lifeline.close()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event within the block, and raises nothing.

    Raised at any moment, it could be lost in a callback, or leave a lock that the workers share acquired for ever.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGINT, lambda signum, frame: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _added_to_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_shared: tuple["Synchronized[int]", Event] | None = None  # of a worker process, set once when it starts


def _start_worker(counter: "Synchronized[int]", stop: Event, lifeline: Connection) -> None:
    global _shared
    _shared = (counter, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets `stop`
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    """A worker whose parent was killed would wait for ever, or write while the next run does.

    The parent holds the other end of `lifeline`; if it is killed, the operating system closes it.
    """
    lifeline.poll(None)
    os._exit(1)


def _run_task(function: Callable[[T, OnBytes], R], task: T) -> R:
    return function(task, _count_bytes)


def _count_bytes(num_bytes: int) -> None:
    assert _shared is not None
    counter, stop = _shared
    if stop.is_set():
        raise Stopped
    with counter.get_lock():
        counter.value += num_bytes


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
