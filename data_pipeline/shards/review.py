"""Which shards there are, and tables of what the audit found in them.

The audit of a Well or of a folder of shards: every frame is read once, nothing is written.
"""

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.files import UserError
from data_pipeline.registry import Card, Registry
from data_pipeline.remote import is_url
from data_pipeline.schema import encode
from data_pipeline.shards.audit import Interval, Summary, TrajectoryAudit, condense, merge, split_findings
from data_pipeline.shards.build import FROM_FILE
from data_pipeline.shards.format import ITEM_BYTES, MANIFEST_NAME, SEVERITIES, Finding, Manifest
from data_pipeline.shards.plan import choose_folders, stats_file
from data_pipeline.shards.tar import MAX_ERROR, from_float16, map_shard
from data_pipeline.tables import plain
from data_pipeline.well.hdf5 import SPLITS, WellFile, block_frames, split_files
from data_pipeline.well.layout import File, Folder, child_file, file_bytes, folder_at
from data_pipeline.well.stats import Stats, read_stats
from data_pipeline.workers import OnBytes, available_cores, run_tasks

TEXT_COLUMNS = {"dataset", "split", "boundary x", "boundary y", "stats", "stored", "findings"}
TEXT_COLUMNS |= {"kind", "severity", "finding"}
FINDING_COLUMNS = ("dataset", "split", "severity", "kind", "finding")


def find_manifests(
    shards: Path, datasets: Sequence[str] | None = None, splits: Sequence[str] | None = None
) -> dict[Path, Manifest]:
    """Folder -> manifest of every dataset and split under `shards`, by name, splits in the order train, valid, test.

    Raises UserError if there is none, if one that was asked for is missing, or if a manifest is damaged.
    """
    if datasets is None:
        datasets = sorted({path.parts[-3] for path in shards.glob(f"*/*/{MANIFEST_NAME}")})
    folders = []
    for dataset in datasets:
        present = [split for split in SPLITS if (shards / dataset / split / MANIFEST_NAME).exists()]
        missing = [split for split in splits or () if split not in present]
        if missing or not present:
            raise UserError(
                f"{shards / dataset}: expected shards of {', '.join(missing) or 'any split'}, got "
                f"{', '.join(present) or 'none'}; make them with `data-pipeline shard`"
            )
        folders += [shards / dataset / split for split in present if splits is None or split in splits]
    if not folders:
        raise UserError(
            f"{shards}: expected <dataset>/<split>/{MANIFEST_NAME}, got none; make shards with `data-pipeline shard`"
        )
    return {folder: Manifest.load(folder / MANIFEST_NAME) for folder in folders}


Found = tuple[str, str, Finding]  # dataset, split, finding


def findings_table(found: Sequence[Found], limit: int | None) -> str:
    """A line per finding, the most severe of a dataset first; what several splits have in common stands in one line.

    `limit` is for each dataset, without notes, and the rest is counted; None shows all.
    """
    rows: list[list[str]] = []
    hidden: list[Finding] = []
    for dataset in dict.fromkeys(dataset for dataset, _, _ in found):
        splits: dict[Finding, list[str]] = {}
        for owner, split, finding in found:
            if owner == dataset:
                splits.setdefault(finding, []).append(split)
        mine = sorted(splits, key=lambda one: SEVERITIES.index(one.severity))
        shown = mine if limit is None else [one for one in mine if one.severity != "note"][:limit]
        hidden += [one for one in mine[len(shown) :] for _ in splits[one]]
        rows += [[dataset, ",".join(splits[f]), f.severity, f.kind, f"{f.where}: {f.detail}"] for f in shown]
    lines = [plain(FINDING_COLUMNS, rows, TEXT_COLUMNS)] if rows else []
    if hidden:
        lines.append(f"not shown: {count_severities(hidden)}; `data-pipeline inspect DIR --findings` lists all")
    return "\n".join(lines)


