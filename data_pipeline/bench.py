"""How fast windows are read, compared with memcpy, the_well, h5py and webdataset, and whether IO limits training.

All methods read 1 -> 1 windows (two frames) of one dataset's train split on one machine, in turn, round after round, so
that other load slows all of them alike. Figures are medians over the rounds. Before that, the first windows
of every method are compared with the windows of ShardReader, so that no method is timed on wrong data.
"""

import itertools
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import webdataset
from the_well.data import WellDataset
from tqdm import tqdm

from data_pipeline.files import UserError, write_whole
from data_pipeline.registry import Card, Registry, load_registry
from data_pipeline.remote import is_url
from data_pipeline.shards.build import build_shards
from data_pipeline.well.hdf5 import WellFile, dataset_folders, split_files
from data_pipeline.well.layout import edge
from data_pipeline.well.register import register
from data_pipeline.well.write import write_well_file
from data_pipeline.windows.loader import PREFETCH_FACTOR, open_readers, scheduled_batches, sources
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Division, Schedule
from data_pipeline.windows.streaming import StreamSettings
from data_pipeline.workers import available_cores

BATCH = 4  # windows, as in the paper
LENGTH = 2  # frames of a 1 -> 1 window
PAPER_WINDOWS_PER_S = 1_000_000 * BATCH / (41 * 3600)  # WaveLiT-FM: 1M steps of batch 4 in 41 hours
ROUNDS = 5
WORKERS = (0, 1, 2)
KEYS = ("memcpy", "indexed", "streaming_warm", "welldataset", "h5py", "webdataset")  # always in the JSON
RATIOS = (("indexed", "welldataset"), ("indexed", "memcpy"), ("streaming_warm", "indexed"))
SYNTHETIC_BYTES = 200e6
MEMCPY_BYTES = 2**30  # at most, of the array that stands for the data set
_DRAWS = 512  # batches that the methods go through, again and again: 2048 windows
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
            data = _synthetic_data(folder, str(synthetic))
        else:
            data = _stored_data(shards, well, datasets, registry)
        url = stack.enter_context(_served(data.root))
        methods = _methods(data, url, stack)
        _check(data, methods)
        load = os.getloadavg()[0]
        rounds = _measure(methods, seconds)
        cold = {shuffle: _streaming_cold(data, url, shuffle, seconds) for shuffle in ("blocks", "global")}
        figures = _figures(data, rounds, cold, windows_per_s) | {"machine": _machine(load)}
    if json_file is not None:
        write_whole(json_file, json.dumps(figures, indent=1).encode() + b"\n")
    return _table(figures, methods)


