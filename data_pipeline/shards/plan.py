"""What will go into which shard, decided from the HDF5 headers alone, before anything is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipeline.files import UserError, sha256
from data_pipeline.hashing import nested_choice
from data_pipeline.registry import Boundary, Card
from data_pipeline.schema import digest, encode
from data_pipeline.shards.format import FORMAT_VERSION, ITEM_BYTES, SourceFile, trajectory_key
from data_pipeline.well.hdf5 import SPLITS, WellFile, split_files
from data_pipeline.well.layout import File, Folder, child_file, child_names, file_bytes, read_range, read_small
from data_pipeline.well.stats import read_stats


@dataclass(frozen=True)
class Settings:
    """How shards are cut and stored."""

    frames_per_chunk: int = 16
    shard_bytes: int = 512 * 2**20  # a shard ends with the trajectory that would take it over this
    dtype: str = "float32"  # a key of manifest.ITEM_BYTES
    restrict: int | None = None  # trajectories of each split; None: all

    def __post_init__(self) -> None:
        for name in ("frames_per_chunk", "shard_bytes", "restrict"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if self.dtype not in ITEM_BYTES:
            raise UserError(f"dtype: expected {' or '.join(ITEM_BYTES)}, got {self.dtype!r}")


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
    files: tuple[File, ...]
    sources: tuple[SourceFile, ...]
    grid: tuple[int, int]
    boundary: Boundary
    trajectories: tuple[PlannedTrajectory, ...]
    shards: tuple[tuple[int, int], ...]  # trajectories [first, stop) of each shard
    frames_per_chunk: int
    dtype: str
    stats_key: str  # digest of what the statistics come from
    whole: bool  # all trajectories of the split are in it

    @cached_property
    def digest(self) -> str:
        """Changes with the source files, the settings and the format, and with nothing else (no paths, no dates)."""
        content = (self.sources, self.grid, self.boundary, self.trajectories, self.shards)
        channels = (self.card.state_channels, self.card.constant_channels)
        names = (FORMAT_VERSION, self.card.name, self.split, self.frames_per_chunk, self.dtype, self.stats_key)
        return digest([encode(content), encode(channels), encode(names)])

    def source_bytes(self, shard: int) -> int:
        """Bytes of the float32 fields that are read for one shard."""
        first, stop = self.shards[shard]
        return sum(_trajectory_bytes(one.frames, self.card, self.grid) for one in self.trajectories[first:stop])

    @property
    def stored_bytes(self) -> int:
        """Bytes of the arrays in all shards, within a thousandth of the shards' size."""
        state = sum(self.source_bytes(shard) for shard in range(len(self.shards)))
        constants = len(self.trajectories) * len(self.card.constant_channels) * self.grid[0] * self.grid[1]
        return state * ITEM_BYTES[self.dtype] // 4 + 4 * constants


def plan_dataset(card: Card, folder: Folder, out: Path, splits: Sequence[str] | None, settings: Settings) -> list[Plan]:
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
            raise UserError(f"{card.name}: expected HDF5 files in {folder}/data/{split}, got none; get this split")
    if not wanted:
        raise UserError(f"{card.name}: expected HDF5 files in {folder}/data/<split>, got none")
    key = _stats_key(folder, files["train"], card)
    plans = [_plan_split(card, split, out, files[split], settings, key) for split in wanted]
    for plan in plans[1:]:
        if plan.grid != plans[0].grid:
            raise UserError(_two_grids(card, plans[0].files[0], plans[0].grid, plan.files[0], plan.grid))
    return plans


def _plan_split(card: Card, split: str, out: Path, files: Sequence[File], settings: Settings, stats_key: str) -> Plan:
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
    chosen = _restricted(trajectories, [path.name for path in files], card.name, split, settings.restrict)
    whole, trajectories = len(chosen) == len(trajectories), chosen
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
        shards=tuple(_divide(sizes, settings.shard_bytes)),
        frames_per_chunk=settings.frames_per_chunk,
        dtype=settings.dtype,
        stats_key=stats_key,
        whole=whole,
    )


def _restricted(
    trajectories: Sequence[PlannedTrajectory], names: Sequence[str], dataset: str, split: str, limit: int | None
) -> list[PlannedTrajectory]:
    """The `limit` trajectories with the smallest hashes of what they are, in their order: N of them are in N + 1."""
    keys = [trajectory_key(dataset, split, names[one.source], one.source_index) for one in trajectories]
    return [trajectories[place] for place in nested_choice(keys, limit)]


def _two_grids(card: Card, path: File, grid: tuple[int, int], other: File, other_grid: tuple[int, int]) -> str:
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


def _fingerprint(path: File, blocks: int = 16, block_bytes: int = 2**16) -> SourceFile:
    """Tells files apart by size and blocks spread over them: cheap for terabytes; other data differ all over."""
    size = file_bytes(path)
    starts = [block * max(size - block_bytes, 0) // (blocks - 1) for block in range(blocks)]
    return SourceFile(path.name, size, sha256(*(read_range(path, at, min(at + block_bytes, size)) for at in starts)))


def stats_file(folder: Folder) -> File | None:
    """stats.yaml of a dataset's folder, if it is there."""
    return child_file(folder, "stats.yaml") if "stats.yaml" in child_names(folder) else None


def _stats_key(folder: Folder, train: Sequence[File], card: Card) -> str:
    """Digest of stats.yaml, or of the train files if there is none. Raises UserError when stats.yaml is no good."""
    path = stats_file(folder)
    if path is not None:
        read_stats(path, card)
        return f"stats.yaml {sha256(read_small(path))}"
    if not train:
        raise UserError(
            f"{card.name}: expected {folder}/stats.yaml, or train files to compute the statistics from, got neither; "
            "download stats.yaml or the train split"
        )
    return f"train files {digest([encode(_fingerprint(file)) for file in train])}"
