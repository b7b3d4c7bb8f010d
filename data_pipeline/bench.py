"""How fast windows are read, compared with memcpy, the_well, h5py and webdataset, and whether IO limits training.

The methods take turns, round after round, so that other load slows all of them alike. Figures are medians over the
rounds. Before that, the first windows of every method are compared with the windows of ShardReader, so that no method
is timed on wrong data.
"""

import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.bench_methods import (
    BATCH,
    LENGTH,
    BenchData,
    Method,
    all_methods,
    remote_reader,
    served,
    stored_data,
    synthetic_data,
)
from data_pipeline.errors import UserError
from data_pipeline.files import write_whole
from data_pipeline.progress import progress_bar
from data_pipeline.registry import Registry
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import scheduled_batches
from data_pipeline.workers import available_cores

PAPER_WINDOWS_PER_S = 1_000_000 * BATCH / (41 * 3600)  # WaveLiT-FM: 1M steps of batch 4 in 41 hours
ROUNDS = 5
KEYS = ("memcpy", "indexed", "streaming_warm", "welldataset", "h5py", "webdataset")  # always in the JSON
_COLD_DRAWS_PER_S, _COLD_ROUNDS = 16, 3


def bench(
    shards: Path | None = None,
    well: Path | None = None,
    synthetic: str | None = None,
    datasets: Sequence[str] | None = None,
    windows_per_s: float = PAPER_WINDOWS_PER_S,
    seconds: float = 3.0,
    json_file: Path | None = None,
    registry: Registry | None = None,
) -> str:
    """Measure each method for `seconds` in all and return a table with a verdict; `json_file` gets the figures.

    Reads the train shards of one dataset in `shards` (`datasets`; if left out, the one with the largest windows) and
    the HDF5 files they were made from in `well`, or makes both in a temporary folder: `synthetic` is HxWxC.
    `windows_per_s` is what training needs.
    Raises UserError for choices that contradict each other, and for data that cannot be read.
    """
    if (shards is None) == (synthetic is None) or (synthetic is not None and (well or datasets)):
        raise UserError(
            "bench: expected a folder of shards (with --well, --datasets as you like) or --synthetic HxWxC, "
            "one of the two; for a first impression: data-pipeline bench --synthetic 256x256x3"
        )
    for name, value in (("--windows-per-s", windows_per_s), ("--seconds", seconds)):
        if not 0 < value < math.inf:
            raise UserError(f"{name}: expected a number above 0, got {value}")
    with ExitStack() as stack:
        if shards is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wavelit-bench-")))
            data = synthetic_data(folder, str(synthetic))
        else:
            data = stored_data(shards, well, datasets, registry)
        url = stack.enter_context(served(Path(str(data.reader.folder)).parents[1]))
        methods = all_methods(data, url, stack)
        _check(data, methods)
        load = os.getloadavg()[0]
        rounds = _measure(methods, seconds)
        cold = {shuffle: _streaming_cold(data, url, shuffle, seconds) for shuffle in ("blocks", "global")}
        figures = _figures(data, rounds, cold, windows_per_s) | {"machine": _machine(load)}
    if json_file is not None:
        write_whole(json_file, json.dumps(figures, indent=1).encode() + b"\n")
    return _table(figures, methods)


def _check(data: BenchData, methods: Mapping[str, Method]) -> None:
    """Compare each method's first windows with ShardReader's; float16 shards, which are rounded, are not checked."""
    if data.reader.manifest.dtype != "float32":
        return
    for name, method in methods.items():
        windows = [method.array(window) for window in next(method.batches)]
        if method.order == "file":
            expected = np.stack([data.reader.trajectory_frames(0, first, LENGTH) for first in range(len(windows))])
        else:
            # `_streaming_warm` read whole rounds of the draws, so its next one is the first again.
            expected = data.reader.batch(next(data.batches(method.order)), LENGTH).fields.numpy()
        if name != "memcpy" and not np.array_equal(np.stack(windows), expected):
            raise UserError(
                f"{name}: its first windows differ from the windows of the shards in {data.reader.folder}; "
                "give the --well folder that these shards were made from"
            )


