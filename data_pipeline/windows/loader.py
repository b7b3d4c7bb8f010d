"""From shards and a schedule to the batches of one rank, read ahead by threads.

Reading a window is a copy of memory, during which Python lets other threads run. So threads do the work of a
DataLoader's processes, and no batch has to cross from one process to another through shared memory, which a container
may lack.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFolder, is_url
from data_pipeline.shards.format import MANIFEST_NAME
from data_pipeline.windows.division import Division
from data_pipeline.windows.reader import Batch, ShardReader
from data_pipeline.windows.schedule import Draw, Source
from data_pipeline.windows.streaming import StreamSettings, open_remote_shards
from data_pipeline.workers import Threads

PREFETCH_FACTOR = 2  # batches that each thread reads ahead

Lengths = int | Mapping[str, int]  # frames of a window, for all datasets or by name


def scheduled_batches(
    readers: Mapping[str, ShardReader],
    division: Division,
    length: Lengths,
    start: int,
    stop: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Return one process's batches of steps start, ..., stop - 1: one for each of its micro-batches, in their order.

    `workers` threads read ahead; with 0, a batch is read when it is asked for. The batches are the same. Raises
    UserError, naming the draw and its windows, for a damaged shard or a server that does not answer.
    """
    lengths = {name: _length(name, length) for name in readers}
    micro_batches = _micro_batches(division, start, stop)

    def read(draw: Draw, places: np.ndarray) -> Batch:
        windows, length = draw.windows[places], lengths[draw.dataset]
        try:
            batch = readers[draw.dataset].batch(windows, length, draw=draw.index)
        except UserError as error:
            wanted = f"windows {', '.join(map(str, windows.tolist()))} of {length} frames of {draw.dataset}"
            raise UserError(f"{error}\nThis was met by draw {draw.index}: {wanted}") from error
        return batch.pin_memory() if pin_memory else batch

    def prefetch(draw: Draw, places: np.ndarray) -> bool:
        return readers[draw.dataset].prefetch(draw.windows[places], lengths[draw.dataset])

    ahead = max((reader.shards.draws_ahead for reader in readers.values()), default=0)
    workers = min(workers, 1) if ahead else workers  # shards behind a URL have threads of their own
    threads = Threads(workers) if workers else None
    reading: deque[Future[Batch]] = deque()
    coming = deque(islice(micro_batches, 1 + ahead))
    prefetched = 0  # of `coming`
    try:
        while coming:
            while ahead and prefetched < len(coming) and prefetch(*coming[prefetched]):
                prefetched += 1
            draw, places = coming.popleft()
            prefetched = max(prefetched - 1, 0)
            coming.extend(islice(micro_batches, 1))
            if threads is None:
                yield read(draw, places)
            else:
                reading.append(threads.submit(read, draw, places))
                if len(reading) > PREFETCH_FACTOR * workers:
                    yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
    finally:
        for future in reading:
            future.cancel()
        for reader in readers.values():
            reader.shards.cancel_prefetch()


def _micro_batches(division: Division, start: int, stop: int) -> Iterator[tuple[Draw, np.ndarray]]:
    """Yield the draw of each micro-batch, and the places of its windows in the draw."""
    schedule, draw = division.schedule.copy(), None  # a copy, since it is read ahead of the training
    for step in range(start, stop):
        for micro_batch in division.micro_batches(step):
            if draw is None or draw.index != micro_batch.draw:
                draw = schedule.draw(micro_batch.draw)
            yield draw, micro_batch.places


def open_readers(
    shards: str | Path,
    datasets: Sequence[str] | None,
    split: str,
    verify: bool = False,
    stream: StreamSettings | None = None,
    known: Sequence[str] = (),
) -> dict[str, ShardReader]:
    """Return a reader for each dataset, by name; None means all that have shards of this split.

    `shards` is a folder or a URL. A server need not list its folders, so None there tries the `known` names; `stream`
    sets how to read from it. Raises UserError if shards are missing, with the commands that make them.
    """
    stream = stream or StreamSettings()
    root = RemoteFolder(str(shards), stream.retries) if is_url(shards) else Path(shards)
    if isinstance(root, RemoteFolder):
        wanted = sorted(set(known if datasets is None else datasets))
        found = [name for name in wanted if (root / name / split).file(MANIFEST_NAME).exists()]
    else:
        present = [path.parts[-3] for path in root.glob(f"*/{split}/{MANIFEST_NAME}")]
        wanted = sorted(set(present if datasets is None else datasets))
        found = [name for name in wanted if name in present]
    missing = [name for name in wanted if name not in found]
    if (datasets is None and not found) or (datasets is not None and missing):
        raise UserError(_no_shards(root, missing or ["<dataset>"], split))
    if isinstance(root, RemoteFolder):
        remote = open_remote_shards(root, found, split, stream)
        return {name: ShardReader(remote[name], name, split, verify) for name in found}
    return {name: ShardReader(root, name, split, verify) for name in found}


def _no_shards(shards: Path | RemoteFolder, missing: Sequence[str], split: str) -> str:
    looked_for = "\n".join(f"  {shards}/{name}/{split}/{MANIFEST_NAME}" for name in missing)
    out = shards if isinstance(shards, Path) else "SHARDS"
    upload = "" if isinstance(shards, Path) else f"\nThen upload SHARDS as it is to {shards}, or correct data.shards."
    return (
        f"no {split} shards under {shards}: expected, and did not find,\n{looked_for}\n"
        "Make them from The Well:\n"
        "  data-pipeline download --out WELL --datasets NAME\n"
        f"  data-pipeline shard --well WELL --out {out}\n"
        "or from the mini-Well, small simulations of all eight datasets, with no download:\n"
        "  data-pipeline simulate --preset mini --out data/mini/well\n"
        f"  data-pipeline shard --well data/mini/well --out {out}{upload}"
    )


def sources(readers: Mapping[str, ShardReader], length: Lengths) -> list[Source]:
    """Return the sizes of each dataset for the schedule, by name, for windows of `length` frames."""
    found = []
    for name, reader in sorted(readers.items()):
        index = reader.index(_length(name, length))
        height, width = reader.manifest.grid
        found.append(Source(name, len(index), height * width // 4, index.shard_windows))
    return found


def _length(dataset: str, length: Lengths) -> int:
    return length if isinstance(length, int) else length[dataset]
