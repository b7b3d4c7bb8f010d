"""From shards and a schedule to the batches of one rank, through a DataLoader."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.batch import Batch
from data_pipeline.errors import UserError
from data_pipeline.reader import ShardReader
from data_pipeline.schedule import Schedule, Source
from data_pipeline.shards import MANIFEST_NAME


class ScheduledWindows(Dataset["Batch | UserError"]):
    """Item `index` is this rank's share of the schedule's draw `index`: a contiguous slice of the global batch.

    A UserError is handed over as the item, since a worker process could only raise it with its own traceback inside;
    `read_batches` raises it where the batches are used.
    """

    def __init__(
        self, readers: Mapping[str, ShardReader], schedule: Schedule, length: int, rank: int, world_size: int
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if schedule.batch % world_size:
            divisors = [n for n in range(1, schedule.batch + 1) if schedule.batch % n == 0]
            raise UserError(
                f"a batch of {schedule.batch} cannot be shared by {world_size} processes: use "
                f"{', '.join(map(str, divisors))} processes, or a batch that is a multiple of {world_size}"
            )
        self._readers, self._schedule, self._length = dict(readers), schedule, length
        share = schedule.batch // world_size
        self._slice = slice(rank * share, (rank + 1) * share)

    def __getitem__(self, index: int) -> Batch | UserError:
        draw = self._schedule.draw(index)
        try:
            return self._readers[draw.dataset].batch(draw.windows[self._slice], self._length, draw=index)
        except UserError as error:
            return error


def read_batches(loader: DataLoader[Batch | UserError]) -> Iterator[Batch]:
    """The loader's batches; raises the UserError (a damaged shard, say) that a loader process met."""
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def make_loader(
    readers: Mapping[str, ShardReader],
    schedule: Schedule,
    length: int,
    rank: int,
    world_size: int,
    start: int,
    stop: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch | UserError]:
    """Batches of draws start, start + 1, ... stop - 1 for one rank, in this order for any number of workers.

    Raises UserError if the global batch cannot be shared evenly by `world_size` processes.
    """
    return DataLoader(
        ScheduledWindows(readers, schedule, length, rank, world_size),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        worker_init_fn=_use_one_thread,
    )


def _use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)  # a worker only copies memory; more threads would take the cores of the model


def open_readers(
    shards: Path, datasets: Sequence[str] | None, split: str, verify: bool = False
) -> dict[str, ShardReader]:
    """A reader for each dataset, by name; None means all that have shards of this split.

    Raises UserError that names what was looked for, and the commands that make shards, if one is missing.
    """
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


def _no_shards(shards: Path, missing: Sequence[str], split: str) -> str:
    looked_for = "\n".join(f"  {shards / name / split / MANIFEST_NAME}" for name in missing)
    return (
        f"no {split} shards under {shards}: expected, and did not find,\n{looked_for}\n"
        "Make them from a downloaded Well:\n"
        "  the-well-download --base-path WELL --dataset NAME --split train   (and valid, test)\n"
        f"  data-pipeline shard --well WELL --out {shards}\n"
        "or from the mini-Well, small simulations of all eight datasets, with no download:\n"
        "  data-pipeline simulate --preset mini --out data/mini/well\n"
        f"  data-pipeline shard --well data/mini/well --out {shards}"
    )


def sources(readers: Mapping[str, ShardReader], length: int) -> list[Source]:
    """What the schedule needs to know of each dataset, for windows of `length` frames, by name."""
    found = []
    for name, reader in sorted(readers.items()):
        index = reader.index(length)
        height, width = reader.manifest.grid
        found.append(Source(name, len(index), height * width // 4, index.shard_windows))
    return found
