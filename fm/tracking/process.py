"""run.json, the process that trains or trained last: host, pid, its start, world size, spread, versions. What it trains
with and on, in words.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