@dataclass(frozen=True)
class _Data:
    """What is read: the train shards of one dataset, and the HDF5 files behind them if given."""

    reader: ShardReader
    files: tuple[Path, ...] = ()
    card: Card | None = None

    @property
    def root(self) -> Path:
        """The folder of all shards."""
        assert isinstance(self.reader.folder, Path)
        return self.reader.folder.parents[1]

    @property
    def window_bytes(self) -> int:
        """Bytes of one window as delivered, float32."""
        return 4 * LENGTH * math.prod(self.reader.manifest.frame_shape)

    def schedule(self, shuffle: str = "global") -> Schedule:
        """Return the order of the windows in a training on this dataset alone."""
        return Schedule(sources({self.reader.dataset: self.reader}, LENGTH), BATCH, seed=0, shuffle=shuffle)

    def batches(self, shuffle: str = "global") -> Iterator[np.ndarray]:
        """Yield window ids (BATCH,), without end."""
        schedule = self.schedule(shuffle)
        return itertools.cycle([schedule.draw(index).windows for index in range(_DRAWS)])

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the same windows as (trajectory, first frame)."""
        index = self.reader.index(LENGTH)
        for windows in self.batches():
            trajectories, firsts = index.locate(windows)
            yield list(zip(trajectories.tolist(), firsts.tolist(), strict=True))


def _stored_data(shards: Path, well: Path | None, datasets: Sequence[str] | None, registry: Registry | None) -> _Data:
    if datasets is not None and len(datasets) != 1:
        raise UserError(f"--datasets: expected one dataset at a time, got {', '.join(datasets) or 'none'}")
    if is_url(shards):
        raise UserError(f"{shards}: expected a local folder of shards; streaming is measured on a server of our own")
    readers = open_readers(shards, datasets, "train")
    name = max(readers, key=lambda name: readers[name].manifest.frame_bytes)
    if well is None:
        return _Data(readers[name])
    folders = dataset_folders(well)
    if name not in folders:
        raise UserError(f"{well}: expected {name}/data/train/*.hdf5, got {', '.join(folders) or 'no dataset'}")
    files = tuple(split_files(folders[name], "train"))
    expected = [(source.name, source.bytes) for source in readers[name].manifest.sources]
    if [(file.name, file.stat().st_size) for file in files] != expected:
        listed = ", ".join(f"{name} ({num_bytes} bytes)" for name, num_bytes in expected)
        raise UserError(
            f"{folders[name] / 'data' / 'train'}: expected the files that the shards were made from, {listed}; "
            "give the Well folder of these shards"
        )
    return _Data(readers[name], files, (registry or load_registry()).card(name))


def _synthetic_data(folder: Path, shape: str) -> _Data:
    """Write noise in the Well's layout, a few trajectories of scalar fields, and make shards of it."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,3})", shape)
    height, width, channels = map(int, match.groups()) if match else (0, 0, 0)
    even = min(height, width) >= 2 and height % 2 == width % 2 == 0
    if not even or channels < 1 or 4 * height * width * channels > SYNTHETIC_BYTES / 16:
        raise UserError(
            f"--synthetic: expected HxWxC such as 256x256x3, even sizes, at most {SYNTHETIC_BYTES / 16e6:.1f} MB a "
            f"frame, got {shape!r}"
        )
    name, names = "synthetic", [f"field_{number}" for number in range(channels)]
    trajectories = 4
    frames = int(min(256, SYNTHETIC_BYTES / trajectories / (4 * height * width * channels)))
    rng = np.random.default_rng(0)
    arrays = {field: rng.standard_normal((trajectories, frames, height, width), np.float32) for field in names}
    boundaries = (edge("x_periodic", "PERIODIC", "x", height), edge("y_periodic", "PERIODIC", "y", width))
    axes = (np.arange(frames) * 0.1, np.linspace(0, 1, height), np.linspace(0, 1, width))
    path = folder / "well" / name / "data/train" / f"{name}.hdf5"
    write_well_file(path, name, axes, arrays, boundaries=boundaries)
    register(folder / "well" / name, name, folder / "cards", load_registry())
    registry = load_registry(folder / "cards")
    build_shards(folder / "well", folder / "shards", jobs=1, registry=registry)
    return _Data(ShardReader(folder / "shards", name, "train"), (path,), registry.card(name))


@dataclass(frozen=True)
class _Method:
    """One way to read windows."""

    about: str  # one line for the table
    batches: Iterator[Any]  # without end; a batch is a sequence of windows
    warm_up: int = 1  # batches before each round's clock starts: a loader returns what it had read before
    array: Callable[[Any], np.ndarray] = np.asarray  # make (T, C, H, W) of a window, to compare it
    order: str = "global"  # of the windows: the schedule's shuffle, or "file"


def _methods(data: _Data, url: str, stack: ExitStack) -> dict[str, _Method]:
    """Return every method that this data allows, by its key in the JSON; `stack` closes what they open."""
    reader = data.reader
    methods = {
        "memcpy": _Method("copies of as many bytes, between arrays in memory", _memcpy(data)),
        "indexed": _Method("ShardReader.batch on memory-mapped shards", _indexed(reader, data)),
        "streaming_warm": _streaming_warm(data, url, stack),
    }
    for workers in WORKERS:
        # The batches that are ready when a round begins were read during the turns of the other methods.
        read = scheduled_batches({reader.dataset: reader}, Division(data.schedule()), LENGTH, 0, 2**40, workers)
        about, warm_up = f"the loader of training, data.workers={workers}", PREFETCH_FACTOR * workers + 1
        methods[f"loader_{workers}"] = _Method(about, (batch.fields for batch in read), warm_up)
    if data.files:
        methods["h5py"] = _Method("HDF5 files kept open, not collated", _h5py(data, stack))
        methods["welldataset"] = _Method("the_well, not collated", _welldataset(data), array=_well_window)
    if reader.manifest.frames_per_chunk >= LENGTH:
        about = "stock webdataset, sequential, chunks cut into windows"
        methods["webdataset"] = _Method(about, _webdataset(data), order="file")
    return methods


