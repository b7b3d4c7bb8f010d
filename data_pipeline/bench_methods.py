"""The ways to read windows that `data-pipeline bench` compares, and the data that they read.

All of them read 1 -> 1 windows (two frames) of one dataset's train split.
"""

import itertools
import math
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from aiohttp import web
from the_well.data import WellDataset

from data_pipeline.errors import UserError
from data_pipeline.registry import Card, Registry, load_registry
from data_pipeline.remote import is_url
from data_pipeline.shards.build import build_shards
from data_pipeline.well.hdf5 import WellFile, dataset_folders, split_files
from data_pipeline.well.layout import edge
from data_pipeline.well.register import register
from data_pipeline.well.write import write_well_file
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import PREFETCH_FACTOR, open_readers, scheduled_batches, sources
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Schedule
from data_pipeline.windows.streaming import StreamSettings

BATCH = 4  # windows, as in the paper
LENGTH = 2  # frames of a 1 -> 1 window
WORKERS = (0, 1, 2)
SYNTHETIC_BYTES = 200e6
MEMCPY_BYTES = 2**30  # at most, of the array that stands for the data set
NUM_DRAWS = 512  # batches that the methods go through, again and again: 2048 windows


@dataclass(frozen=True)
class BenchData:
    """What is read: the train shards of one dataset, and the HDF5 files behind them if given."""

    reader: ShardReader
    files: tuple[Path, ...] = ()
    card: Card | None = None

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
        return itertools.cycle([schedule.draw(index).windows for index in range(NUM_DRAWS)])

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the same windows as (trajectory, first frame)."""
        index = self.reader.index(LENGTH)
        for windows in self.batches():
            trajectories, firsts = index.locate(windows)
            yield list(zip(trajectories.tolist(), firsts.tolist(), strict=True))


def stored_data(
    shards: Path, well: Path | None, datasets: Sequence[str] | None, registry: Registry | None
) -> BenchData:
    """Return the shards of one dataset and, with `well`, the HDF5 files that they were made from."""
    if datasets is not None and len(datasets) != 1:
        raise UserError(f"--datasets: expected one dataset at a time, got {', '.join(datasets) or 'none'}")
    if is_url(shards):
        raise UserError(f"{shards}: expected a local folder of shards; streaming is measured on a server of our own")
    readers = open_readers(shards, datasets, "train")
    name = max(readers, key=lambda name: readers[name].manifest.frame_bytes)
    if well is None:
        return BenchData(readers[name])
    folders = dataset_folders(well)
    if name not in folders:
        raise UserError(f"{well}: expected {name}/data/train/*.hdf5, got {', '.join(folders) or 'no dataset'}")
    files = tuple(Path(str(file)) for file in split_files(folders[name], "train"))
    expected = [(source.name, source.bytes) for source in readers[name].manifest.sources]
    if [(file.name, file.stat().st_size) for file in files] != expected:
        listed = ", ".join(f"{name} ({num_bytes} bytes)" for name, num_bytes in expected)
        raise UserError(
            f"{folders[name]}/data/train: expected the files that the shards were made from, {listed}; "
            "give the Well folder of these shards"
        )
    return BenchData(readers[name], files, (registry or load_registry()).card(name))


def synthetic_data(folder: Path, shape: str) -> BenchData:
    """Write noise in the Well's layout, a few trajectories of scalar fields, and make shards of it."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,3})", shape)
    height, width, channels = map(int, match.groups()) if match else (0, 0, 0)
    even = min(height, width) >= 2 and height % 2 == width % 2 == 0
    if not even or channels < 1 or 4 * height * width * channels > SYNTHETIC_BYTES / 16:
        raise UserError(
            f"--synthetic: expected HxWxC such as 256x256x3, even sizes, at most {SYNTHETIC_BYTES / 16e6:.1f} MB a "
            f"frame, got {shape!r}"
        )
    name, trajectories = "synthetic", 4
    frames = int(min(256, SYNTHETIC_BYTES / trajectories / (4 * height * width * channels)))
    rng, shape_of_field = np.random.default_rng(0), (trajectories, frames, height, width)
    arrays = {f"field_{number}": rng.standard_normal(shape_of_field, np.float32) for number in range(channels)}
    boundaries = (edge("x_periodic", "PERIODIC", "x", height), edge("y_periodic", "PERIODIC", "y", width))
    axes = (np.arange(frames) * 0.1, np.linspace(0, 1, height), np.linspace(0, 1, width))
    path = folder / "well" / name / "data/train" / f"{name}.hdf5"
    write_well_file(path, name, axes, arrays, boundaries=boundaries)
    register(folder / "well" / name, name, folder / "cards")
    registry = load_registry(folder / "cards")
    build_shards(folder / "well", folder / "shards", jobs=1, registry=registry)
    return BenchData(ShardReader(folder / "shards", name, "train"), (path,), registry.card(name))


