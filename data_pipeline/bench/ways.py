"""The ways to read windows that `bench` compares, on the same windows of one dataset."""

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from the_well.data import WellDataset

from data_pipeline.cards.card import Card
from data_pipeline.well.hdf5 import WellFile
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import AHEAD, open_readers, scheduled_batches, sources
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Schedule
from data_pipeline.windows.streaming import StreamSettings

BATCH = 4  # the paper's
LENGTH = 2  # frames of a 1 -> 1 window
WORKERS = (0, 1, 2)
MEMCPY_BYTES = 2**30  # at most, of the array that stands for the data set
_DRAWS = 512  # batches that the ways go through, again and again: 2048 windows
_COLD_DRAWS_PER_S, _COLD_ROUNDS = 16, 3

Read = Callable[[], Any]  # reads and returns the next windows, a sequence


@dataclass(frozen=True)
class Way:
    """One way to read windows."""

    what: str  # one line for the table
    read: Read
    settle: int = 1  # reads before each round's clock starts: a loader hands out what it had read before
    array: Callable[[Any], np.ndarray] = np.asarray  # a window as (T, C, H, W), to compare it
    order: str = "global"  # of the windows: the schedule's shuffle, or "file"


@dataclass(frozen=True)
class Data:
    """What is read: the train shards of one dataset, the HDF5 files behind them if given, and an order of windows."""

    reader: ShardReader
    files: tuple[Path, ...]  # empty without a Well folder
    card: Card | None

    def schedule(self, shuffle: str = "global") -> Schedule:
        """Which windows are read when, as in a training on this dataset alone."""
        return Schedule(sources({self.reader.dataset: self.reader}, LENGTH), BATCH, seed=0, shuffle=shuffle)

    @property
    def root(self) -> Path:
        """The folder of all shards."""
        assert isinstance(self.reader.folder, Path)
        return self.reader.folder.parents[1]

    @property
    def window_bytes(self) -> int:
        """Bytes of one window as delivered, float32."""
        return 4 * LENGTH * math.prod(self.reader.manifest.frame_shape)

    def batches(self, shuffle: str = "global") -> Iterator[np.ndarray]:
        """Window ids (4,) of draw after draw, without end."""
        schedule = self.schedule(shuffle)
        return itertools.cycle([schedule.draw(index).windows for index in range(_DRAWS)])

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """The same windows as (trajectory, first frame)."""
        index = self.reader.index(LENGTH)
        for windows in self.batches():
            trajectories, firsts = index.locate(windows)
            yield list(zip(trajectories.tolist(), firsts.tolist(), strict=True))


def all_ways(data: Data, url: str, stack: ExitStack) -> dict[str, Way]:
    """Every way that this data allows, by its key in the JSON; what they open is closed with `stack`."""
    ways = {
        "memcpy": Way("copies of as many bytes, between arrays in memory", _memcpy(data)),
        "indexed": Way("ShardReader.batch on memory-mapped shards", _indexed(data.reader, data)),
        "streaming_warm": _streaming_warm(data, url, stack),
    }
    for workers in WORKERS:
        # What is ready when a round begins was read while the other ways had their turn.
        settle = AHEAD * workers + 1
        ways[f"loader_{workers}"] = Way(
            f"the loader of training, data.workers={workers}", _loader(data, workers), settle
        )
    if data.files:
        ways["h5py"] = Way("HDF5 files kept open, not collated", _h5py(data, stack))
        ways["welldataset"] = Way("the_well, not collated", _welldataset(data), array=_well_window)
    if data.reader.manifest.frames_per_chunk >= LENGTH:
        ways["webdataset"] = Way(
            "stock webdataset, sequential, chunks cut into windows", _webdataset(data), order="file"
        )
    return ways


