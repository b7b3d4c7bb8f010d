"""HDF5 -> shards: one task per shard, in parallel, resumable, with the same bytes whatever the number of jobs.

A shard gets its final name when it is whole, then a record under `.partial/`. When all records of a split are there,
they become its manifest.json, and the records are removed. So a killed run continues where it stopped, and a folder
without a manifest is never taken for a finished one.
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline import __version__
from data_pipeline.errors import UserError
from data_pipeline.files import TEMPORARY_SUFFIX, inside, only_process, read_json, write_whole
from data_pipeline.registry import Card, Channel, Registry, load_registry
from data_pipeline.remote import is_url
from data_pipeline.schema import canonical, validate
from data_pipeline.shards.audit import merge, split_findings
from data_pipeline.shards.convert import PARTIAL, ShardRecord, ShardTask, saved_record, write_shard
from data_pipeline.shards.format import MANIFEST_NAME, Manifest, usable_segments
from data_pipeline.shards.plan import DEFAULTS, Settings, SplitPlan, StatsSource, plan_all
from data_pipeline.shards.tar import check_shard, encoding_of
from data_pipeline.well.findings import SKIPPABLE, Finding, condense, copies
from data_pipeline.well.layout import file_bytes
from data_pipeline.well.stats import Stats, compute_stats, read_stats
from data_pipeline.workers import OnBytes, available_cores, run_tasks

_STATS_NAME = "stats.json"  # of the statistics that were computed, in the folder of the dataset's shards


@dataclass(frozen=True)
class Built:
    """What a run did for one dataset and split."""

    manifest: Manifest
    folder: Path
    reused: bool  # its shards were finished before
    windows_changed: bool = False  # they were, with another `skip`: the manifest was written again


def build_shards(
    well: str | Path,
    out: Path,
    datasets: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    jobs: int | None = None,
    settings: Settings = DEFAULTS,
    skip: Sequence[str] = (),
    registry: Registry | None = None,
) -> list[Built]:
    """Convert a folder or URL of a Well, `<well>/<dataset>/data/<split>/*.hdf5`, to `<out>/<dataset>/<split>/`.

    `datasets` None takes those with a card, `splits` None those with files, `jobs` None a process for each core.
    `skip` names the kinds of findings whose windows are left out. What is finished is kept, whatever its `skip`. After
    a kill the same call continues, and the bytes are the same. A job holds a few MiB of frames in memory. Raises
    UserError if something is wrong with the files or the arguments, or if the disk is full; no half-written file stays.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs: expected at least 1, got {jobs}")
    for kind in skip:
        if kind not in SKIPPABLE:
            raise UserError(f"skip: expected {', '.join(SKIPPABLE)}, got {kind!r}")
    chosen = tuple(kind for kind in SKIPPABLE if kind in skip)
    if is_url(out):
        raise UserError(f"{out}: expected a local folder for the shards; upload them when they are whole")
    out, jobs, registry = Path(out), jobs or available_cores(), registry or load_registry()
    plans = plan_all(well, out, datasets, splits, settings, registry)
    for plan in plans:
        inside(out, plan.folder.relative_to(out))
    with only_process(out, "`data-pipeline shard`"):
        done = {plan.folder: built for plan in plans if (built := _reuse(plan, chosen)) is not None}
        pending = [plan for plan in plans if plan.folder not in done]
        stats = _dataset_stats(out, pending, jobs, "nonfinite" in chosen)
        for folder, manifest in _write_all(pending, stats, jobs, chosen, registry.channel_cards):
            done[folder] = Built(manifest, folder, reused=False)
    return [done[plan.folder] for plan in plans]


def _reuse(plan: SplitPlan, skip: tuple[str, ...]) -> Built | None:
    """Return what an earlier run finished, with its windows chosen again if its `skip` was another; or None.

    Raises UserError as `finished_manifest` does.
    """
    for folder in (plan.folder, plan.folder.parent):
        for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):  # of a killed run: we hold the lock
            leftover.unlink()
    manifest = finished_manifest(plan)
    if manifest is None:
        return None
    changed = manifest.skip != skip
    if changed:
        manifest = choose_windows(manifest, skip)
        manifest.save(plan.folder / MANIFEST_NAME)
    shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
    return Built(manifest, plan.folder, reused=True, windows_changed=changed)


