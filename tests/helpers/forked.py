"""Scripts in processes of their own that need not import torch again: forked from a server that has imported it."""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["fm.recipe", "fm.evaluation.report", "fm.training.pictures", "torch._dynamo"])


class Forked:
    """A script or recipe that runs, with the methods of subprocess.Popen that tests use.

    It prints into files beside the script, or on `terminal`, a descriptor that may be closed once it has begun.
    """

    def __init__(
        self,
        script: Path,
        *arguments: str,
        environment: Mapping[str, str] = os.environ,
        terminal: int | None = None,
    ) -> None:
        self._printed = script.with_suffix(".out"), script.with_suffix(".err")
        streams = self._printed if terminal is None else Descriptor(terminal)
        command = [str(script), *arguments]
        self._process = CONTEXT.Process(target=_run, args=(command, streams, dict(environment)))
        self._process.start()
        self.pid = self._process.pid or 0
        atexit.register(self.kill)  # of a test that failed

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
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


class Descriptor:
    """An open file that a new process gets, as the number that it has there."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (DupFd(self._number),)


def _received(duplicate: Any) -> int:
    number: int = duplicate.detach()
    return number


CLIENT = """import json, os, sys
from multiprocessing.connection import Client
with Client({address!r}) as server:
    server.send_bytes(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    code, out, err = json.loads(server.recv_bytes())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@contextmanager
def forked_program(script: Path, folder: Path) -> Iterator[Path]:
    """Yield a Python program in `folder` that runs `script` as Forked does, for shell scripts.

    The script gets the program's arguments, working directory and environment, and the program the script's output and
    exit code.
    """
    with Listener(family="AF_UNIX") as listener:
        program = folder / f"forked_{script.parent.name}.py"
        program.write_text(CLIENT.format(address=listener.address))
        server = threading.Thread(target=_serve, args=(listener, script, folder))
        server.start()
        try:
            yield program
        finally:
            with Client(listener.address) as client:
                client.send_bytes(b"")
            server.join()


@contextmanager
def forking_python(folder: Path) -> Iterator[Path]:
    """Yield a Python for sys.executable that runs `-m fm` as Forked does, and all else in a fresh interpreter."""
    with forked_program(Path(__file__).parents[2] / "fm" / "__main__.py", folder) as program:
        yield _program_for("-m fm", program, folder)


@contextmanager
def forking_ranks(script: Path, folder: Path) -> Iterator[Path]:
    """Yield a Python for PYTHON_EXEC, with which torch's launcher starts ranks: `script` runs as Forked does."""
    with forked_program(script, folder) as program:
        yield _program_for(f"-u {script}", program, folder)


def _program_for(command: str, program: Path, folder: Path) -> Path:
    """Write a Python that runs `program` in place of a command of two words."""
    python = folder / "python"
    fresh = f'exec "{sys.executable}"'
    python.write_text(f'#!/bin/sh\n[ "$1 $2" = "{command}" ] || {fresh} "$@"\nshift 2\n{fresh} -IS "{program}" "$@"\n')
    python.chmod(0o755)
    return python


def _serve(listener: Listener, script: Path, folder: Path) -> None:
    threads: list[threading.Thread] = []
    while True:
        client = listener.accept()
        if not (request := client.recv_bytes()):
            client.close()
            break
        copy = folder / f"command_{len(threads) + 1}.py"
        threads.append(threading.Thread(target=_answer, args=(client, request, script, copy)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def _answer(client: Connection, request: bytes, script: Path, copy: Path) -> None:
    """Run the script as one client asks for; the ranks of one launch run beside each other."""
    arguments, directory, environment = json.loads(request)
    copy.write_text(f"import os\nos.chdir({directory!r})\n{script.read_text()}")
    with client:
        process = Forked(copy, *arguments, environment=environment)
        printed = process.communicate()
        client.send_bytes(json.dumps([process.returncode, *printed]).encode())


def _run(command: list[str], streams: tuple[Path, Path] | int, environment: Mapping[str, str]) -> None:
    gc.freeze()  # what was imported before: to look through it takes time, and copies of all its memory
    set_start_method(None, force=True)  # of the processes that this one starts: the system's, as in a fresh process
    os.environ.clear()
    os.environ.update(environment)
    if isinstance(streams, int):
        for number in range(3):
            os.dup2(streams, number)
        os.close(streams)
        sys.stdout.reconfigure(line_buffering=True)  # as Python does on a terminal
    else:
        for path, stream in zip(streams, (sys.stdout, sys.stderr), strict=True):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream.fileno())
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
