"""Start training in other processes, as a user launches it, for the scripts in this folder."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(directory: Path, settings: Sequence[str], config: str = "", processes: int = 2, threads: int = 1) -> Any:
    """Start the quickstart's recipe in `directory` under a configuration of launch/, in one process if it is empty.

    `threads` are those of each process. Returns the subprocess.Popen; its output goes to <directory>.out.
    """
    launcher = [sys.executable]
    if config:
        launcher += ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        launcher += ["--num_processes", str(processes), "--config_file", f"{ROOT}/launch/{config}.yaml"]
    always = [f"run.dir={directory}", "validation.every=0", "tracking.progress=false", "train.precision=float32"]
    command = [*launcher, str(ROOT / "recipes" / "quickstart.yaml"), *always, *settings]
    with _output(directory).open("w") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def finish(process: Any, directory: Path) -> None:
    """Wait for the end of the process. SystemExit, with its output, if the exit code is not 0."""
    if code := process.wait():
        raise SystemExit(f"{directory.name}: exit code {code}\n{_output(directory).read_text()}")


def log(directory: Path) -> list[dict]:
    """Return the lines of log.jsonl."""
    return _lines(directory / "log.jsonl")


def paces(directory: Path) -> list[float]:
    """Return the seconds of a step, averaged over every `tracking.every` steps, without the first, which are slow."""
    lines = _lines(directory / "events.jsonl")
    return [line["seconds"] / line["steps"] for line in lines if line["kind"] == "pace"][1:]


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _output(directory: Path) -> Path:
    return directory.with_suffix(".out")
