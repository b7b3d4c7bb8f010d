"""Threads that end with the process, and worker processes with one progress bar for all their tasks."""

import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from data_pipeline.errors import UserError
from data_pipeline.progress import progress_bar

GRACE_SECONDS = 2.0  # for what is running when its threads are no longer wanted


class Threads:
    """A few threads that run what is submitted, in order.

    They are daemons. An executor's threads are not, so it would keep an interrupted process until all tasks are done.
    When nothing refers to the object any more, or the process ends, tasks that have not begun are canceled. Running
    tasks get GRACE_SECONDS, because a daemon that is inside torch when Python ends aborts the process.
    """

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()  # (future, function, arguments); None ends a thread
        threads = [threading.Thread(target=_work, args=(self._tasks,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        weakref.finalize(self, _dismiss, self._tasks, threads)

    def submit(self, function: Callable[..., Any], *arguments: object) -> "Future[Any]":
        """Call `function` with the arguments in one of the threads; return its future result."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, arguments))
        return future


def _work(tasks: "queue.SimpleQueue[Any]") -> None:
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del task, future, function, arguments  # the next wait may be long


def _dismiss(tasks: "queue.SimpleQueue[Any]", threads: Sequence[threading.Thread]) -> None:
    while True:
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            break
        if task is not None:
            task[0].cancel()
    for _ in threads:
        tasks.put(None)
    deadline = time.monotonic() + GRACE_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():  # whose task may have held the last reference
            thread.join(max(0.0, deadline - time.monotonic()))


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
    """Yield (task, function(task, on_bytes)) as tasks end, in any order.

    `jobs` processes do the tasks; with one task or one job everything runs in this process. `function` reports to
    `on_bytes` what it has worked through, of `num_bytes` for all tasks together, in `unit`. `environment` is added to
    the environment of the workers.

    The first error, an interrupt, or closing the generator stops all tasks at their next report, or at once if
    `cut_short`. The error is raised.
    """
    if not tasks:
        return
    jobs = min(jobs, len(tasks))
    with progress_bar(total=num_bytes, desc=title, unit=unit) as bar:
        if jobs <= 1:
            yield from ((task, function(task, bar.update)) for task in tasks)
        else:
            yield from _run_in_workers(function, tasks, jobs, bar, environment or {}, cut_short)


def _run_in_workers(
    function: Callable[[T, OnBytes], R],
    tasks: Sequence[T],
    jobs: int,
    bar: Any,
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
    """Set the event on Ctrl-C within the block, and raise nothing.

    A KeyboardInterrupt can be raised at any moment. It could be lost in a callback, or leave a lock that the workers
    share acquired for ever.
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
    """End this worker when its parent has ended.

    Otherwise a worker whose parent was killed would wait for ever, or write while the next run does. The parent holds
    the other end of `lifeline`; if it is killed, the operating system closes it.
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
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
