"""The last step of a split: the records of its shards become the manifest, with findings and windows.

HDF5 -> shards: one task per shard, in parallel, resumable, with the same bytes whatever the number of jobs.

A shard gets its final name when it is whole, then a record under `.partial/`; when all records of a split are there,
manifest.json is written and the records go. So a killed run goes on where it stopped, and a folder without a manifest
is never taken for a finished one.
"""

import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline import __version__
from data_pipeline.files import TEMPORARY_SUFFIX, UserError, only_process
from data_pipeline.registry import Channel, Registry, load_registry
from data_pipeline.remote import is_url
from data_pipeline.shards.audit import condense, merge, split_findings
from data_pipeline.shards.convert import FROM_FILE, PARTIAL, Part, ShardTask, dataset_stats, saved_part, write_shard
from data_pipeline.shards.format import MANIFEST_NAME, SKIPPABLE, Finding, Manifest, usable_segments
from data_pipeline.shards.plan import Plan, Settings, plan_dataset
from data_pipeline.shards.tar import check_shard, encoding_of
from data_pipeline.well.hdf5 import dataset_folders
from data_pipeline.well.layout import Folder, folder_at
from data_pipeline.well.stats import Stats
from data_pipeline.workers import available_cores, run_tasks


def finish_split(
    plan: Plan,
    parts: Mapping[int, Part],
    stats: Stats,
    stats_source: str,
    skip: tuple[str, ...],
    channels: Mapping[str, Channel],
) -> Manifest:
    """Writes the manifest, which makes the split whole, then removes the records."""
    ordered = [parts[index] for index in range(len(plan.shards))]
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
        stats_source=stats_source,
        sources=plan.sources,
        trajectories=tuple(trajectory for part in ordered for trajectory in part.trajectories),
        shards=tuple(part.shard for part in ordered),
        findings=_findings(plan, ordered, stats if stats_source == FROM_FILE else None, channels),
        skip=(),
        converter=f"data-pipeline {__version__}",
        plan=plan.digest,
    )
    manifest = choose_windows(manifest, skip)
    manifest.save(plan.folder / MANIFEST_NAME)
    shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
    return manifest


def choose_windows(manifest: Manifest, skip: tuple[str, ...]) -> Manifest:
    """The same manifest with the windows that are left when findings of the kinds in `skip` are left out.

    Raises UserError if it holds NaN or Inf and these are not left out.
    """
    by_trajectory: dict[tuple[str, int | None], list[Finding]] = defaultdict(list)
    for finding in manifest.findings:
        if finding.kind == "nonfinite" and "nonfinite" not in skip:
            raise UserError(
                f"{manifest.dataset}, {manifest.split}: {finding.file}, trajectory {finding.trajectory}, channel "
                f"{finding.channel}: NaN or Inf, in shards that were made with `--skip nonfinite`; give it again"
            )
        if finding.kind in SKIPPABLE:
            by_trajectory[finding.file, finding.trajectory].append(finding)
    trajectories = []
    for trajectory in manifest.trajectories:
        found = by_trajectory[manifest.sources[trajectory.source].name, trajectory.source_index]
        segments = usable_segments(trajectory.frames, found, skip)
        trajectories.append(replace(trajectory, segments=segments))
    return replace(manifest, trajectories=tuple(trajectories), skip=skip)


def _findings(
    plan: Plan, parts: Sequence[Part], stats: Stats | None, channels: Mapping[str, Channel]
) -> tuple[Finding, ...]:
    """Those of the trajectories, those of the split, and what float16 cost. `stats` claim to be of the train split."""
    found = [finding for part in parts for finding in part.findings]
    found += split_findings(
        plan.card,
        channels,
        merge([part.sample for part in parts]),
        [trajectory.frames for trajectory in plan.trajectories],
        plan.grid,
        stats if plan.split == "train" and plan.whole else None,
    )
    if plan.dtype == "float16":
        worst = np.max([part.rounding for part in parts], axis=0)
        for name, error in zip(plan.card.state_channels, worst, strict=True):
            found.append(Finding("rounding", "note", "", None, name, (), f"float16 is off by at most {error:.2g} std"))
    return tuple(condense(found, len(plan.trajectories)))