def count_severities(findings: Sequence[Finding]) -> str:
    """`1 error, 2 warnings, 3 notes`, without those that are none; empty if there are none."""
    counts = Counter(finding.severity for finding in findings)
    return ", ".join(f"{counts[one]} {one}{'s' * (counts[one] > 1)}" for one in SEVERITIES if counts[one])


@dataclass(frozen=True)
class Review:
    """What was found in one dataset and split."""

    dataset: str
    split: str
    num_trajectories: int
    num_frames: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class _FileTask:
    number: int
    card: Card
    split: str
    file: File
    stats: Stats | None


@dataclass(frozen=True)
class _ShardTask:
    number: int
    card: Card
    split: str
    folder: Path
    shard: int


@dataclass(frozen=True)
class _Seen:
    """What one task saw."""

    findings: tuple[Finding, ...]
    samples: tuple[Summary, ...]  # one, or none if no trajectory could be read
    lengths: tuple[int, ...]
    grid: tuple[int, int] | None


def audit(
    location: str | Path,
    registry: Registry,
    datasets: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    jobs: int | None = None,
) -> list[Review]:
    """Reads the HDF5 files of a Well (a folder or a URL), or the shards of a folder that holds manifests.

    A file that cannot be read is a finding; UserError is raised where there is nothing to read.
    """
    for split in splits or ():
        if split not in SPLITS:
            raise UserError(f"split {split!r}: expected {', '.join(SPLITS)}")
    jobs = jobs or available_cores()
    if not is_url(location) and any(Path(location).glob(f"*/*/{MANIFEST_NAME}")):
        return _audit_shards(Path(location), registry, datasets, splits, jobs)
    return _audit_well(folder_at(location), registry, datasets, splits, jobs)


def _audit_well(
    well: Folder, registry: Registry, datasets: Sequence[str] | None, splits: Sequence[str] | None, jobs: int
) -> list[Review]:
    tasks: list[_FileTask] = []
    stats: dict[str, Stats] = {}
    spoilt: dict[str, Finding] = {}
    for name, folder in choose_folders(well, datasets, registry).items():
        card = registry.card(name)
        if stats_file(folder) is not None:
            try:
                stats[name] = read_stats(child_file(folder, "stats.yaml"), card)
            except UserError as error:
                spoilt[name] = _unreadable("stats.yaml", error)
        for split in SPLITS if splits is None else splits:
            for file in split_files(folder, split):
                tasks.append(_FileTask(len(tasks), card, split, file, stats.get(name)))
    if not tasks:
        raise UserError(f"{well}: expected HDF5 files in <dataset>/data/<split>, got none; get these splits")
    num_bytes = sum(file_bytes(task.file) for task in tasks)
    with closing(run_tasks(_see_file, tasks, jobs, num_bytes, "audit")) as results:
        seen = {task.number: result for task, result in results}
    reviews = []
    for name, split in dict.fromkeys((task.card.name, task.split) for task in tasks):
        mine = [task for task in tasks if (task.card.name, task.split) == (name, split)]
        extra = [spoilt.pop(name)] if name in spoilt else []  # once
        claimed = stats.get(name) if split == "train" else None
        reviews.append(_reviewed(mine[0].card, split, [seen[task.number] for task in mine], claimed, registry, extra))
    return reviews


def _see_file(task: _FileTask, on_bytes: OnBytes) -> _Seen:
    """Audits all trajectories of one HDF5 file."""
    card, name = task.card, task.file.name
    findings: list[Finding] = []
    samples: list[Summary] = []
    lengths: list[int] = []
    grid = None
    std = None if task.stats is None else task.stats["std"]
    try:
        with WellFile(task.file, card) as file:
            grid = file.grid
            share = file_bytes(task.file) // file.num_trajectories  # of the bar
            for trajectory in range(file.num_trajectories):
                audit = TrajectoryAudit(card.state_channels, card.constant_channels, grid, std, card.ranges)
                file.dt(trajectory), file.scalars(trajectory)  # raise if they are no numbers
                if card.constant_channels:
                    audit.add_constants(file.constants(trajectory))
                for frames in _file_blocks(file, trajectory):
                    audit.add(frames)
                findings += audit.findings(name, trajectory)
                samples.append(audit.summary())
                lengths.append(file.num_frames)
                on_bytes(share)
    except UserError as error:
        findings.append(_unreadable(name, error))
    return _Seen(tuple(findings), (merge(samples),) if samples else (), tuple(lengths), grid)


