"""From shards and a schedule to the batches of one rank, read ahead by threads.

Reading a window is a copy of memory, during which Python lets other threads run. So threads do what DataLoader's
processes are for, without sending batches between processes, through shared memory that a container may lack.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.files import UserError
from data_pipeline.remote import RemoteFolder, is_url
from data_pipeline.shards.format import MANIFEST_NAME
from data_pipeline.windows.reader import Batch, ShardReader
from data_pipeline.windows.schedule import Division, Draw, Source
from data_pipeline.windows.streaming import StreamSettings, open_sources
from data_pipeline.workers import Threads

AHEAD = 2  # batches that each thread is ahead


def scheduled_batches(
    readers: Mapping[str, ShardReader],
    division: Division,
    length: int | Mapping[str, int],
    start: int,
    stop: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """One process's batches of steps start, start + 1, ... stop - 1: a batch for each of its pieces, in their order.

    Windows have `length` frames, which may differ by dataset. `workers` threads read ahead; with 0 a batch is read when
    it is asked for. Batches and their order are the same.
    Raises UserError, naming the draw and its windows, for a damaged shard or a server that stays away.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    windows = _Windows(readers, division, length, start, stop, pin_memory)
    return _read_ahead(windows, windows.num_threads(workers))


def _read_ahead(windows: "_Windows", num_threads: int) -> Iterator[Batch]:
    threads = Threads(num_threads) if num_threads else None
    coming: deque[Future[Batch]] = deque()
    try:
        for draw, places in windows:
            if threads is None:
                yield windows.read(draw, places)
                continue
            coming.append(threads.submit(windows.read, draw, places))
            if len(coming) > AHEAD * num_threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()
        windows.forget()


class _Windows:
    """This process's pieces in their order, each with its draw; iterated by one thread, `read` by any."""

    def __init__(
        self,
        readers: Mapping[str, ShardReader],
        division: Division,
        length: int | Mapping[str, int],
        start: int,
        stop: int,
        pin_memory: bool,
    ) -> None:
        self._readers, self._pin_memory = dict(readers), pin_memory
        self._lengths = {name: length_of(name, length) for name in readers}
        self._draws_ahead = max((reader.source.draws_ahead for reader in readers.values()), default=0)
        self._pieces = self._drawn(division, start, stop)

    @staticmethod
    def _drawn(division: Division, start: int, stop: int) -> Iterator[tuple[Draw, np.ndarray]]:
        # Tables of its own: what looks ahead into the next pass of a dataset would undo those of this one.
        schedule, draw = division.schedule.copy(), None
        for piece in (piece for step in range(start, stop) for piece in division.micro_batches(step)):
            if draw is None or draw.index != piece.draw:
                draw = schedule.draw(piece.draw)
            yield draw, piece.places

    def num_threads(self, workers: int) -> int:
        """Threads that may read. Shards behind a URL are fetched by threads of their own and taken up in order."""
        return min(workers, 1) if self._draws_ahead else workers

    def __iter__(self) -> Iterator[tuple[Draw, np.ndarray]]:
        """Each piece, once readers of shards behind a URL know which windows come next."""
        waiting = deque(islice(self._pieces, 1 + self._draws_ahead))
        known = 0  # how many of those waiting the readers know
        while waiting:
            while self._draws_ahead and known < len(waiting) and self._announce(*waiting[known]):
                known += 1
            yield waiting.popleft()
            known = max(known - 1, 0)
            waiting.extend(islice(self._pieces, 1))

    def forget(self) -> None:
        """No further piece will be read."""
        for reader in self._readers.values():
            reader.source.forget()

    def read(self, draw: Draw, places: np.ndarray) -> Batch:
        """A piece's batch. Raises UserError, naming draw and windows, for a damaged shard or a server that is away."""
        windows, length = draw.windows[places], self._lengths[draw.dataset]
        try:
            batch = self._readers[draw.dataset].batch(windows, length, draw=draw.index)
        except UserError as error:
            wanted = f"windows {', '.join(map(str, windows.tolist()))} of {length} frames of {draw.dataset}"
            raise UserError(f"{error}\nThis was met by draw {draw.index}: {wanted}") from error
        return batch.pin_memory() if self._pin_memory else batch

    def _announce(self, draw: Draw, places: np.ndarray) -> bool:
        return self._readers[draw.dataset].announce(draw.windows[places], self._lengths[draw.dataset])


def open_readers(
    shards: str | Path,
    datasets: Sequence[str] | None,
    split: str,
    verify: bool = False,
    stream: StreamSettings | None = None,
    known: Sequence[str] = (),
) -> dict[str, ShardReader]:
    """A reader for each dataset, by name; None means all that have shards of this split.

    `shards` is a folder or a URL; behind a URL, which may not list what is there, None tries the `known` names, and
    `stream` says how to read. Raises UserError that names what was looked for, and the commands that make shards, if
    one is missing.
    """
    if is_url(shards):
        return _open_remote(str(shards), datasets, split, verify, stream or StreamSettings(), known)
    shards = Path(shards)
    if datasets is None:
        found = sorted(path.parts[-3] for path in shards.glob(f"*/{split}/{MANIFEST_NAME}"))
        missing = [] if found else ["<dataset>"]
    else:
        found = sorted(set(datasets))
        missing = [name for name in found if not (shards / name / split / MANIFEST_NAME).exists()]
    if missing:
        raise UserError(_no_shards(shards, missing, split))
    return {name: ShardReader(shards, name, split, verify) for name in found}


def _open_remote(
    url: str, datasets: Sequence[str] | None, split: str, verify: bool, stream: StreamSettings, known: Sequence[str]
) -> dict[str, ShardReader]:
    root = RemoteFolder(url, stream.retries)
    wanted = sorted(set(known if datasets is None else datasets))
    found = [name for name in wanted if (root / name / split).file(MANIFEST_NAME).exists()]
    missing = [name for name in wanted if name not in found]
    if not found or (datasets is not None and missing):
        raise UserError(_no_shards(root, missing or ["<dataset>"], split))
    sources = open_sources(root, found, split, stream)
    return {name: ShardReader(source, name, split, verify) for name, source in sources.items()}


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


def sources(readers: Mapping[str, ShardReader], length: int | Mapping[str, int]) -> list[Source]:
    """What the schedule needs to know of each dataset, for windows of `length` frames, by name."""
    found = []
    for name, reader in sorted(readers.items()):
        index = reader.index(length_of(name, length))
        height, width = reader.manifest.grid
        found.append(Source(name, len(index), height * width // 4, index.shard_windows))
    return found


def length_of(dataset: str, length: int | Mapping[str, int]) -> int:
    """Frames of the windows of a dataset."""
    return length if isinstance(length, int) else length[dataset]