def _memcpy(data: _Data) -> Iterator[np.ndarray]:
    """Copy window by window from an array as large as the data set into a batch that is used again and again.

    The source is in memory and spread like the shards. The target stays in the cache, which no reader that returns
    fresh batches can have: an upper bound.
    """
    manifest = data.reader.manifest
    frames = max(LENGTH, min(manifest.num_frames, MEMCPY_BYTES // (data.window_bytes // LENGTH)))
    source = np.ones((frames, *manifest.frame_shape), np.float32)
    target = np.zeros((BATCH, LENGTH, *manifest.frame_shape), np.float32)
    before = np.cumsum([0, *(one.frames for one in manifest.trajectories)]).tolist()
    for places in data.places():
        for window, (trajectory, first) in enumerate(places):
            at = (before[trajectory] + first) % (frames - LENGTH + 1)
            np.copyto(target[window], source[at : at + LENGTH])
        yield target


def _indexed(reader: ShardReader, data: _Data, shuffle: str = "global") -> Iterator[torch.Tensor]:
    return (reader.batch(windows, LENGTH).fields for windows in data.batches(shuffle))


def _streaming_warm(data: _Data, url: str, stack: ExitStack) -> _Method:
    """Read all windows once, so that whole shards are in the cache before the clock starts."""
    cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="wavelit-bench-"))
    batches = _indexed(_remote(data, url, "blocks", Path(cache)), data, "blocks")
    for _ in range(_DRAWS):
        next(batches)
    return _Method("shards behind a URL, whole in the cache (shuffle: blocks)", batches, order="blocks")


def _remote(data: _Data, url: str, shuffle: str, cache: Path) -> ShardReader:
    name = data.reader.dataset
    num_bytes = sum(shard.bytes for shard in data.reader.manifest.shards)
    settings = StreamSettings(shuffle, cache=cache, cache_bytes=2 * num_bytes + 2**30)
    return open_readers(url, [name], "train", stream=settings)[name]


def _h5py(data: _Data, stack: ExitStack) -> Iterator[list[np.ndarray]]:
    assert data.card is not None
    files = [stack.enter_context(WellFile(path, data.card)) for path in data.files]
    for places in data.places():
        found = [(data.reader.manifest.trajectories[trajectory], first) for trajectory, first in places]
        yield [files[one.source].read(one.source_index, first, first + LENGTH) for one, first in found]


def _welldataset(data: _Data) -> Iterator[list[Any]]:
    """Read with as little work as it allows: no normalization, no grid, no boundaries; samples stay channel-last."""
    folder = str(data.files[0].parent)
    theirs = WellDataset(path=folder, n_steps_input=1, n_steps_output=1, return_grid=False, boundary_return_type=None)
    for places in data.places():
        samples = []
        for trajectory, first in places:
            one = data.reader.manifest.trajectories[trajectory]
            start = max(theirs.file_index_offsets[one.source], 0)  # the first is -1
            samples.append(theirs[start + one.source_index * (one.frames - 1) + first])
        yield samples


def _well_window(sample: Mapping[str, Any]) -> np.ndarray:
    frames = np.concatenate([sample["input_fields"], sample["output_fields"]])  # (T, H, W, C)
    return np.moveaxis(frames, -1, 1)


def _webdataset(data: _Data) -> Iterator[np.ndarray]:
    """Cut each chunk of T frames into T - 1 windows, in batches; the windows across two chunks are not made."""
    urls = [f"{data.reader.folder}/{shard.name}" for shard in data.reader.manifest.shards]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            frames = sample["fields.npy"]
            for first in range(0, len(frames) - LENGTH + 1, BATCH):
                starts = range(first, min(first + BATCH, len(frames) - LENGTH + 1))
                yield np.stack([frames[start : start + LENGTH] for start in starts])


def _check(data: _Data, methods: Mapping[str, _Method]) -> None:
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