def _file_blocks(file: WellFile, trajectory: int) -> Iterator[np.ndarray]:
    """The frames of one trajectory, (T, C, H, W) at a time, in two buffers by turns."""
    shape = (len(file.card.state_channels), *file.grid)
    step = min(block_frames(4 * int(np.prod(shape))), file.num_frames)
    buffers = [np.empty((step, *shape), np.float32) for _ in range(2)]
    for turn, first in enumerate(range(0, file.num_frames, step)):
        stop = min(first + step, file.num_frames)
        yield file.read(trajectory, first, stop, buffers[turn % 2][: stop - first])


def _audit_shards(
    shards: Path, registry: Registry, datasets: Sequence[str] | None, splits: Sequence[str] | None, jobs: int
) -> list[Review]:
    manifests = find_manifests(shards, datasets, splits)
    tasks: list[_ShardTask] = []
    for folder, manifest in manifests.items():
        card = registry.card(manifest.dataset)
        if (card.state_channels, card.constant_channels) != (manifest.state_channels, manifest.constant_channels):
            raise UserError(
                f"{folder}: its channels are not those of the card {card.name!r}; make the shards again, or give the "
                "folder of your own cards with --registry"
            )
        for shard in range(len(manifest.shards)):
            tasks.append(_ShardTask(len(tasks), card, manifest.split, folder, shard))
    num_bytes = sum(shard.bytes for manifest in manifests.values() for shard in manifest.shards)
    with closing(run_tasks(_see_shard, tasks, jobs, num_bytes, "audit")) as results:
        seen = {task.number: result for task, result in results}
    reviews = []
    for folder, manifest in manifests.items():
        mine = [seen[task.number] for task in tasks if task.folder == folder]
        claimed = manifest.split == "train" and manifest.stats_source == FROM_FILE and not _has_gaps(manifest)
        card = registry.card(manifest.dataset)
        reviews.append(_reviewed(card, manifest.split, mine, manifest.stats if claimed else None, registry, []))
    return reviews


def _has_gaps(manifest: Manifest) -> bool:
    """Whether trajectories of its files were left out (`--restrict`), as far as their numbers show."""
    held = {(one.source, one.source_index) for one in manifest.trajectories}
    files = {source for source, _ in held}
    return len(files) < len(manifest.sources) or any(at and (source, at - 1) not in held for source, at in held)


@lru_cache(maxsize=4)
def _manifest(folder: Path) -> Manifest:
    return Manifest.load(folder / MANIFEST_NAME)


def _see_shard(task: _ShardTask, on_bytes: OnBytes) -> _Seen:
    """Audits all trajectories of one shard."""
    manifest = _manifest(task.folder)
    shard = manifest.shards[task.shard]
    findings: list[Finding] = []
    samples: list[Summary] = []
    lengths: list[int] = []
    try:
        content = map_shard(task.folder / shard.name, shard.bytes)
    except UserError as error:
        return _Seen((_unreadable(shard.name, error),), (), (), manifest.grid)
    ranges = _widened(task.card.ranges, manifest)
    for number, trajectory in enumerate(manifest.trajectories):
        if trajectory.shard != task.shard:
            continue
        audit = TrajectoryAudit(
            manifest.state_channels, manifest.constant_channels, manifest.grid, manifest.stats["std"], ranges
        )
        if trajectory.constants_offset is not None:
            count = manifest.constants_bytes // 4
            constants = np.frombuffer(content, "<f4", count, trajectory.constants_offset)
            audit.add_constants(constants.reshape(-1, *manifest.grid))
        for chunk, offset in enumerate(trajectory.offsets):
            for frames in _chunk_blocks(manifest, content, offset, manifest.chunk_frames(number, chunk)):
                audit.add(frames)
                on_bytes(len(frames) * manifest.frame_bytes)
        findings += audit.findings(manifest.sources[trajectory.source].name, trajectory.source_index)
        samples.append(audit.summary())
        lengths.append(trajectory.frames)
    return _Seen(tuple(findings), (merge(samples),) if samples else (), tuple(lengths), manifest.grid)


