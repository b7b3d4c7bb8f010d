"""How fast windows are read, beside memcpy, the_well, h5py and webdataset, and whether IO or compute limits training.

All ways read 1 -> 1 windows (two frames) of one dataset's train split on one machine in one run, in turn, round after
round, so that whatever else the machine does hits all alike; figures are medians over the rounds. Before that, every
way's first windows are compared with those of the indexed reader: a benchmark of wrong data would say nothing.
"""

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from data_pipeline.bench.loopback import served
from data_pipeline.bench.report import PAPER_WINDOWS_PER_S, ROUNDS, machine, report, table
from data_pipeline.bench.ways import LENGTH, Data, Way, all_ways, streaming_cold
from data_pipeline.cards.card import Card
from data_pipeline.cards.registry import Registry, load_registry
from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from data_pipeline.miniwell.system import ParameterSet, Simulation, System
from data_pipeline.miniwell.well_file import write_well_file
from data_pipeline.remote import is_url
from data_pipeline.shards.build import build_shards
from data_pipeline.well.boundary import edge
from data_pipeline.well.hdf5 import dataset_folders, split_files
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader

SYNTHETIC_BYTES = 200e6


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
    """Measures each way for `seconds` in all and returns a table with a verdict; `json_file` gets the figures.

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
        if synthetic is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wavelit-bench-")))
            data = _synthetic_data(folder, *_parse_shape(synthetic))
        else:
            assert shards is not None
            data = _stored_data(shards, well, datasets, registry)
        url = stack.enter_context(served(data.root))
        ways = all_ways(data, url, stack)
        _check(data, ways)
        load = os.getloadavg()[0]
        rounds = _measure(ways, seconds)
        cold = {shuffle: streaming_cold(data, url, shuffle, seconds) for shuffle in ("blocks", "global")}
        figures = report(data, rounds, cold, windows_per_s) | {"machine": machine(load)}
    if json_file is not None:
        with atomic_file(json_file) as file:
            file.write(json.dumps(figures, indent=1).encode() + b"\n")
    return table(figures, ways)


def _stored_data(shards: Path, well: Path | None, datasets: Sequence[str] | None, registry: Registry | None) -> Data:
    if datasets is not None and len(datasets) != 1:
        raise UserError(f"--datasets: expected one dataset at a time, got {', '.join(datasets) or 'none'}")
    if is_url(shards):
        raise UserError(f"{shards}: expected a local folder of shards; streaming is measured on a server of our own")
    readers = open_readers(shards, datasets, "train")
    name = max(readers, key=lambda name: readers[name].manifest.frame_bytes)
    if well is None:
        return Data(readers[name], (), None)
    folders = dataset_folders(well)
    if name not in folders:
        raise UserError(f"{well}: expected {name}/data/train/*.hdf5, got {', '.join(folders) or 'no dataset'}")
    return _with_files(readers[name], folders[name], (registry or load_registry()).card(name))


def _with_files(reader: ShardReader, folder: Path, card: Card) -> Data:
    files = tuple(split_files(folder, "train"))
    expected = [(source.name, source.bytes) for source in reader.manifest.sources]
    if [(file.name, file.stat().st_size) for file in files] != expected:
        listed = ", ".join(f"{name} ({num_bytes} bytes)" for name, num_bytes in expected)
        raise UserError(
            f"{folder / 'data' / 'train'}: expected the files that the shards were made from, {listed}; "
            "give the Well folder of these shards"
        )
    return Data(reader, files, card)


def _parse_shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,3})", text)
    height, width, channels = map(int, match.groups()) if match else (0, 0, 0)
    even = min(height, width) >= 2 and height % 2 == width % 2 == 0
    if not even or channels < 1 or 4 * height * width * channels > SYNTHETIC_BYTES / 16:
        raise UserError(
            f"--synthetic: expected HxWxC such as 256x256x3, even sizes, at most {SYNTHETIC_BYTES / 16e6:.1f} MB a "
            f"frame, got {text!r}"
        )
    return height, width, channels


def _synthetic_data(folder: Path, height: int, width: int, channels: int) -> Data:
    """Noise in the Well's layout, a few trajectories of scalar fields, and shards of it."""
    name, fields = "synthetic", tuple(f"field_{number}" for number in range(channels))
    trajectories = 4
    frames = int(min(256, SYNTHETIC_BYTES / trajectories / (4 * height * width * channels)))
    rng = np.random.default_rng(0)
    arrays = {field: rng.standard_normal((trajectories, frames, height, width), np.float32) for field in fields}
    boundaries = (edge("x_periodic", "PERIODIC", "x", height), edge("y_periodic", "PERIODIC", "y", width))
    axes = [np.linspace(0, 1, size) for size in (height, width)]
    simulation = Simulation(np.arange(frames) * 0.1, axes[0], axes[1], arrays, boundaries)
    parameters = ParameterSet("", {}, {"train": trajectories})
    system = System(name, dict.fromkeys(fields, 0), {}, lambda *_: simulation, 0)
    write_well_file(folder / "well" / name / "data/train" / f"{name}.hdf5", system, parameters, simulation, arrays)
    registry = _synthetic_registry(folder / "registry", name, fields, (height, width))
    build_shards(folder / "well", folder / "shards", jobs=1, registry=registry)
    reader = ShardReader(folder / "shards", name, "train")
    return _with_files(reader, folder / "well" / name, registry.card(name))


def _synthetic_registry(folder: Path, name: str, fields: Sequence[str], grid: tuple[int, int]) -> Registry:
    card = {
        "name": name,
        "description": "noise of the benchmark",
        "state": {"t0": {field: [field] for field in fields}},
        "boundary": {axis: ["PERIODIC", "PERIODIC"] for axis in ("x", "y")},
        "grid": list(grid),
        "dt": 0.1,
        "source": "data-pipeline bench",
    }
    channels = {field: {"description": "noise", "unit": "none"} for field in fields}
    (folder / "datasets").mkdir(parents=True)
    (folder / "channels.yaml").write_text(yaml.safe_dump(channels))
    (folder / "datasets" / f"{name}.yaml").write_text(yaml.safe_dump(card))
    return load_registry(folder)


def _check(data: Data, ways: Mapping[str, Way]) -> None:
    """Reads each way's first windows and compares them with the indexed reader's; float16 shards differ by rounding."""
    if data.reader.manifest.dtype != "float32":
        return
    for name, way in ways.items():
        windows = [way.array(window) for window in way.read()]
        if way.order == "file":
            expected = np.stack([data.reader.trajectory_frames(0, first, LENGTH) for first in range(len(windows))])
        else:
            # What `all_ways` read to warm up was whole rounds of the draws, so this is the first one again.
            expected = data.reader.batch(next(data.batches(way.order)), LENGTH).fields.numpy()
        if name != "memcpy" and not np.array_equal(np.stack(windows), expected):
            raise UserError(
                f"{name}: its first windows are not those of the shards in {data.reader.folder}; "
                "give the --well folder that these shards were made from"
            )


def _measure(ways: Mapping[str, Way], seconds: float) -> dict[str, list[float]]:
    """Windows per second of each way in each round; the ways take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=ROUNDS * len(ways), desc="bench", unit="turn", disable=None) as bar:
        for _ in range(ROUNDS):
            for name, way in ways.items():
                bar.set_postfix_str(name)
                rounds[name].append(_speed(way, seconds / ROUNDS))
                bar.update()
    return rounds


def _speed(way: Way, seconds: float) -> float:
    for _ in range(way.settle):
        way.read()
    windows, start = 0, time.perf_counter()
    while True:
        windows += len(way.read())
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return windows / elapsed
