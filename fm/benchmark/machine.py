"""The machine that a benchmark runs on: its device, its versions, and how busy it is."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import UserError
from data_pipeline.workers import available_cores

DEVICES = ("auto", "cpu", "cuda")


def chosen_device(name: str) -> str:
    """cpu or cuda. UserError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; take --device cpu, or --gpu NAME for the floor alone")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def machine(device: str) -> dict[str, Any]:
    """Device, cores, threads, load and versions, as JSON."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "cpu": _cpu(),
        "cores": available_cores(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9}
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