def finished_manifest(plan: SplitPlan) -> Manifest | None:
    """Return the manifest of the shards that an earlier run made of this plan; None if it was not finished.

    Raises UserError if they were made from other files or settings, or are not all there.
    """
    path = plan.folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = Manifest.load(path)
    if manifest.plan != plan.digest:
        raise UserError(
            f"{plan.folder}: holds shards of other files or settings than {plan.files[0]} and its like; remove this "
            "folder to make them again, or choose another --out"
        )
    for shard in manifest.shards:
        check_shard(plan.folder / shard.name, shard.bytes)
    return manifest


@dataclass(frozen=True)
class _StatsTask:
    """Statistics to compute from the train files of a dataset and to keep in `path`."""

    card: Card
    source: StatsSource
    frames_per_chunk: int
    path: Path
    skip_nonfinite: bool

    def saved(self) -> Stats | None:
        if not self.path.exists():
            return None
        content = read_json(self.path)
        return validate(Stats, content.get("stats"), str(self.path)) if content.get("key") == self.source.key else None


def _dataset_stats(out: Path, plans: Sequence[SplitPlan], jobs: int, skip_nonfinite: bool) -> dict[str, Stats]:
    """Return dataset -> statistics, from its stats.yaml or from its train files, which are read once.

    skip_nonfinite: leave out frames with NaN or Inf, which otherwise raise UserError.
    """
    found: dict[str, Stats] = {}
    tasks = []
    for plan in {plan.card.name: plan for plan in plans}.values():
        card, source = plan.card, plan.stats_source
        if source.file is not None:
            found[card.name] = read_stats(source.file, card)
            continue
        task = _StatsTask(card, source, plan.frames_per_chunk, out / card.name / _STATS_NAME, skip_nonfinite)
        saved = task.saved()
        if saved is None:
            tasks.append(task)
        else:
            found[card.name] = saved
    # The size of the files, for the progress bar, is close to the bytes that are read.
    num_bytes = sum(file_bytes(file) for task in tasks for file in task.source.train)
    with closing(run_tasks(_compute_and_save, tasks, jobs, num_bytes, "statistics")) as results:
        found |= {task.card.name: stats for task, stats in results}
    return found


def _compute_and_save(task: _StatsTask, on_bytes: OnBytes) -> Stats:
    stats = compute_stats(task.source.train, task.card, task.frames_per_chunk, on_bytes, task.skip_nonfinite)
    write_whole(task.path, canonical({"key": task.source.key, "stats": stats}))
    return stats


def _write_all(
    plans: Sequence[SplitPlan],
    stats: Mapping[str, Stats],
    jobs: int,
    skip: tuple[str, ...],
    channels: Mapping[str, Channel],
) -> Iterator[tuple[Path, Manifest]]:
    """Write the shards that are not there yet; yield folder and manifest of each split as soon as it is whole."""
    records = {plan.folder: _saved_records(plan) for plan in plans}
    tasks = [
        ShardTask(plan, shard, stats[plan.card.name], keep_nonfinite="nonfinite" in skip)
        for plan in plans
        for shard in range(len(plan.shards))
        if shard not in records[plan.folder]
    ]
    num_bytes = sum(task.plan.source_bytes(task.shard) for task in tasks)

    def finish(plan: SplitPlan) -> Manifest:
        return _finish_split(plan, records[plan.folder], stats[plan.card.name], skip, channels)

    for plan in plans:
        if len(records[plan.folder]) == len(plan.shards):  # killed just before its manifest was written
            yield plan.folder, finish(plan)
    with closing(run_tasks(write_shard, tasks, jobs, num_bytes, "shards")) as results:
        for task, record in results:
            done = records[task.plan.folder]
            done[task.shard] = record
            if len(done) == len(task.plan.shards):
                yield task.plan.folder, finish(task.plan)


