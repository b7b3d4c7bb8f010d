"""The audit of a Well or of a folder of shards, and tables of its findings. Every frame is read once."""

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.registry import Card, Registry
from data_pipeline.remote import is_url
from data_pipeline.shards.audit import Interval, Summary, TrajectoryAudit, merge, split_findings
from data_pipeline.shards.format import ITEM_BYTES, MANIFEST_NAME, Manifest
from data_pipeline.shards.plan import FROM_FILE, choose_folders, stats_file
from data_pipeline.shards.tar import MAX_ERROR, array_crcs, from_float16, map_shard
from data_pipeline.tables import plain
from data_pipeline.well.findings import (
    OF_HEADERS,
    SEVERITIES,
    Finding,
    Spacing,
    StoredFrames,
    condense,
    copies,
    left_out_findings,
    spacing_findings,
)
from data_pipeline.well.hdf5 import SPLITS, WellFile, block_frames, chosen_splits, left_out_names, split_files
from data_pipeline.well.layout import File, Folder, file_bytes, folder_at
from data_pipeline.well.stats import Stats, read_stats
from data_pipeline.workers import OnBytes, available_cores, run_tasks

FINDING_COLUMNS = ("dataset", "split", "severity", "kind", "finding")
TEXT_COLUMNS = {*FINDING_COLUMNS, "boundary x", "boundary y", "stats", "stored", "findings"}


@dataclass(frozen=True)
class Review:
    """The findings about one dataset and split."""

    dataset: str
    split: str
    num_trajectories: int
    num_frames: int
    findings: tuple[Finding, ...]


def audit(
    location: str | Path,
    registry: Registry,
    datasets: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    jobs: int | None = None,
) -> list[Review]:
    """Audit the HDF5 files of a Well (a folder or a URL), or the shards of a folder that holds manifests.

    A file that cannot be read is a finding. Raises UserError where there is nothing to read.
    """
    chosen = chosen_splits(splits)
    if not is_url(location) and any(Path(location).glob(f"*/*/{MANIFEST_NAME}")):
        found = _shard_splits(Path(location), registry, datasets, splits)
    else:
        found = _well_splits(folder_at(location), registry, datasets, chosen)
    tasks = [(number, source) for number, source in enumerate(source for split in found for source in split.sources)]
    num_bytes = sum(source.num_bytes for _, source in tasks)
    with closing(run_tasks(_audit_source, tasks, jobs or available_cores(), num_bytes, "audit")) as results:
        by_number = {number: result for (number, _), result in results}
    in_order = iter([by_number[number] for number in range(len(tasks))])
    of_splits = [(split, [next(in_order) for _ in split.sources]) for split in found]
    repeated = _copies((split.card.name, one.stored) for split, own in of_splits for one in own)
    return [
        split.review(own, registry, [finding for *key, finding in repeated if key == [split.card.name, split.split]])
        for split, own in of_splits
    ]


def _copies(stored: Iterable[tuple[str, Sequence[StoredFrames]]]) -> list[tuple[str, str, Finding]]:
    """Return dataset, split and finding of each trajectory that its dataset holds twice, in whichever splits."""
    by_dataset: dict[str, list[StoredFrames]] = {}
    for dataset, trajectories in stored:
        by_dataset.setdefault(dataset, []).extend(trajectories)
    return [(dataset, *one) for dataset, trajectories in by_dataset.items() for one in copies(trajectories)]


def across_splits(manifests: Iterable[Manifest]) -> list[tuple[str, str, Finding]]:
    """Return dataset, split and finding of what only the splits of a dataset together show.

    A manifest holds no such finding, since the splits may be made one by one.
    """
    manifests = list(manifests)
    own = {(one.dataset, one.split, finding) for one in manifests for finding in one.findings}
    found = _copies((one.dataset, one.stored_frames()) for one in manifests)
    for dataset in dict.fromkeys(one.dataset for one in manifests):
        spacings = [(one.split, one.spacing) for one in manifests if one.dataset == dataset]
        found += [(dataset, one.file, replace(one, file="")) for one in spacing_findings(spacings)]
    return [one for one in found if one not in own]


@dataclass(frozen=True)
class _Result:
    findings: tuple[Finding, ...]
    summary: Summary | None  # None if no trajectory could be read
    stored: tuple[StoredFrames, ...]  # of each trajectory
    grid: tuple[int, int] | None
    spacings: tuple[tuple[str, Spacing | None], ...] = ()  # of each file

    @property
    def lengths(self) -> list[int]:
        return [len(one.frames) for one in self.stored]


