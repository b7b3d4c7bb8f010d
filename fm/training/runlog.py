"""run.json, the process that trains or trained last: host, pid, its start, world size, spread, versions. What it trains
with and on, in words.

What a run writes of itself, step by step: log.jsonl and events.jsonl.

Both hold one JSON object a line and are cut back to the checkpoint that a run continues from.

    log.jsonl     {"step", "dataset", "windows", "loss", "lr"}, a line an optimiser step. Nothing in it depends on the
                  clock or the machine: undisturbed, killed and continued runs leave the same lines. loss: null where
                  it is not finite; windows: digest of the window ids
    events.jsonl  {"kind", "step", "time"} (seconds since 1970) and, by kind:
        start       text                      the process began, or continued, at this step
        pace        steps, seconds, samples   since the line before: of stepping, without validations and saves
        save        scalars, texts, pending   before a checkpoint is written: what TensorBoard has of this step, and the
                                              steps whose means it does not have yet
        validation  mean_ratio, datasets      {name: {"vrmse", "over_persistence"}}, one step, averaged weights
        cosine      datasets, matrix, norms   of the datasets' gradients (training/conflict.py); null where one is zero
        guard       text, refused, reason, action, windows   a refused step; windows: {dataset: [window ids]}
        shares, warning, gate, message     text
        end         state, text               finished | interrupted | failed; a killed process leaves none
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import torch

from data_pipeline.files import atomic_file


def write_process(file: Path, spread: str) -> None:
    """Write run.json: what is needed to tell whether this process still lives, and how it was started."""
    own = psutil.Process()
    facts = {
        "host": socket.gethostname(),
        "pid": own.pid,
        "process_start": own.create_time(),  # a later process may get the same pid
        "started": time.time(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "spread": spread,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    with atomic_file(file, durable=False) as stream:
        stream.write(json.dumps(facts, indent=1).encode())


def process_lives(facts: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote run.json lives; None if it is, or was, on another machine."""
    if facts["host"] != socket.gethostname():
        return None
    try:
        process = psutil.Process(facts["pid"])
        same = abs(process.create_time() - facts["process_start"]) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment(device: torch.device, spread: str) -> dict[str, str]:
    """What the run is trained with and on, by name; `spread` says how the model is spread over processes."""
    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerate": version("accelerate"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{_processor()}, {os.cpu_count()} threads",
        "processes": f"{os.environ.get('WORLD_SIZE', '1')} ({spread})",
        "system": platform.platform(),
    }
    commit = _commit(Path(__file__).parents[2])
    return facts | {"commit": commit} if commit else facts


def _processor() -> str:
    """The CPU's name as the kernel has it; elsewhere than on Linux, its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(checkout: Path) -> str | None:
    """The commit of a checkout, marked where files differ from it; None where there is no checkout, or no git."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


_OF_A_PROCESS = ("start", "end")  # true whatever step a later process continues from
# made at a checkpoint's own step, and again by a run that continues there
_MADE_AGAIN = ("validation", "gate", "cosine", "shares", "warning")


class StepLog:
    """log.jsonl: one JSON line an optimiser step."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Open for appending after dropping lines past `resume_step` (steps that a killed run took in vain)."""
        self._stream = _open_cut(file, lambda line: line["step"] <= resume_step)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; a non-finite loss is written as null."""
        self._stream.write(json.dumps({k: _json_number(v) for k, v in entry.items()}) + "\n")

    def close(self) -> None:
        self._stream.close()


class EventLog:
    """events.jsonl: what happened, and when."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Open for appending after dropping what a run that continues from `resume_step` does again."""
        self._stream = _open_cut(file, lambda line: _happened(line, resume_step))
        lines, _ = parse_lines(file.read_text(errors="replace"))
        saves = [line for line in lines if line.get("kind") == "save" and line["step"] == resume_step]
        self.saved: Mapping[str, Any] = {"scalars": {}, "texts": [], "pending": []}  # at `resume_step`
        if saves and saves[-1].keys() >= self.saved.keys():
            self.saved = saves[-1]
        validations = [line for line in lines if line.get("kind") == "validation"]
        self.scores: Mapping[str, Any] = validations[-1].get("datasets", {}) if validations else {}  # the last ones
        # what earlier roll backs to `resume_step` said, after its checkpoint was written
        refusals = [line["text"] for line in lines if line.get("kind") == "guard" and line["step"] == resume_step]
        self.refusals = [text for text in refusals if ["events", text] not in self.saved["texts"]]

    def write(self, kind: str, step: int, **facts: Any) -> None:
        """Append one line; NaN and infinity are written as Python's json does."""
        self._stream.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **facts}) + "\n")

    def close(self) -> None:
        self._stream.close()


def lacks_validation(file: Path, step: int) -> bool:
    """Whether an events.jsonl tells of no validation after `step` steps. A run without the file is not judged."""
    if not file.is_file():
        return False
    lines, _ = parse_lines(file.read_text(errors="replace"))
    return not any(line.get("kind") == "validation" and line["step"] == step for line in lines)


def parse_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log that are JSON objects with a step, and the number of others."""
    lines, damaged = [], 0
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int):
                raise TypeError
            lines.append(entry)
        except (ValueError, KeyError, TypeError, IndexError):
            damaged += 1
    return lines, damaged


def _happened(line: Mapping[str, Any], resume_step: int) -> bool:
    kind, step = line.get("kind"), line["step"]
    return kind in _OF_A_PROCESS or step < resume_step or (step == resume_step and kind not in _MADE_AGAIN)


def _open_cut(file: Path, keep: Callable[[dict[str, Any]], bool]) -> TextIO:
    """Open a log for appending, without the lines that `keep` refuses and those that a kill has torn."""
    if file.exists():
        lines, _ = parse_lines(file.read_text(errors="replace"))
        with atomic_file(file, durable=False) as stream:
            stream.write("".join(f"{json.dumps(line)}\n" for line in lines if keep(line)).encode())
    return file.open("a", buffering=1)


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
