"""What goes into which shard, decided from the HDF5 headers alone, before anything is written."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import sha256
from data_pipeline.hashing import nested_choice
from data_pipeline.registry import VARIABLE, Boundary, Card, Registry
from data_pipeline.schema import digest
from data_pipeline.shards.format import FORMAT_VERSION, ITEM_BYTES, SourceFile, trajectory_key
from data_pipeline.well.findings import Finding, Spacing, left_out_findings, spacing_findings
from data_pipeline.well.hdf5 import (
    SPLITS,
    WellFile,
    chosen_splits,
    dataset_folders,
    left_out_names,
    split_files,
)
from data_pipeline.well.layout import (
    File,
    Folder,
    child_file,
    child_names,
    file_bytes,
    folder_at,
    read_range,
    read_small,
)
from data_pipeline.well.stats import read_stats

FROM_FILE, FROM_DATA = "stats.yaml", "train files"  # where statistics come from
_FINGERPRINT_BLOCKS, _FINGERPRINT_BYTES = 16, 2**16  # of a source file that are hashed: cheap for terabytes


@dataclass(frozen=True)
class Settings:
    """How shards are cut and stored."""

    frames_per_chunk: int = 16  # of a sample
    shard_bytes: int = 512 * 2**20  # a shard ends with the trajectory that would take it over this
    dtype: str = "float32"  # or float16, which halves the fields and is refused where it blurs them
    restrict: int | None = None  # N: use only N trajectories of each split; all of them are also used for N + 1

    def __post_init__(self) -> None:
        for name in ("frames_per_chunk", "shard_bytes", "restrict"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if self.dtype not in ITEM_BYTES:
            raise UserError(f"dtype: expected {' or '.join(ITEM_BYTES)}, got {self.dtype!r}")


DEFAULTS = Settings()


@dataclass(frozen=True)
class PlannedTrajectory:
    """A trajectory of a source file, before it has a place in a shard."""

    source: int  # index into SplitPlan.sources
    source_index: int  # index of the trajectory in that file
    frames: int
    dt: float | None
    scalars: dict[str, float]


@dataclass(frozen=True)
class StatsSource:
    """Where a dataset's statistics come from: its stats.yaml, or the train files if there is none."""

    file: File | None  # stats.yaml
    train: tuple[File, ...]
    key: str  # digest of the file or files

    @property
    def name(self) -> str:
        """As the manifest calls it."""
        return FROM_DATA if self.file is None else FROM_FILE


@dataclass(frozen=True)
class SplitPlan:
    """The shards that one dataset and split will become."""

    card: Card
    split: str
    folder: Path  # of the shards
    files: tuple[File, ...]
    sources: tuple[SourceFile, ...]
    grid: tuple[int, int]
    boundary: Boundary
    trajectories: tuple[PlannedTrajectory, ...]
    shards: tuple[tuple[int, int], ...]  # trajectories [first, stop) of each shard
    frames_per_chunk: int
    dtype: str
    stats_source: StatsSource
    whole: bool  # it holds all trajectories of the split
    spacing: Spacing | None  # of grid points, if it is the same in all files
    findings: tuple[Finding, ...]  # from names and headers

    @cached_property
    def digest(self) -> str:
        """A digest of the source files, the settings and the format, and of nothing else (no paths, no dates)."""
        content = (self.sources, self.grid, self.boundary, self.trajectories, self.shards)
        channels = (self.card.state_channels, self.card.constant_channels)
        names = (FORMAT_VERSION, self.card.name, self.split, self.frames_per_chunk, self.dtype, self.stats_source.key)
        return digest([content, channels, names])

    def source_bytes(self, shard: int) -> int:
        """Return the bytes of the float32 fields that are read for one shard."""
        first, stop = self.shards[shard]
        return sum(_trajectory_bytes(one.frames, self.card, self.grid) for one in self.trajectories[first:stop])

    @property
    def stored_bytes(self) -> int:
        """Bytes of the arrays in all shards, within a thousandth of the shards' size."""
        state = sum(self.source_bytes(shard) for shard in range(len(self.shards)))
        constants = len(self.trajectories) * len(self.card.constant_channels) * self.grid[0] * self.grid[1]
        return state * ITEM_BYTES[self.dtype] // 4 + 4 * constants


def plan_all(
    well: str | Path,
    out: Path,
    datasets: Sequence[str] | None,
    splits: Sequence[str] | None,
    settings: Settings,
    registry: Registry,
) -> list[SplitPlan]:
    """Return a plan for each dataset and split to convert; write nothing."""
    folders = choose_folders(folder_at(well), datasets, registry)
    planned = (_plan_dataset(registry.card(name), folder, out, splits, settings) for name, folder in folders.items())
    return [plan for plans in planned for plan in plans]


def choose_folders(well: Folder, datasets: Sequence[str] | None, registry: Registry) -> Mapping[str, Folder]:
    """Return dataset -> folder, by name, of the named datasets of a Well; None means all with a card."""
    if datasets is not None:
        datasets = [card.name for card in registry.select(datasets)]
    folders = dataset_folders(well, datasets)
    if datasets is None:
        without = sorted(set(folders) - set(registry.cards))
        if without and len(without) < len(folders):
            names = ", ".join(without)
            print(f"left out, no card describes {names}: `data-pipeline register` drafts one", file=sys.stderr)
        datasets = sorted(set(folders) & set(registry.cards))
    missing = [name for name in datasets if name not in folders]
    if not datasets and folders:
        name = next(iter(folders))
        raise UserError(
            f"{well}: no card describes {', '.join(folders)}: `data-pipeline register {folders[name]}` drafts one; "
            f"cards of your own are read from --registry or {VARIABLE}"
        )
    if missing or not datasets:
        raise UserError(
            f"{well}: expected {', '.join(missing) or 'datasets'} as {well}/<dataset>/data/<split>/*.hdf5 (or under "
            f"{well}/datasets), got {', '.join(folders) or 'none'}; give the folder that holds the datasets, get "
            "them with `data-pipeline download`, or make the mini-Well with `data-pipeline simulate`"
        )
    return {name: folders[name] for name in datasets}


