"""Scripts in processes of their own that need not import torch again: forked from a server that has imported it."""

import atexit
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["fm.recipe", "torch._dynamo"])


class Forked:
    """A script or recipe that runs, with the methods of subprocess.Popen that tests use.

    It prints into files beside the script.
    """

    def __init__(self, script: Path, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
        self._printed = script.with_suffix(".out"), script.with_suffix(".err")
        command = [str(script), *arguments]
        self._process = CONTEXT.Process(target=_run, args=(command, *self._printed, dict(environment)))
        self._process.start()
        self.pid = self._process.pid or 0
        atexit.register(self.kill)  # of a test that failed

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._printed[0]), timeout or 0.0)
        out, err = (path.read_text() if path.exists() else "" for path in self._printed)
        return out, err


def _run(command: list[str], out: Path, err: Path, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