@dataclass(frozen=True)
class Method:
    """One way to read windows."""

    about: str  # one line for the table
    batches: Iterator[Any]  # without end; a batch is a sequence of windows
    warm_up: int = 1  # batches before each round's clock starts: a loader returns what it had read before
    array: Callable[[Any], np.ndarray] = np.asarray  # make (T, C, H, W) of a window, to compare it
    order: str = "global"  # of the windows: the schedule's shuffle, or "file"


def all_methods(data: BenchData, url: str, stack: ExitStack) -> dict[str, Method]:
    """Return every method that this data allows, by its key in the JSON; `stack` closes what they open."""
    reader = data.reader
    methods = {
        "memcpy": Method("copies of as many bytes, between arrays in memory", _memcpy(data)),
        "indexed": Method("ShardReader.batch on memory-mapped shards", _indexed(reader, data)),
        "streaming_warm": _streaming_warm(data, url, stack),
    }
    for workers in WORKERS:
        # The batches that are ready when a round begins were read during the turns of the other methods.
        read = scheduled_batches({reader.dataset: reader}, Division(data.schedule()), LENGTH, 0, 2**40, workers)
        about, warm_up = f"the loader of training, data.workers={workers}", PREFETCH_FACTOR * workers + 1
        methods[f"loader_{workers}"] = Method(about, (batch.fields for batch in read), warm_up)
    if data.files:
        methods["h5py"] = Method("HDF5 files kept open, not collated", _h5py(data, stack))
        methods["welldataset"] = Method("the_well, not collated", _welldataset(data), array=_well_window)
    if reader.manifest.frames_per_chunk >= LENGTH:
        about = "stock webdataset, sequential, chunks cut into windows"
        methods["webdataset"] = Method(about, _webdataset(data), order="file")
    return methods


def _memcpy(data: BenchData) -> Iterator[np.ndarray]:
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


def _indexed(reader: ShardReader, data: BenchData, shuffle: str = "global") -> Iterator[torch.Tensor]:
    return (reader.batch(windows, LENGTH).fields for windows in data.batches(shuffle))


def _streaming_warm(data: BenchData, url: str, stack: ExitStack) -> Method:
    """Read all windows once, so that whole shards are in the cache before the clock starts."""
    cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="wavelit-bench-"))
    batches = _indexed(remote_reader(data, url, "blocks", Path(cache)), data, "blocks")
    for _ in range(NUM_DRAWS):
        next(batches)
    return Method("shards behind a URL, whole in the cache (shuffle: blocks)", batches, order="blocks")


def remote_reader(data: BenchData, url: str, shuffle: str, cache: Path) -> ShardReader:
    """Return a reader of the same shards behind a URL."""
    name = data.reader.dataset
    num_bytes = sum(shard.bytes for shard in data.reader.manifest.shards)
    settings = StreamSettings(shuffle, cache=cache, cache_bytes=2 * num_bytes + 2**30)
    return open_readers(url, [name], "train", stream=settings)[name]


def _h5py(data: BenchData, stack: ExitStack) -> Iterator[list[np.ndarray]]:
    assert data.card is not None
    files = [stack.enter_context(WellFile(path, data.card)) for path in data.files]
    for places in data.places():
        found = [(data.reader.manifest.trajectories[trajectory], first) for trajectory, first in places]
        yield [files[one.source].read(one.source_index, first, first + LENGTH) for one, first in found]


def _welldataset(data: BenchData) -> Iterator[list[Any]]:
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


def _webdataset(data: BenchData) -> Iterator[np.ndarray]:
    """Cut each chunk of T frames into T - 1 windows, in batches; the windows across two chunks are not made."""
    urls = [f"{data.reader.folder}/{shard.name}" for shard in data.reader.manifest.shards]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            frames = sample["fields.npy"]
            for first in range(0, len(frames) - LENGTH + 1, BATCH):
                starts = range(first, min(first + BATCH, len(frames) - LENGTH + 1))
                yield np.stack([frames[start : start + LENGTH] for start in starts])


@contextmanager
def served(folder: Path) -> Iterator[str]:
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
    server = web.Application()
    server.router.add_static("/", folder)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ready.send(listening.getsockname()[1])
        web.run_app(server, sock=listening, print=None, access_log=None)
