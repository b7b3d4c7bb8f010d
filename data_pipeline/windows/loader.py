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
from typing import TypeAlias

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
ShardPlaces: TypeAlias = str | Path | Sequence[str | Path]  # a folder or URL with shards, or several
Root: TypeAlias = Path | RemoteFolder


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


def shard_places(shards: ShardPlaces) -> list[str]:
    """Return the folders and URLs of shards as a list, of one element if a single place is given."""
    return [str(shards)] if isinstance(shards, str | Path) else [str(place) for place in shards]


def open_readers(
    shards: ShardPlaces,
    datasets: Sequence[str] | None,
    split: str,
    verify: bool = False,
    stream: StreamSettings | None = None,
    known: Sequence[str] = (),
) -> dict[str, ShardReader]:
    """Return a reader for each dataset, by name; None means all that have shards of this split.

    `shards` is a folder or a URL, or several, which hold different datasets. A server need not list its folders, so
    None there tries the `known` names; `stream` sets how to read from it. Raises UserError if shards are missing, with
    the commands that make them, and if a dataset is in two places.
    """
    stream = stream or StreamSettings()
    roots = _roots(shards, stream)
    wanted, found = _find_shards(roots, datasets, split, known)
    if (datasets is None and not found) or (datasets is not None and len(found) < len(wanted)):
        raise UserError(_no_shards(roots, wanted, list(found), split))
    remote = {name: root / name / split for name, root in found.items() if isinstance(root, RemoteFolder)}
    opened = open_remote_shards(remote, stream) if remote else {}
    return {
        name: ShardReader(opened[name] if isinstance(root, RemoteFolder) else root, name, split, verify)
        for name, root in found.items()
    }


def datasets_with_shards(
    shards: ShardPlaces,
    datasets: Sequence[str] | None,
    splits: Sequence[str],
    stream: StreamSettings | None = None,
    known: Sequence[str] = (),
) -> list[str]:
    """Return those of the datasets that have shards of all `splits`, by name; arguments as of `open_readers`.

    Raises UserError if none has.
    """
    roots = _roots(shards, stream or StreamSettings())
    there = [set(_find_shards(roots, datasets, split, known)[1]) for split in splits]
    found = sorted(set.intersection(*there))
    if not found:
        lacking = next((split for split, names in zip(splits, there, strict=True) if not names), splits[0])
        raise UserError(_no_shards(roots, datasets and sorted(set(datasets)), [], lacking))
    return found


def _roots(shards: ShardPlaces, stream: StreamSettings) -> list[Root]:
    places = shard_places(shards)
    return [RemoteFolder(place, stream.retries) if is_url(place) else Path(place) for place in places]


def _find_shards(
    roots: Sequence[Root], datasets: Sequence[str] | None, split: str, known: Sequence[str]
) -> tuple[list[str], dict[str, Root]]:
    """Return the datasets that are looked for, and the roots of those that have shards of the split, both by name.

    Raises UserError if two roots hold the same dataset. Folders hold it even if they have different splits of it.
    """
    holders: dict[str, Root] = {}  # of any split
    found: dict[str, Root] = {}
    for root in roots:
        for name, here in _splits_there(root, datasets, split, known).items():
            if name in holders:
                raise UserError(
                    f"{name}: expected its shards in one place, got them in two: {holders[name]} and {root}. Leave one "
                    f"of the places out, or remove {name} from one"
                )
            holders[name] = root
            if here:
                found[name] = root
    wanted = sorted(set(datasets if datasets is not None else [*found]))
    if datasets is None and any(isinstance(root, RemoteFolder) for root in roots):
        wanted = sorted({*known, *found})
    return wanted, {name: found[name] for name in wanted if name in found}


def _splits_there(root: Root, datasets: Sequence[str] | None, split: str, known: Sequence[str]) -> dict[str, bool]:
    """Return the datasets that `root` holds, and for each of them whether `root` holds the split."""
    if isinstance(root, RemoteFolder):
        tried = sorted(set(known if datasets is None else datasets))
        return {name: True for name in tried if (root / name / split).file(MANIFEST_NAME).exists()}
    there: dict[str, bool] = {}
    for path in sorted(root.glob(f"*/*/{MANIFEST_NAME}")):
        name = path.parts[-3]
        if datasets is None or name in datasets:
            there[name] = there.get(name, False) or path.parts[-2] == split
    return there


def _no_shards(roots: Sequence[Root], wanted: Sequence[str] | None, found: Sequence[str], split: str) -> str:
    """Return the message for shards that are missing: those `wanted` (None: any dataset) that are not `found`."""
    root = roots[0]
    missing = [name for name in wanted or ["<dataset>"] if name not in found]
    lines = [f"no {split} shards under {' or '.join(map(str, roots))}: expected, and did not find,"]
    lines += [f"  {root}/{name}/{split}/{MANIFEST_NAME}" for name in missing]
    if found:
        lines += [
            f"{len(found)} of {len(found) + len(missing)} datasets are there: {', '.join(found)}. To train on them:",
            f"  data.datasets=[{','.join(found)}], or data.datasets=available",
        ]
    names, out = ",".join(missing) if wanted else "NAME", root if isinstance(root, Path) else "SHARDS"
    lines += [
        f"To make {'the others' if found else 'them'} from The Well:",
        f"  data-pipeline download --out WELL --datasets {names}",
        f"  data-pipeline shard --well WELL --out {out} --datasets {names}",
    ]
    if not isinstance(root, Path):
        lines.append(f"  Then upload SHARDS as it is to {root}, or correct data.shards.")
    if not found:
        lines += [
            "To try the program without a download, on small simulations (the mini-Well) in folders of their own:",
            "  data-pipeline simulate --preset mini --out data/mini/well",
            "  data-pipeline shard --well data/mini/well --out data/mini/shards",
            "  fm train recipes/quickstart.yaml",
        ]
    return "\n".join(lines)


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