def _measure(methods: Mapping[str, _Method], seconds: float) -> dict[str, list[float]]:
    """Return the windows per second of each method in each round; the methods take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in methods}
    with tqdm(total=ROUNDS * len(methods), desc="bench", unit="turn", disable=None) as bar:
        for _ in range(ROUNDS):
            for name, method in methods.items():
                bar.set_postfix_str(name)
                rounds[name].append(_speed(method, seconds / ROUNDS))
                bar.update()
    return rounds


def _speed(method: _Method, seconds: float) -> float:
    for _ in range(method.warm_up):
        next(method.batches)
    windows, start = 0, time.perf_counter()
    while True:
        windows += len(next(method.batches))
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return windows / elapsed


def _streaming_cold(data: _Data, url: str, shuffle: str, seconds: float) -> dict[str, float]:
    """Return speed and traffic of the first windows of a training with an empty cache, each time; all windows at most.

    Their number is fixed before, so that nothing is fetched ahead that is not used. `seconds` only sets that number.
    """
    draws = max(1, min(int(_COLD_DRAWS_PER_S * seconds), len(data.reader.index(LENGTH)) // BATCH))
    speeds = []
    for _ in range(_COLD_ROUNDS):
        with tempfile.TemporaryDirectory(prefix="wavelit-bench-") as cache:
            reader = _remote(data, url, shuffle, Path(cache))
            readers, division = {reader.dataset: reader}, Division(data.schedule(shuffle))
            start = time.perf_counter()
            for _ in scheduled_batches(readers, division, LENGTH, 0, draws):
                pass
            speeds.append(BATCH * draws / (time.perf_counter() - start))
    traffic = reader.traffic
    return {
        "windows_per_s": statistics.median(speeds),
        "windows": BATCH * draws,
        "requests": traffic.requests,
        "bytes_fetched": traffic.bytes_fetched,
        "bytes_used": traffic.bytes_used,
        "fetched_per_used": traffic.bytes_fetched / traffic.bytes_used,
    }


def _figures(
    data: _Data, rounds: Mapping[str, Sequence[float]], cold: Mapping[str, dict[str, float]], needed: float
) -> dict[str, Any]:
    """Return the content of the JSON; None where a method was not measured."""
    speeds: dict[str, float | None] = dict.fromkeys(KEYS)
    speeds |= {name: statistics.median(values) for name, values in rounds.items()}
    speeds |= {f"streaming_cold_{shuffle}": one["windows_per_s"] for shuffle, one in cold.items()}

    def ratio(above: str, below: str, times: int = 1) -> float | None:
        one, other = speeds[above], speeds[below]
        return one / other / times if one is not None and other is not None else None

    ratios = {f"{above}_over_{below}": ratio(above, below) for above, below in RATIOS}
    for workers in WORKERS:
        ratios[f"loader_{workers}_over_indexed_x_workers"] = ratio(f"loader_{workers}", "indexed", max(workers, 1))
    manifest = data.reader.manifest
    return {
        "windows_per_s": speeds,
        "spread": {name: [min(values), max(values)] for name, values in rounds.items()},
        "mb_per_s": {name: value and value * data.window_bytes / 1e6 for name, value in speeds.items()},
        "ratios": ratios,
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
    return {
        "cpu": model,
        "cores": available_cores(),
        "system": platform.system(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }


def _table(figures: Mapping[str, Any], methods: Mapping[str, _Method]) -> str:
    """Return the figures for people: the methods in the order of their speed, those left out below."""
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
            f"{speeds[name] / indexed:>11.3f}  {methods[name].about}"
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


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Give the URL of a folder that a process serves, with byte ranges, on this machine alone."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(folder, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a process that ends before it serves is an EOFError below, not a wait for ever
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, ready: Connection) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_RangeHandler, directory=str(folder))) as server:
        ready.send(server.server_address[1])
        server.serve_forever()


class _RangeHandler(SimpleHTTPRequestHandler):
    """Answers with byte ranges, which the standard library's handler does not serve."""

    protocol_version = "HTTP/1.1"

    def do_GET(self, with_body: bool = True) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size, match = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, stop = (int(match[1]), min(int(match[2] or size) + 1, size)) if match else (0, size)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(stop - first))
        self.send_header("Accept-Ranges", "bytes")
        if match:
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        self.end_headers()
        if with_body and stop > first:
            with path.open("rb") as file:
                self.connection.sendfile(file, first, stop - first)

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