def _measure(methods: Mapping[str, Method], seconds: float) -> dict[str, list[float]]:
    """Return the windows per second of each method in each round; the methods take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in methods}
    with progress_bar(total=ROUNDS * len(methods), desc="bench", unit="turn") as bar:
        for _ in range(ROUNDS):
            for name, method in methods.items():
                bar.set_postfix_str(name)
                rounds[name].append(_speed(method, seconds / ROUNDS))
                bar.update()
    return rounds


def _speed(method: Method, seconds: float) -> float:
    for _ in range(method.warm_up):
        next(method.batches)
    windows, start = 0, time.perf_counter()
    while True:
        windows += len(next(method.batches))
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return windows / elapsed


def _streaming_cold(data: BenchData, url: str, shuffle: str, seconds: float) -> dict[str, float]:
    """Return speed and traffic of the first windows of a training with an empty cache, each time; all windows at most.

    Their number is fixed before, so that nothing is fetched ahead that is not used. `seconds` only sets that number.
    """
    draws = max(1, min(int(_COLD_DRAWS_PER_S * seconds), len(data.reader.index(LENGTH)) // BATCH))
    speeds = []
    for _ in range(_COLD_ROUNDS):
        with tempfile.TemporaryDirectory(prefix="wavelit-bench-") as cache:
            reader = remote_reader(data, url, shuffle, Path(cache))
            readers, division = {reader.dataset: reader}, Division(data.schedule(shuffle))
            start = time.perf_counter()
            for _ in scheduled_batches(readers, division, LENGTH, 0, draws):
                pass
            speeds.append(BATCH * draws / (time.perf_counter() - start))
    return {"windows_per_s": statistics.median(speeds), "windows": BATCH * draws, **asdict(reader.traffic)}


def _figures(
    data: BenchData, rounds: Mapping[str, Sequence[float]], cold: Mapping[str, dict[str, float]], needed: float
) -> dict[str, Any]:
    """Return the content of the JSON; None where a method was not measured."""
    speeds: dict[str, float | None] = dict.fromkeys(KEYS)
    speeds |= {name: statistics.median(values) for name, values in rounds.items()}
    speeds |= {f"streaming_cold_{shuffle}": one["windows_per_s"] for shuffle, one in cold.items()}

    manifest = data.reader.manifest
    return {
        "windows_per_s": speeds,
        "spread": {name: [min(values), max(values)] for name, values in rounds.items()},
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


def verdict(speeds: Mapping[str, float | None], needed: float) -> str:
    """Return whether reading or computing limits a training that takes `needed` windows/s, by the fastest loader."""
    found = {name: value for name, value in speeds.items() if name.startswith("loader_") and value}
    name = max(found, key=lambda name: found[name])
    times = found[name] / needed
    workers = f"data.workers={name.removeprefix('loader_')}"
    figures = f"{found[name]:.0f} windows/s with {workers}, {times:.3g} times the {needed:.3g} that training takes"
    if times < 1:
        return f"IO limits: {figures}. Use more workers, float16 shards or a faster disk."
    margin = "" if times >= 2 else " There is little to spare: several processes on this machine share it."
    return f"compute limits: {figures}.{margin}"


def _machine(load: float) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), model)
    return {"cpu": model, "cores": available_cores(), "load_before": load, "load_after": os.getloadavg()[0]}


def _table(figures: Mapping[str, Any], methods: Mapping[str, Method]) -> str:
    """Return the figures for people: the methods in the order of their speed, those left out below."""
    data, machine = figures["data"], figures["machine"]
    speeds = figures["windows_per_s"]
    lines = [
        f"{data['dataset']}: {data['grid'][0]}x{data['grid'][1]}, {data['channels']} channels, {data['dtype']}, "
        f"{data['shard_bytes'] / 1e6:.0f} MB of shards; a window of {LENGTH} frames has {data['window_bytes']} bytes",
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']:.1f} before, "
        f"{machine['load_after']:.1f} after; page cache warm, medians of {ROUNDS} rounds in turn",
        f"{'':<13}{'windows/s':>10}  {'spread':<17}{'MB/s':>7}{'/ indexed':>11}",
    ]
    for name in sorted(figures["spread"], key=lambda name: -speeds[name]):
        speed, (low, high) = speeds[name], figures["spread"][name]
        lines.append(
            f"{name:<13}{speed:>10.0f}  {f'{low:.0f} - {high:.0f}':<17}{speed * data['window_bytes'] / 1e6:>7.0f}"
            f"{speed / speeds['indexed']:>11.3f}  {methods[name].about}"
        )
    for shuffle, one in figures["streaming_cold"].items():
        lines.append(
            f"streaming, cold, {shuffle}: {one['windows_per_s']:.0f} windows/s from a loopback server; "
            f"{one['windows']} windows, {one['requests']} requests, "
            f"{one['bytes_fetched'] / one['bytes_used']:.2f} bytes fetched per byte used"
        )
    left_out = [name for name in KEYS if speeds[name] is None]
    if left_out:
        lines.append(f"not measured: {', '.join(left_out)} (see --well, --synthetic and README)")
    needed = figures["needed_windows_per_s"]
    origin = "the paper's 1M steps of batch 4 in 41 h" if needed == PAPER_WINDOWS_PER_S else "--windows-per-s"
    lines.append(
        f"verdict: {figures['verdict']}\n"
        f"({needed:.3g} windows/s: {origin}. For your model give TensorBoard's throughput/samples_per_s as "
        "--windows-per-s, from a run that did not wait for data.)"
    )
    return "\n".join(lines)
