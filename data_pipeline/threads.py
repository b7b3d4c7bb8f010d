"""Threads that end with the process, whatever they wait for."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

GRACE_SECONDS = 2.0  # for what is running when its threads are no longer wanted


class Threads:
    """A few threads that run what is submitted, in order.

    They are daemons, unlike an executor's, which would keep an interrupted process until all is done. When nothing
    refers to the object any more, or the process ends, what has not begun is cancelled, and what runs gets
    GRACE_SECONDS: Python's end would tear a daemon out of torch's code, which aborts the process.
    """

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[object, ...]] | None]
        self._tasks = queue.SimpleQueue()
        threads = [threading.Thread(target=_work, args=(self._tasks,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        weakref.finalize(self, _dismiss, self._tasks, threads)

    def submit(self, function: Callable[..., Any], *arguments: object) -> "Future[Any]":
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