def _saved_records(plan: SplitPlan) -> dict[int, ShardRecord]:
    """Return the records of the shards that an earlier run finished; remove other shards from the folder."""
    found = ((shard, saved_record(plan, shard)) for shard in range(len(plan.shards)))
    records = {shard: record for shard, record in found if record is not None}
    kept = {record.shard.name for record in records.values()}
    for path in plan.folder.glob("shard-*.tar"):
        if path.name not in kept and re.fullmatch(r"shard-\d{6,}\.tar", path.name):
            path.unlink()
    return records


def _finish_split(
    plan: SplitPlan,
    records: Mapping[int, ShardRecord],
    stats: Stats,
    skip: tuple[str, ...],
    channels: Mapping[str, Channel],
) -> Manifest:
    """Write the manifest, which makes the split whole, then remove the records."""
    ordered = [records[index] for index in range(len(plan.shards))]
    channel_names = plan.card.state_channels
    manifest = Manifest(
        dataset=plan.card.name,
        split=plan.split,
        state_channels=channel_names,
        constant_channels=plan.card.constant_channels,
        grid=plan.grid,
        boundary=plan.boundary,
        dt=plan.trajectories[0].dt,
        frames_per_chunk=plan.frames_per_chunk,
        dtype=plan.dtype,
        encoding=encoding_of(channel_names, stats) if plan.dtype == "float16" else {},
        stats=stats,
        stats_source=plan.stats_source.name,
        sources=plan.sources,
        trajectories=tuple(trajectory for record in ordered for trajectory in record.trajectories),
        shards=tuple(record.shard for record in ordered),
        findings=(),
        skip=(),
        converter=f"data-pipeline {__version__}",
        plan=plan.digest,
        spacing=plan.spacing,
    )
    repeated = [finding for _, finding in copies(manifest.stored_frames())]
    manifest = replace(manifest, findings=_findings(plan, ordered, stats, channels, repeated))
    manifest = choose_windows(manifest, skip)
    manifest.save(plan.folder / MANIFEST_NAME)
    shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
    return manifest


def _findings(
    plan: SplitPlan,
    records: Sequence[ShardRecord],
    stats: Stats,
    channels: Mapping[str, Channel],
    repeated: Sequence[Finding],
) -> tuple[Finding, ...]:
    stated = plan.stats_source.file is not None and plan.split == "train" and plan.whole  # to describe these data
    found = [*plan.findings, *repeated, *(finding for record in records for finding in record.findings)]
    found += split_findings(
        plan.card,
        channels,
        merge([record.summary for record in records]),
        [trajectory.frames for trajectory in plan.trajectories],
        plan.grid,
        stats if stated else None,
    )
    if plan.dtype == "float16":
        worst = np.max([record.rounding for record in records], axis=0)
        for name, error in zip(plan.card.state_channels, worst, strict=True):
            found.append(Finding("rounding", "note", "", None, name, (), f"float16 is off by at most {error:.2g} std"))
    return tuple(condense(found, len(plan.trajectories)))


def choose_windows(manifest: Manifest, skip: tuple[str, ...]) -> Manifest:
    """Return the manifest with the windows that remain when findings of the kinds in `skip` are left out.

    Raises UserError if it holds NaN or Inf and these are not left out.
    """
    by_trajectory: dict[tuple[str, int | None], list[Finding]] = defaultdict(list)
    for finding in manifest.findings:
        if finding.kind == "nonfinite" and "nonfinite" not in skip:
            raise UserError(
                f"{manifest.dataset}, {manifest.split}: {finding.file}, trajectory {finding.trajectory}, channel "
                f"{finding.channel}: NaN or Inf, in shards that were made with `--skip nonfinite`; give it again"
            )
        by_trajectory[finding.file, finding.trajectory].append(finding)
    trajectories = []
    for trajectory in manifest.trajectories:
        found = by_trajectory[manifest.sources[trajectory.source].name, trajectory.source_index]
        segments = usable_segments(trajectory.frames, found, skip)
        trajectories.append(replace(trajectory, segments=segments))
    return replace(manifest, trajectories=tuple(trajectories), skip=skip)