def _plan_dataset(
    card: Card, folder: Folder, out: Path, splits: Sequence[str] | None, settings: Settings
) -> list[SplitPlan]:
    """Return one plan for each split of the Well's dataset folder; None takes every split that has files.

    Raises UserError for a split without files, and for files that are damaged, not the card's, or of two resolutions.
    """
    chosen = chosen_splits(splits)
    files: dict[str, tuple[File, ...]] = {split: tuple(split_files(folder, split)) for split in SPLITS}
    wanted = [split for split in chosen if files[split] or splits is not None]
    left_out = {split: left_out_names(folder, split) for split in wanted or chosen}
    beside = left_out_names(folder, None)
    for split in wanted or ["<split>"]:
        if not files.get(split):
            names = [name for one in left_out if split in (one, "<split>") for name in left_out[one]] + beside
            others = "".join(f"; {one.detail}" for one in left_out_findings(names)) or "; get this split"
            raise UserError(f"{card.name}: expected HDF5 files in {folder}/data/{split}, got none{others}")
    source = _stats_source(folder, files["train"], card)
    plans = []
    for split in wanted:
        names = [*left_out[split], *(beside if split == wanted[0] else ())]
        plans.append(_plan_split(card, split, out, files[split], settings, source, left_out_findings(names)))
    for plan in plans[1:]:
        if plan.grid != plans[0].grid:
            raise UserError(_two_grids(card, plans[0].files[0], plans[0].grid, plan.files[0], plan.grid))
    return plans


def _plan_split(
    card: Card,
    split: str,
    out: Path,
    files: tuple[File, ...],
    settings: Settings,
    stats_source: StatsSource,
    findings: Sequence[Finding],
) -> SplitPlan:
    every: list[PlannedTrajectory] = []
    found: list[Finding] = [*findings]
    spacings: list[tuple[str, Spacing | None]] = []
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
            found += file.findings()
            spacings.append((path.name, file.spacing))
            for index in range(file.num_trajectories):
                every.append(PlannedTrajectory(source, index, file.num_frames, file.dt(index), file.scalars(index)))
    assert first is not None
    keys = [trajectory_key(card.name, split, files[one.source].name, one.source_index) for one in every]
    chosen = [every[place] for place in nested_choice(keys, settings.restrict)]
    sizes = [_trajectory_bytes(one.frames, card, first.grid) for one in chosen]
    held = {(files[one.source].name, one.source_index) for one in chosen}
    kept = [one for one in found if one.trajectory is None or (one.file, one.trajectory) in held]
    differing = [*spacing_findings(spacings)]
    return SplitPlan(
        card=card,
        split=split,
        folder=out / card.name / split,
        files=files,
        sources=tuple(_fingerprint(path) for path in files),
        grid=first.grid,
        boundary=first.boundary,
        trajectories=tuple(chosen),
        shards=tuple(_divide(sizes, settings.shard_bytes)),
        frames_per_chunk=settings.frames_per_chunk,
        dtype=settings.dtype,
        stats_source=stats_source,
        whole=len(chosen) == len(every),
        spacing=None if differing else spacings[0][1],
        findings=(*kept, *differing),
    )


def _two_grids(card: Card, path: File, grid: tuple[int, int], other: File, other_grid: tuple[int, int]) -> str:
    return (
        f"{card.name}: expected one resolution, got {grid[0]}x{grid[1]} in {path} and "
        f"{other_grid[0]}x{other_grid[1]} in {other}; keep them in separate folders"
    )


def _trajectory_bytes(frames: int, card: Card, grid: tuple[int, int]) -> int:
    return 4 * frames * len(card.state_channels) * grid[0] * grid[1]


def _divide(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges whose sizes add up to at most `limit`, or that hold a single item."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            yield first, index
            first, total = index, 0
        total += size
    yield first, len(sizes)


def _fingerprint(path: File) -> SourceFile:
    """Return what tells a file from others: its size, and a hash of blocks spread over it."""
    size, last = file_bytes(path), _FINGERPRINT_BLOCKS - 1
    starts = [block * max(size - _FINGERPRINT_BYTES, 0) // last for block in range(_FINGERPRINT_BLOCKS)]
    blocks = (read_range(path, start, min(start + _FINGERPRINT_BYTES, size)) for start in starts)
    return SourceFile(path.name, size, sha256(*blocks))


def stats_file(folder: Folder) -> File | None:
    """Return the stats.yaml of a dataset's folder, if it is there."""
    return child_file(folder, "stats.yaml") if "stats.yaml" in child_names(folder) else None


def _stats_source(folder: Folder, train: tuple[File, ...], card: Card) -> StatsSource:
    """Return where the statistics come from. Raises UserError if stats.yaml is bad, or if there is no file at all."""
    path = stats_file(folder)
    if path is not None:
        read_stats(path, card)
        return StatsSource(path, train, f"{FROM_FILE} {sha256(read_small(path))}")
    if not train:
        raise UserError(
            f"{card.name}: expected {folder}/stats.yaml, or train files to compute the statistics from, got neither; "
            "download stats.yaml or the train split"
        )
    return StatsSource(None, train, f"{FROM_DATA} {digest([_fingerprint(file) for file in train])}")