def _widened(ranges: Mapping[str, Interval], manifest: Manifest) -> Mapping[str, Interval]:
    """The card's ranges and what float16 may add: the values themselves were looked at before they were rounded."""
    wide = dict(ranges)
    for name, (_, scale) in manifest.encoding.items():
        if name in wide:
            lowest, highest = wide[name]
            slack = MAX_ERROR * scale
            wide[name] = None if lowest is None else lowest - slack, None if highest is None else highest + slack
    return wide


def _chunk_blocks(manifest: Manifest, content: mmap.mmap, offset: int, count: int) -> Iterator[np.ndarray]:
    """The frames of one chunk, float32 (T, C, H, W) at a time."""
    size = ITEM_BYTES[manifest.dtype]
    step = block_frames(manifest.frame_bytes)
    for first in range(0, count, step):
        num = min(step, count - first)
        start = offset + first * manifest.frame_bytes
        stored = np.frombuffer(content, f"<f{size}", num * manifest.frame_bytes // size, start)
        frames = stored.reshape(num, *manifest.frame_shape)
        if manifest.encoding:
            pairs = [manifest.encoding[name] for name in manifest.state_channels]
            offsets, scales = (np.array(one, np.float32)[:, None, None] for one in zip(*pairs, strict=True))
            frames = from_float16(frames, offsets, scales)
        yield frames


def _reviewed(
    card: Card,
    split: str,
    seen: Sequence[_Seen],
    stats: Stats | None,
    registry: Registry,
    extra: Sequence[Finding],
) -> Review:
    findings = [*extra, *(finding for one in seen for finding in one.findings)]
    grids = sorted({one.grid for one in seen if one.grid is not None})
    lengths = [length for one in seen for length in one.lengths]
    samples = [sample for one in seen for sample in one.samples]
    if samples:
        findings += split_findings(card, registry.channel_cards, merge(samples), lengths, grids[0], stats)
    if len(grids) > 1:
        detail = f"more than one in a split, which no shards hold: {', '.join(f'{x}x{y}' for x, y in grids)}"
        findings.append(Finding("grid", "error", "", None, None, (), detail))
    return Review(card.name, split, len(lengths), sum(lengths), tuple(condense(findings, len(lengths))))


def _unreadable(name: str, error: UserError) -> Finding:
    return Finding("unreadable", "error", name, None, None, (), " ".join(str(error).split()))


def as_json(reviews: Sequence[Review]) -> list[Mapping[str, object]]:
    """One entry per dataset and split, findings in it."""
    return [encode(review) for review in reviews]


def as_text(reviews: Sequence[Review]) -> str:
    """A table of all findings, a line per dataset and split without any, and the counts."""
    found = [(review.dataset, review.split, finding) for review in reviews for finding in review.findings]
    lines = [findings_table(found, None)] if found else []
    clean = [f"{review.dataset}, {review.split}" for review in reviews if not review.findings]
    if clean:
        lines.append(f"nothing found: {'; '.join(clean)}")
    total = count_severities([finding for _, _, finding in found]) or "no findings"
    num_frames = sum(review.num_frames for review in reviews)
    num_trajectories = sum(review.num_trajectories for review in reviews)
    lines.append(f"{total} in {num_trajectories} trajectories, {num_frames} frames")
    return "\n".join(lines)