@dataclass(frozen=True)
class _Split:
    """A dataset and split to audit."""

    card: Card
    split: str
    sources: "Sequence[_HdfSource | _ShardSource]"
    claimed: Stats | None  # statistics that are stated to be those of this very data
    findings: tuple[Finding, ...] = ()  # known beforehand

    def review(self, results: Sequence[_Result], registry: Registry, repeated: Sequence[Finding]) -> Review:
        """Put the results of the sources together, and add the findings about the whole split."""
        findings = [*self.findings, *repeated, *(finding for one in results for finding in one.findings)]
        findings += spacing_findings([spacing for one in results for spacing in one.spacings])
        grids = sorted({one.grid for one in results if one.grid is not None})
        lengths = [length for one in results for length in one.lengths]
        summaries = [one.summary for one in results if one.summary is not None]
        if summaries:
            merged = merge(summaries)
            findings += split_findings(self.card, registry.channel_cards, merged, lengths, grids[0], self.claimed)
        if len(grids) > 1:
            detail = f"more than one in a split, which no shards hold: {', '.join(f'{x}x{y}' for x, y in grids)}"
            findings.append(Finding("grid", "error", "", None, None, (), detail))
        condensed = tuple(condense(findings, len(lengths)))
        return Review(self.card.name, self.split, len(lengths), sum(lengths), condensed)


def _audit_source(task: "tuple[int, _HdfSource | _ShardSource]", on_bytes: OnBytes) -> _Result:
    _, source = task
    findings: list[Finding] = []
    summaries: list[Summary] = []
    stored: list[StoredFrames] = []
    spacings: dict[str, Spacing | None] = {}
    grid = None
    try:
        for one, audit in source.audits(on_bytes, findings, spacings):
            findings += audit.findings(one.file, one.index)
            summaries.append(audit.summary())
            stored.append(one)
            grid = audit.grid
    except UserError as error:
        findings.append(_unreadable(source.name, error))
    summary = merge(summaries) if summaries else None
    return _Result(tuple(findings), summary, tuple(stored), grid, tuple(spacings.items()))


def _unreadable(name: str, error: UserError) -> Finding:
    return Finding("unreadable", "error", name, None, None, (), " ".join(str(error).split()))


def _well_splits(
    well: Folder, registry: Registry, datasets: Sequence[str] | None, splits: Sequence[str]
) -> list[_Split]:
    found, folders = [], choose_folders(well, datasets, registry)
    for name, folder in folders.items():
        card, stats, known = registry.card(name), None, list[Finding]()
        path = stats_file(folder)
        try:
            stats = None if path is None else read_stats(path, card)
        except UserError as error:
            known.append(_unreadable("stats.yaml", error))
        beside = left_out_names(folder, None)
        for split in splits:
            files: Sequence[File] = split_files(folder, split)
            if files:
                known += left_out_findings([*left_out_names(folder, split), *beside])
                std = None if stats is None else stats["std"]
                sources = [_HdfSource(card, split, file, std) for file in files]
                found.append(_Split(card, split, sources, stats if split == "train" else None, tuple(known)))
                known, beside = [], []  # reported once for a dataset
    if not found:
        names = [
            name for folder in folders.values() for split in (*splits, None) for name in left_out_names(folder, split)
        ]
        others = "".join(f"; {one.detail}" for one in left_out_findings(names)) or "; get these splits"
        raise UserError(f"{well}: expected HDF5 files in <dataset>/data/<split>, got none{others}")
    return found