SHARD_BYTES = Settings.shard_bytes


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
    frames_per_chunk: int = Settings.frames_per_chunk,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = Settings.dtype,
    restrict: int | None = None,
    skip: Sequence[str] = (),
    registry: Registry | None = None,
) -> list[Built]:
    """Converts a Well folder, `<well>/<dataset>/data/<split>/*.hdf5`, to `<out>/<dataset>/<split>/`.

    well: a local folder, or the URL of one. None takes every dataset with a card, every split that has files, and one
    job per core. A job holds a few MiB of frames in memory; a shard ends with the trajectory that would take it over
    `shard_bytes`. dtype: `float16` halves the fields and is refused where it blurs them. restrict: so many
    trajectories of each split, those of N among those of N + 1. skip: kinds of findings whose windows are left out.
    What is finished is kept, whatever its `skip`; after a kill the same call goes on, and the bytes are the same.
    Raises UserError for whatever is wrong with the files, and when the disk is full; nothing half written is kept.
    """
    settings = Settings(frames_per_chunk, shard_bytes, dtype, restrict)
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs: expected at least 1, got {jobs}")
    chosen = _chosen_skip(skip)
    if is_url(out):
        raise UserError(f"{out}: expected a local folder for the shards; upload them when they are whole")
    out, jobs, registry = Path(out), jobs or available_cores(), registry or load_registry()
    folders, plans = plan_all(well, out, datasets, splits, settings, registry)
    with only_process(out, "`data-pipeline shard`"):
        done = [built for plan in plans if (built := _finished(plan, chosen)) is not None]
        finished = {built.folder for built in done}
        pending = [plan for plan in plans if plan.folder not in finished]
        stats = dataset_stats(folders, out, pending, jobs, "nonfinite" in chosen)
        for folder, manifest in _write_all(pending, stats, jobs, chosen, registry.channel_cards):
            done.append(Built(manifest, folder, reused=False))
    by_folder = {built.folder: built for built in done}
    return [by_folder[plan.folder] for plan in plans]


def _chosen_skip(skip: Sequence[str]) -> tuple[str, ...]:
    for kind in skip:
        if kind not in SKIPPABLE:
            raise UserError(f"skip: expected {', '.join(SKIPPABLE)}, got {kind!r}")
    return tuple(kind for kind in SKIPPABLE if kind in skip)


def plan_all(
    well: str | Path,
    out: Path,
    datasets: Sequence[str] | None,
    splits: Sequence[str] | None,
    settings: Settings,
    registry: Registry,
) -> tuple[Mapping[str, Folder], list[Plan]]:
    """The folder of each dataset to convert, and a plan for each of its splits; writes nothing."""
    folders = choose_folders(folder_at(well), datasets, registry)
    plans: list[Plan] = []
    for name, folder in folders.items():
        plans += plan_dataset(registry.card(name), folder, out, splits, settings)
    return folders, plans


def choose_folders(well: Folder, datasets: Sequence[str] | None, registry: Registry) -> Mapping[str, Folder]:
    """Dataset -> folder, by name, of the named datasets of a Well; None means all with a card."""
    if datasets is not None:
        datasets = [card.name for card in registry.select(datasets)]
    folders = dataset_folders(well, datasets)
    if datasets is None:
        without = sorted(set(folders) - set(registry.cards))
        if without and len(without) < len(folders):
            print(f"left out, since no card describes them: {', '.join(without)}", file=sys.stderr)
        datasets = sorted(set(folders) & set(registry.cards))
    missing = [name for name in datasets if name not in folders]
    if missing or not datasets:
        raise UserError(
            f"{well}: expected {', '.join(missing) or 'datasets'} as {well}/<dataset>/data/<split>/*.hdf5 (or under "
            f"{well}/datasets), got {', '.join(folders) or 'none'}; give the folder that holds the datasets, get "
            "them with `data-pipeline download`, or make the mini-Well with `data-pipeline simulate`"
        )
    return {name: folders[name] for name in datasets}


def _finished(plan: Plan, skip: tuple[str, ...]) -> Built | None:
    """What an earlier run finished, with its windows chosen again where `skip` is another; or None.

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


def finished_manifest(plan: Plan) -> Manifest | None:
    """The manifest of the shards that an earlier run made of this plan; None if it was not finished.

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


def _write_all(
    plans: Sequence[Plan],
    stats: Mapping[str, tuple[Stats, str]],
    jobs: int,
    skip: tuple[str, ...],
    channels: Mapping[str, Channel],
) -> Iterator[tuple[Path, Manifest]]:
    """Writes the shards that are not there yet; yields folder and manifest of each split as it becomes whole."""
    parts = {plan.folder: _saved_parts(plan) for plan in plans}
    keep = "nonfinite" in skip
    tasks = [
        ShardTask(plan, shard, stats[plan.card.name][0], keep)
        for plan in plans
        for shard in range(len(plan.shards))
        if shard not in parts[plan.folder]
    ]
    num_bytes = sum(task.plan.source_bytes(task.shard) for task in tasks)

    def finish(plan: Plan) -> Manifest:
        return finish_split(plan, parts[plan.folder], *stats[plan.card.name], skip, channels)

    for plan in plans:
        if len(parts[plan.folder]) == len(plan.shards):  # killed just before its manifest was written
            yield plan.folder, finish(plan)
    with closing(run_tasks(write_shard, tasks, jobs, num_bytes, "shards")) as results:
        for task, part in results:
            done = parts[task.plan.folder]
            done[task.shard] = part
            if len(done) == len(task.plan.shards):
                yield task.plan.folder, finish(task.plan)


def _saved_parts(plan: Plan) -> dict[int, Part]:
    """Records of the shards that an earlier run finished; other shards in the folder are removed."""
    found = ((shard, saved_part(plan, shard)) for shard in range(len(plan.shards)))
    parts = {shard: part for shard, part in found if part is not None}
    kept = {part.shard.name for part in parts.values()}
    for path in plan.folder.glob("shard-*.tar"):
        if path.name not in kept and re.fullmatch(r"shard-\d{6,}\.tar", path.name):
            path.unlink()
    return parts
