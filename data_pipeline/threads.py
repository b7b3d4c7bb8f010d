"""Threads that end with the process, whatever they wait for."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Threads:
    """A few threads that run what is submitted, in order.

    They are daemons, unlike an executor's, which would keep an interrupted process until all is done. When nothing
    refers to the object any more, they end after what was submitted.
    """

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[object, ...]] | None]
        self._tasks = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=_work, args=(self._tasks,), daemon=True).start()
        weakref.finalize(self, _dismiss, self._tasks, count).atexit = False

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


def _dismiss(tasks: "queue.SimpleQueue[Any]", count: int) -> None:
    for _ in range(count):
        tasks.put(None)
