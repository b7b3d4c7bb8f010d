"""What `bench` measured: figures for the JSON, a table for people, and the verdict."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from data_pipeline.bench.ways import BATCH, LENGTH, WORKERS, Data, Way
from data_pipeline.workers import available_cores

PAPER_WINDOWS_PER_S = 1_000_000 * BATCH / (41 * 3600)  # WaveLiT-FM: 1M steps of batch 4 in 41 hours
ROUNDS = 5
KEYS = ("memcpy", "indexed", "streaming_warm", "welldataset", "h5py", "webdataset")  # always in the JSON
RATIOS = (("indexed", "welldataset"), ("indexed", "memcpy"), ("streaming_warm", "indexed"))


def report(
    data: Data, rounds: Mapping[str, Sequence[float]], cold: Mapping[str, dict[str, float]], needed: float
) -> dict[str, Any]:
    """The content of the JSON; None where a way was not measured."""
    speeds: dict[str, float | None] = dict.fromkeys(KEYS)
    speeds |= {name: statistics.median(values) for name, values in rounds.items()}
    speeds |= {f"streaming_cold_{shuffle}": one["windows_per_s"] for shuffle, one in cold.items()}
    manifest = data.reader.manifest
    return {
        "windows_per_s": speeds,
        "spread": {name: [min(values), max(values)] for name, values in rounds.items()},
        "mb_per_s": {name: value and value * data.window_bytes / 1e6 for name, value in speeds.items()},
        "ratios": {f"{a}_over_{b}": _ratio(speeds, a, b) for a, b in RATIOS} | _loader_ratios(speeds),
        "streaming_cold": cold,
        "needed_windows_per_s": needed,
        "verdict": verdict(speeds, needed),
        "data": {
            "dataset": manifest.dataset,
            "grid": list(manifest.grid),
            "channels": len(manifest.state_channels),
            "dtype": manifest.dtype,
            "window_bytes": data.window_bytes,
            "shard_bytes": sum(shard.bytes for shard in manifest.shards),
        },
    }


def _ratio(speeds: Mapping[str, float | None], above: str, below: str) -> float | None:
    one, other = speeds.get(above), speeds.get(below)
    return one / other if one is not None and other is not None else None


def _loader_ratios(speeds: Mapping[str, float | None]) -> dict[str, float | None]:
    """Speed of the loader over that of the bare reader times its threads."""
    ratios = {workers: _ratio(speeds, f"loader_{workers}", "indexed") for workers in WORKERS}
    return {
        f"loader_{workers}_over_indexed_x_workers": ratio and ratio / max(workers, 1)
        for workers, ratio in ratios.items()
    }


def verdict(speeds: Mapping[str, float | None], needed: float) -> str:
    """Whether reading or computing limits a training that takes `needed` windows a second, by the fastest loader."""
    found = {name: value for name, value in speeds.items() if name.startswith("loader_") and value}
    name = max(found, key=lambda name: found[name])
    times = found[name] / needed
    workers = f"data.workers={name.removeprefix('loader_')}"
    figures = f"{found[name]:.0f} windows/s with {workers}, {times:.3g} times the {needed:.3g} that training takes"
    if times < 1:
        return f"IO limits: {figures}. Use more workers, float16 shards or a faster disk."
    margin = "" if times >= 2 else " There is little to spare: several processes on this machine share it."
    return f"compute limits: {figures}.{margin}"


def machine(load: float) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), model)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        "cpu": model,
        "cores": available_cores(),
        "system": platform.system(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        **versions,
        "h5py": h5py.__version__,
    }


def table(figures: Mapping[str, Any], ways: Mapping[str, Way]) -> str:
    """The figures for people; the ways in the order of their speed, those left out below."""
    data, machine = figures["data"], figures["machine"]
    speeds, indexed = figures["windows_per_s"], figures["windows_per_s"]["indexed"]
    lines = [
        f"{data['dataset']}: {data['grid'][0]}x{data['grid'][1]}, {data['channels']} channels, {data['dtype']}, "
        f"{data['shard_bytes'] / 1e6:.0f} MB of shards; a window of {LENGTH} frames has {data['window_bytes']} bytes",
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']:.1f} before, "
        f"{machine['load_after']:.1f} after; page cache warm, medians of {ROUNDS} rounds in turn",
        f"{'':<13}{'windows/s':>10}  {'spread':<17}{'MB/s':>7}{'/ indexed':>11}",
    ]
    for name in sorted(figures["spread"], key=lambda name: -speeds[name]):
        low, high = figures["spread"][name]
        lines.append(
            f"{name:<13}{speeds[name]:>10.0f}  {f'{low:.0f} - {high:.0f}':<17}{figures['mb_per_s'][name]:>7.0f}"
            f"{speeds[name] / indexed:>11.3f}  {ways[name].what}"
        )
    for shuffle, one in figures["streaming_cold"].items():
        lines.append(
            f"streaming, cold, {shuffle}: {one['windows_per_s']:.0f} windows/s from a loopback server; "
            f"{one['windows']} windows, {one['requests']} requests, {one['fetched_per_used']:.2f} bytes fetched per "
            "byte used"
        )
    left_out = [name for name in KEYS if speeds[name] is None]
    if left_out:
        lines.append(f"not measured: {', '.join(left_out)} (see --well, --synthetic and README)")
    lines += [f"{name}: {value:.3g}" for name, value in figures["ratios"].items() if value is not None]
    needed = figures["needed_windows_per_s"]
    origin = "the paper's 1M steps of batch 4 in 41 h" if needed == PAPER_WINDOWS_PER_S else "--windows-per-s"
    lines.append(
        f"verdict: {figures['verdict']}\n"
        f"({needed:.3g} windows/s: {origin}. For your model give TensorBoard's throughput/samples_per_s as "
        "--windows-per-s, from a run that did not wait for data.)"
    )
    return "\n".join(lines)