@dataclass(frozen=True)
class _HdfSource:
    card: Card
    split: str
    file: File
    std: Mapping[str, float] | None

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def num_bytes(self) -> int:
        return file_bytes(self.file)

    def audits(
        self, on_bytes: OnBytes, findings: list[Finding], spacings: dict[str, Spacing | None]
    ) -> Iterator[tuple[StoredFrames, TrajectoryAudit]]:
        """Yield the checksums and the audit of each trajectory; add what the header shows to `findings`, `spacings`."""
        card = self.card
        with WellFile(self.file, card) as file:
            findings += file.findings()
            spacings[self.name] = file.spacing
            step = block_frames(4 * len(card.state_channels) * file.grid[0] * file.grid[1])
            for index in range(file.num_trajectories):
                audit = TrajectoryAudit(card.state_channels, card.constant_channels, file.grid, self.std, card.ranges)
                file.dt(index), file.scalars(index)  # raise UserError if they are no numbers
                if card.constant_channels:
                    audit.add_constants(file.constants(index))
                crcs = []
                for first in range(0, file.num_frames, step):
                    frames = file.read(index, first, min(first + step, file.num_frames))
                    audit.add(frames)
                    crcs.append(array_crcs(frames))
                yield StoredFrames(self.split, self.name, index, "".join(crcs)), audit
                on_bytes(self.num_bytes // file.num_trajectories)


def _shard_splits(
    shards: Path, registry: Registry, datasets: Sequence[str] | None, splits: Sequence[str] | None
) -> list[_Split]:
    found = []
    for folder, manifest in find_manifests(shards, datasets, splits).items():
        card = registry.card(manifest.dataset)
        if (card.state_channels, card.constant_channels) != (manifest.state_channels, manifest.constant_channels):
            raise UserError(
                f"{folder}: its channels are not those of the card {card.name!r}; make the shards again, or give the "
                "folder of your own cards with --registry"
            )
        sources = [_ShardSource(card, folder, shard.name, shard.bytes) for shard in manifest.shards]
        claimed = manifest.split == "train" and manifest.stats_source == FROM_FILE and not _has_gaps(manifest)
        known = tuple(finding for finding in manifest.findings if finding.kind in OF_HEADERS)
        found.append(_Split(card, manifest.split, sources, manifest.stats if claimed else None, known))
    return found


def _has_gaps(manifest: Manifest) -> bool:
    """Return whether trajectories of its files were left out (`--restrict`), as far as their numbers show."""
    held = {(one.source, one.source_index) for one in manifest.trajectories}
    files = {source for source, _ in held}
    return len(files) < len(manifest.sources) or any(at and (source, at - 1) not in held for source, at in held)


@lru_cache(maxsize=4)
def _manifest(folder: Path) -> Manifest:
    return Manifest.load(folder / MANIFEST_NAME)


@dataclass(frozen=True)
class _ShardSource:
    card: Card
    folder: Path
    name: str
    num_bytes: int

    def audits(
        self, on_bytes: OnBytes, findings: list[Finding], spacings: dict[str, Spacing | None]
    ) -> Iterator[tuple[StoredFrames, TrajectoryAudit]]:
        card, manifest = self.card, _manifest(self.folder)
        content = map_shard(self.folder / self.name, self.num_bytes)
        std, ranges, stored = manifest.stats["std"], self._ranges(manifest), manifest.stored_frames()
        for number, one in enumerate(manifest.trajectories):
            if manifest.shards[one.shard].name != self.name:
                continue
            audit = TrajectoryAudit(card.state_channels, card.constant_channels, manifest.grid, std, ranges)
            if one.constants_offset is not None:
                constants = np.frombuffer(content, "<f4", manifest.constants_bytes // 4, one.constants_offset)
                audit.add_constants(constants.reshape(-1, *manifest.grid))
            for frames in _stored_frames(manifest, content, number):
                audit.add(frames)
                on_bytes(len(frames) * manifest.frame_bytes)
            yield stored[number], audit

    def _ranges(self, manifest: Manifest) -> Mapping[str, Interval]:
        """Return the card's ranges, wider by the error of float16: values were in range before they were rounded."""
        wide = dict(self.card.ranges)
        for name, (_, scale) in manifest.encoding.items():
            if name in wide:
                (lowest, highest), slack = wide[name], MAX_ERROR * scale
                wide[name] = None if lowest is None else lowest - slack, None if highest is None else highest + slack
        return wide


def _stored_frames(manifest: Manifest, content: mmap.mmap, number: int) -> Iterator[np.ndarray]:
    """Yield the frames of one trajectory of a shard, float32 (T, C, H, W) at a time."""
    size, step = ITEM_BYTES[manifest.dtype], block_frames(manifest.frame_bytes)
    for chunk, offset in enumerate(manifest.trajectories[number].offsets):
        count = manifest.chunk_frames(number, chunk)
        for first in range(0, count, step):
            num_values = min(step, count - first) * manifest.frame_bytes // size
            stored = np.frombuffer(content, f"<f{size}", num_values, offset + first * manifest.frame_bytes)
            frames = stored.reshape(-1, *manifest.frame_shape)
            if manifest.encoding:
                encoding = [manifest.encoding[name] for name in manifest.state_channels]
                frames = from_float16(frames, *np.array(encoding, np.float32).T.reshape(2, -1, 1, 1))
            yield frames


def find_manifests(
    shards: Path, datasets: Sequence[str] | None = None, splits: Sequence[str] | None = None
) -> dict[Path, Manifest]:
    """Return folder -> manifest of every dataset and split under `shards`, by name, in the order train, valid, test.

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


def findings_table(found: Sequence[tuple[str, str, Finding]], limit: int | None) -> str:
    """Return a line for each finding of (dataset, split, finding), the most severe of a dataset first.

    A finding that several splits share stands in one line. `limit` is for each dataset, without notes, and the rest is
    counted; None shows all.
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
    """Return `1 error, 2 warnings, 3 notes`, without those that are none; empty if there are none."""
    counts = Counter(finding.severity for finding in findings)
    return ", ".join(f"{counts[one]} {one}{'s' * (counts[one] > 1)}" for one in SEVERITIES if counts[one])


def as_text(reviews: Sequence[Review]) -> str:
    """Return a table of all findings, the dataset and splits without any, and the counts."""
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
