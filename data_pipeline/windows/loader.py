"""From shards and a schedule to the batches of one rank, read ahead by threads.

Reading a window is a copy of memory, during which Python lets other threads run. So threads do what DataLoader's
processes are for, without sending batches between processes, through shared memory that a container may lack.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFolder, is_url
from data_pipeline.shards.manifest import MANIFEST_NAME
from data_pipeline.threads import Threads
from data_pipeline.windows.batch import Batch
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Draw, Schedule, Source
from data_pipeline.windows.streaming import StreamSettings, open_sources

AHEAD = 2  # batches that each thread is ahead


def scheduled_batches(
    readers: Mapping[str, ShardReader],
    schedule: Schedule,
    length: int,
    rank: int,
    world_size: int,
    start: int,
    stop: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """One rank's batches of draws start, start + 1, ... stop - 1: a contiguous slice of each global batch.

    `workers` threads read ahead; with 0 a batch is read when it is asked for. Batches and their order are the same.
    Raises UserError if the global batch cannot be shared evenly by `world_size` processes, and later, naming the draw
    and its windows, for a damaged shard or a server that stays away.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    windows = _Windows(readers, schedule, length, _share(schedule.batch, rank, world_size), stop, pin_memory)
    return _read_ahead(windows, range(start, stop), windows.num_threads(workers))


def _share(batch: int, rank: int, world_size: int) -> slice:
    """The places of a global batch that are this rank's."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    if batch % world_size:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UserError(
            f"a batch of {batch} cannot be shared by {world_size} processes: use "
            f"{', '.join(map(str, divisors))} processes, or a batch that is a multiple of {world_size}"
        )
    share = batch // world_size
    return slice(rank * share, (rank + 1) * share)


def _read_ahead(windows: "_Windows", indices: range, num_threads: int) -> Iterator[Batch]:
    threads = Threads(num_threads) if num_threads else None
    coming: deque[Future[Batch]] = deque()
    try:
        for index in indices:
            draw = windows.prepare(index)
            if threads is None:
                yield windows.read(draw)
                continue
            coming.append(threads.submit(windows.read, draw))
            if len(coming) > AHEAD * num_threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()
        windows.forget()


class _Windows:
    """This rank's share of each draw. `prepare` is called in the order of draws, by one thread; `read` by any."""

    def __init__(
        self,
        readers: Mapping[str, ShardReader],
        schedule: Schedule,
        length: int,
        share: slice,
        stop: int,
        pin_memory: bool,
    ) -> None:
        self._readers, self._length, self._share, self._stop = dict(readers), length, share, stop
        self._pin_memory = pin_memory
        self._draws_ahead = max((reader.source.draws_ahead for reader in readers.values()), default=0)
        # Each has tables of its own: looking ahead into the next pass of a dataset would undo those of this one.
        self._schedule, self._coming = schedule.copy(), schedule.copy()
        self._announced = 0

    def num_threads(self, workers: int) -> int:
        """Threads that may read. Shards behind a URL are fetched by threads of their own and taken up in order."""
        return min(workers, 1) if self._draws_ahead else workers

    def prepare(self, index: int) -> Draw:
        """The draw, once readers of shards behind a URL know which windows come next, up to the draw before `stop`."""
        draw = self._schedule.draw(index)
        if self._draws_ahead:
            self._announced = max(index, self._announced)
            while self._announced < min(self._stop, index + self._draws_ahead + 1):
                coming = self._coming.draw(self._announced)
                if not self._readers[coming.dataset].announce(coming.windows[self._share], self._length):
                    break
                self._announced += 1
        return draw

    def forget(self) -> None:
        """No further draw will be read."""
        for reader in self._readers.values():
            reader.source.forget()

    def read(self, draw: Draw) -> Batch:
        """The draw's batch. Raises UserError, naming draw and windows, for a damaged shard or a server that is away."""
        windows = draw.windows[self._share]
        try:
            batch = self._readers[draw.dataset].batch(windows, self._length, draw=draw.index)
        except UserError as error:
            wanted = f"windows {', '.join(map(str, windows.tolist()))} of {self._length} frames of {draw.dataset}"
            raise UserError(f"{error}\nThis was met by draw {draw.index}: {wanted}") from error
        return batch.pin_memory() if self._pin_memory else batch


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


def sources(readers: Mapping[str, ShardReader], length: int) -> list[Source]:
    """What the schedule needs to know of each dataset, for windows of `length` frames, by name."""
    found = []
    for name, reader in sorted(readers.items()):
        index = reader.index(length)
        height, width = reader.manifest.grid
        found.append(Source(name, len(index), height * width // 4, index.shard_windows))
    return found
