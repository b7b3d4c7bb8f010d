"""What will go into which shard, decided from the HDF5 headers alone, before anything is written."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.manifest import FORMAT_VERSION, SourceFile
from data_pipeline.records import digest, encode
from data_pipeline.registry import Boundary, Card
from data_pipeline.stats import read_stats
from data_pipeline.well import SPLITS, WellFile, split_files


@dataclass(frozen=True)
class PlannedTrajectory:
    """A trajectory of a source file, before it has a place in a shard."""

    source: int
    source_index: int
    frames: int
    dt: float
    scalars: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What one dataset and split will become."""

    card: Card
    split: str
    folder: Path  # where the shards go
    files: tuple[Path, ...]
    sources: tuple[SourceFile, ...]
    grid: tuple[int, int]
    boundary: Boundary
    trajectories: tuple[PlannedTrajectory, ...]
    shards: tuple[tuple[int, int], ...]  # trajectories [first, stop) of each shard
    frames_per_chunk: int
    stats_key: str  # digest of what the statistics come from

    @cached_property
    def digest(self) -> str:
        """Changes with the source files, the settings and the format, and with nothing else (no paths, no dates)."""
        content = (self.sources, self.grid, self.boundary, self.trajectories, self.shards)
        channels = (self.card.state_channels, self.card.constant_channels)
        names = (FORMAT_VERSION, self.card.name, self.split, self.frames_per_chunk, self.stats_key)
        return digest([encode(content), encode(channels), encode(names)])

    def shard_bytes(self, shard: int) -> int:
        """Bytes of the fields that go into one shard."""
        first, stop = self.shards[shard]
        return sum(_trajectory_bytes(one.frames, self.card, self.grid) for one in self.trajectories[first:stop])


def plan_dataset(
    card: Card, folder: Path, out: Path, splits: Sequence[str] | None, frames_per_chunk: int, shard_bytes: int
) -> list[Plan]:
    """One plan for each split of the Well's dataset folder; None takes every split that has files.

    Raises UserError for a split without files, and for files that are damaged, not the card's, or of two resolutions.
    """
    for split in splits or ():
        if split not in SPLITS:
            raise UserError(f"split {split!r}: expected {', '.join(SPLITS)}")
    files = {split: split_files(folder, split) for split in SPLITS}
    wanted = [split for split in SPLITS if (files[split] if splits is None else split in splits)]
    for split in wanted:
        if not files[split]:
            raise UserError(f"{card.name}: expected HDF5 files in {folder / 'data' / split}, got none; get this split")
    if not wanted:
        raise UserError(f"{card.name}: expected HDF5 files in {folder}/data/<split>, got none")
    key = _stats_key(folder, files["train"], card)
    plans = [_plan_split(card, split, out, files[split], frames_per_chunk, shard_bytes, key) for split in wanted]
    for plan in plans[1:]:
        if plan.grid != plans[0].grid:
            raise UserError(_two_grids(card, plans[0].files[0], plans[0].grid, plan.files[0], plan.grid))
    return plans


def _plan_split(
    card: Card, split: str, out: Path, files: Sequence[Path], frames_per_chunk: int, shard_bytes: int, stats_key: str
) -> Plan:
    trajectories: list[PlannedTrajectory] = []
    first: WellFile | None = None
    for source, path in enumerate(files):
        with WellFile(path, card) as file:
            first = first or file
            if file.grid != first.grid:
                raise UserError(_two_grids(card, first.path, first.grid, path, file.grid))
            if file.boundary != first.boundary:
                raise UserError(
                    f"{card.name}: expected the same boundaries in all files of {split}, got {first.boundary} in "
                    f"{first.path} and {file.boundary} in {path}; keep them in separate folders"
                )
            for index in range(file.num_trajectories):
                dt, scalars = file.dt(index), file.scalars(index)
                trajectories.append(PlannedTrajectory(source, index, file.num_frames, dt, scalars))
    assert first is not None
    sizes = [_trajectory_bytes(one.frames, card, first.grid) for one in trajectories]
    return Plan(
        card=card,
        split=split,
        folder=out / card.name / split,
        files=tuple(files),
        sources=tuple(_fingerprint(path) for path in files),
        grid=first.grid,
        boundary=first.boundary,
        trajectories=tuple(trajectories),
        shards=tuple(_divide(sizes, shard_bytes)),
        frames_per_chunk=frames_per_chunk,
        stats_key=stats_key,
    )


def _two_grids(card: Card, path: Path, grid: tuple[int, int], other: Path, other_grid: tuple[int, int]) -> str:
    return (
        f"{card.name}: expected one resolution, got {grid[0]}x{grid[1]} in {path} and "
        f"{other_grid[0]}x{other_grid[1]} in {other}; keep them in separate folders"
    )


def _trajectory_bytes(frames: int, card: Card, grid: tuple[int, int]) -> int:
    return 4 * frames * len(card.state_channels) * grid[0] * grid[1]


def _divide(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges whose sizes add up to at most `limit`, or hold a single item."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            yield first, index
            first, total = index, 0
        total += size
    yield first, len(sizes)


def _fingerprint(path: Path, blocks: int = 16, block_bytes: int = 2**16) -> SourceFile:
    """Tells files apart by size and blocks spread over them: cheap for terabytes; other data differ all over."""
    size, hasher = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for block in range(blocks):
            file.seek(block * max(size - block_bytes, 0) // (blocks - 1))
            hasher.update(file.read(block_bytes))
    return SourceFile(path.name, size, hasher.hexdigest())


def _stats_key(folder: Path, train: Sequence[Path], card: Card) -> str:
    """Digest of stats.yaml, or of the train files if there is none. Raises UserError when stats.yaml is no good."""
    path = folder / "stats.yaml"
    if path.exists():
        read_stats(path, card)
        return f"stats.yaml {hashlib.sha256(path.read_bytes()).hexdigest()}"
    if not train:
        raise UserError(
            f"{card.name}: expected {path}, or train files to compute the statistics from, got neither; "
            "download stats.yaml or the train split"
        )
    return f"train files {digest([encode(_fingerprint(file)) for file in train])}"