def _memcpy(data: Data) -> Read:
    """Window by window from an array as large as the data set into a batch that is used again and again.

    The source is in memory and spread like the shards; the target is warm, which no reader that hands over fresh
    batches can have: an upper bound.
    """
    manifest = data.reader.manifest
    frames = max(LENGTH, min(manifest.num_frames, MEMCPY_BYTES // (data.window_bytes // LENGTH)))
    source = np.ones((frames, *manifest.frame_shape), np.float32)
    target = np.zeros((BATCH, LENGTH, *manifest.frame_shape), np.float32)
    before = np.cumsum([0, *(one.frames for one in manifest.trajectories)]).tolist()
    places = data.places()

    def read() -> np.ndarray:
        for window, (trajectory, first) in enumerate(next(places)):
            at = (before[trajectory] + first) % (frames - LENGTH + 1)
            np.copyto(target[window], source[at : at + LENGTH])
        return target

    return read


def _indexed(reader: ShardReader, data: Data, shuffle: str = "global") -> Read:
    batches = data.batches(shuffle)
    return lambda: reader.batch(next(batches), LENGTH).fields


def _loader(data: Data, workers: int) -> Read:
    readers = {data.reader.dataset: data.reader}
    batches = scheduled_batches(readers, Division(data.schedule()), LENGTH, 0, 2**40, workers)
    return lambda: next(batches).fields


def _streaming_warm(data: Data, url: str, stack: ExitStack) -> Way:
    """Whole shards in the cache, all there before the clock starts."""
    cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="wavelit-bench-"))
    read = _indexed(_remote(data, url, "blocks", Path(cache)), data, "blocks")
    for _ in range(_DRAWS):
        read()
    return Way("shards behind a URL, whole in the cache (shuffle: blocks)", read, order="blocks")


def _remote(data: Data, url: str, shuffle: str, cache: Path) -> ShardReader:
    name = data.reader.dataset
    num_bytes = sum(shard.bytes for shard in data.reader.manifest.shards)
    settings = StreamSettings(shuffle, cache=cache, cache_bytes=2 * num_bytes + 2**30)
    return open_readers(url, [name], "train", stream=settings)[name]


def _h5py(data: Data, stack: ExitStack) -> Read:
    assert data.card is not None
    files = [stack.enter_context(WellFile(path, data.card)) for path in data.files]
    records, places = data.reader.manifest.trajectories, data.places()

    def read() -> list[np.ndarray]:
        found = [(records[trajectory], first) for trajectory, first in next(places)]
        return [files[one.source].read(one.source_index, first, first + LENGTH) for one, first in found]

    return read


def _welldataset(data: Data) -> Read:
    """With the least work it can be asked for: no normalisation, no grid, no boundaries; samples stay channel-last."""
    folder, records, places = data.files[0].parent, data.reader.manifest.trajectories, data.places()
    theirs = WellDataset(
        path=str(folder), n_steps_input=1, n_steps_output=1, return_grid=False, boundary_return_type=None
    )

    def read() -> list[Any]:
        samples = []
        for trajectory, first in next(places):
            record = records[trajectory]
            start = max(theirs.file_index_offsets[record.source], 0)  # the first is -1
            samples.append(theirs[start + record.source_index * (record.frames - 1) + first])
        return samples

    return read


def _well_window(sample: Mapping[str, Any]) -> np.ndarray:
    frames = np.concatenate([sample["input_fields"], sample["output_fields"]])  # (T, H, W, C)
    return np.moveaxis(frames, -1, 1)


def _webdataset(data: Data) -> Read:
    """Each chunk of T frames gives T - 1 windows in batches; the windows across two chunks are not made."""
    urls = [f"{data.reader.folder}/{shard.name}" for shard in data.reader.manifest.shards]
    passes = itertools.repeat(urls)

    def batches() -> Iterator[np.ndarray]:
        for shards in passes:
            for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
                frames = sample["fields.npy"]
                for first in range(0, len(frames) - LENGTH + 1, BATCH):
                    starts = range(first, min(first + BATCH, len(frames) - LENGTH + 1))
                    yield np.stack([frames[start : start + LENGTH] for start in starts])

    return partial(next, batches())


def streaming_cold(data: Data, url: str, shuffle: str, seconds: float) -> dict[str, float]:
    """Speed and traffic of the first windows of a training with an empty cache, each time; all windows at most.

    How many is fixed beforehand, so that nothing is fetched ahead that is not used. `seconds` only sets how many.
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
