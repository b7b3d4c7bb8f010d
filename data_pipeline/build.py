"""HDF5 -> shards: one task per shard, in parallel, resumable, with the same bytes whatever the number of jobs.

A shard gets its final name when it is whole, then a record under `.partial/`; when all records of a split are there,
manifest.json is written and the records go. So a killed run goes on where it stopped, and a folder without a manifest
is never taken for a finished one.
"""

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import __version__
from data_pipeline.convert import PARTIAL, Part, ShardTask, saved_part, write_shard
from data_pipeline.errors import UserError
from data_pipeline.files import TEMPORARY_SUFFIX, atomic_file
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.plan import Plan, plan_dataset
from data_pipeline.records import canonical, decode, load_json
from data_pipeline.registry import Card, Registry, load_registry
from data_pipeline.shards import check_shard
from data_pipeline.stats import Stats, compute_stats, read_stats
from data_pipeline.well import dataset_folders, split_files
from data_pipeline.workers import OnBytes, available_cores, run_tasks

SHARD_BYTES = 512 * 2**20
_STATS_NAME = "stats.json"


@dataclass(frozen=True)
class Built:
    """What a run did for one dataset and split."""

    manifest: Manifest
    folder: Path
    reused: bool  # it was finished before


def build_shards(
    well: Path,
    out: Path,
    datasets: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    jobs: int | None = None,
    frames_per_chunk: int = 16,
    shard_bytes: int = SHARD_BYTES,
) -> list[Built]:
    """Converts a Well folder, `<well>/<dataset>/data/<split>/*.hdf5`, to `<out>/<dataset>/<split>/`.

    None takes every dataset with a card, every split that has files, and one job per core. A job holds one chunk of
    `frames_per_chunk` frames in memory; a shard ends with the trajectory that would take it over `shard_bytes`. What
    is finished is skipped; after a kill the same call goes on, and the bytes are the same.
    Raises UserError for whatever is wrong with the files, and when the disk is full; nothing half written is kept.
    """
    for name, value in (("jobs", jobs), ("frames_per_chunk", frames_per_chunk), ("shard_bytes", shard_bytes)):
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    well, out, jobs = Path(well), Path(out), jobs or available_cores()
    folders = _choose_folders(well, datasets, load_registry())
    plans: list[Plan] = []
    for card, folder in folders:
        plans += plan_dataset(card, folder, out, splits, frames_per_chunk, shard_bytes)
    with _only_writer(out):
        finished = {plan.folder: manifest for plan in plans if (manifest := _finished(plan)) is not None}
        pending = [plan for plan in plans if plan.folder not in finished]
        stats = _all_stats(folders, out, pending, jobs)
        written = dict(_write_all(pending, stats, jobs))
    both = finished | written
    return [Built(both[plan.folder], plan.folder, reused=plan.folder in finished) for plan in plans]


def _choose_folders(well: Path, datasets: Sequence[str] | None, registry: Registry) -> list[tuple[Card, Path]]:
    """Card and folder of each dataset to convert, by name."""
    folders = dataset_folders(well)
    if datasets is None:
        without = sorted(set(folders) - set(registry.cards))
        if without and len(without) < len(folders):
            print(f"left out, since no card describes them: {', '.join(without)}", file=sys.stderr)
        datasets = sorted(set(folders) & set(registry.cards))
    cards = registry.select(datasets)
    missing = [card.name for card in cards if card.name not in folders]
    if missing or not cards:
        raise UserError(
            f"{well}: expected {', '.join(missing) or 'datasets'} as {well}/<dataset>/data/<split>/*.hdf5 (or under "
            f"{well}/datasets), got {', '.join(folders) or 'none'}; give the folder that holds the datasets, download "
            "them with the-well-download, or make the mini-Well with `data-pipeline simulate`"
        )
    return [(card, folders[card.name]) for card in cards]


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Holds a lock on the folder itself, which ends with the process, so that no two runs write the same shards."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another `data-pipeline shard` is writing here; wait until it has ended") from error
        except OSError:  # some network file systems cannot lock a folder; two runs there would write the same bytes
            pass
        yield
    finally:
        os.close(descriptor)


def _finished(plan: Plan) -> Manifest | None:
    """The manifest of an earlier run that ended, or None.

    Raises UserError if it was made from other files or settings, or if its shards are not all there.
    """
    for leftover in plan.folder.glob(f"*{TEMPORARY_SUFFIX}"):  # of a killed run: we hold the lock
        leftover.unlink()
    path = plan.folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = Manifest.load(path)
    if manifest.plan != plan.digest:
        raise UserError(
            f"{plan.folder}: holds shards of other files or settings than those of {plan.files[0].parent}; remove this "
            "folder to make them again, or choose another --out"
        )
    for shard in manifest.shards:
        check_shard(plan.folder / shard.name, shard.bytes)
    shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _StatsTask:
    card: Card
    files: tuple[Path, ...]
    frames_per_chunk: int
    result: Path
    key: str


def _all_stats(
    folders: Sequence[tuple[Card, Path]], out: Path, pending: Sequence[Plan], jobs: int
) -> dict[str, tuple[Stats, str]]:
    """Statistics and where they come from, for each dataset that has something to do."""
    plans = {plan.card.name: plan for plan in pending}
    found: dict[str, tuple[Stats, str]] = {}
    tasks = []
    for card, folder in folders:
        if card.name not in plans:
            continue
        if (folder / "stats.yaml").exists():
            found[card.name] = (read_stats(folder / "stats.yaml", card), "stats.yaml")
            continue
        plan, result = plans[card.name], out / card.name / _STATS_NAME
        task = _StatsTask(card, tuple(split_files(folder, "train")), plan.frames_per_chunk, result, plan.stats_key)
        saved = _saved_stats(task)
        if saved is None:
            tasks.append(task)
        else:
            found[card.name] = (saved, "train files")
    # What a task is worth in the bar: the size of its files, close to the bytes it reads.
    num_bytes = sum(file.stat().st_size for task in tasks for file in task.files)
    with closing(run_tasks(_compute_and_save, tasks, jobs, num_bytes, "statistics")) as results:
        found |= {task.card.name: (stats, "train files") for task, stats in results}
    return found


def _saved_stats(task: _StatsTask) -> Stats | None:
    """Statistics that an earlier run computed from the same files."""
    if not task.result.exists():
        return None
    saved = load_json(task.result)
    return decode(Stats, saved.get("stats"), str(task.result)) if saved.get("key") == task.key else None


def _compute_and_save(task: _StatsTask, on_bytes: OnBytes) -> Stats:
    stats = compute_stats(task.files, task.card, task.frames_per_chunk, on_bytes)
    with atomic_file(task.result) as file:
        file.write(canonical({"key": task.key, "stats": stats}))
    return stats


def _write_all(
    plans: Sequence[Plan], stats: dict[str, tuple[Stats, str]], jobs: int
) -> Iterator[tuple[Path, Manifest]]:
    """Writes the shards that are not there yet; yields folder and manifest of each split as it becomes whole."""
    parts = {plan.folder: _saved_parts(plan) for plan in plans}
    tasks = [ShardTask(plan, shard) for plan in plans for shard in range(len(plan.shards))]
    tasks = [task for task in tasks if task.shard not in parts[task.plan.folder]]
    num_bytes = sum(task.plan.shard_bytes(task.shard) for task in tasks)
    for plan in plans:
        if len(parts[plan.folder]) == len(plan.shards):  # killed just before its manifest was written
            yield plan.folder, _finish(plan, parts[plan.folder], *stats[plan.card.name])
    with closing(run_tasks(write_shard, tasks, jobs, num_bytes, "shards")) as results:
        for task, part in results:
            plan, done = task.plan, parts[task.plan.folder]
            done[task.shard] = part
            if len(done) == len(plan.shards):
                yield plan.folder, _finish(plan, done, *stats[plan.card.name])


def _saved_parts(plan: Plan) -> dict[int, Part]:
    """Records of the shards that an earlier run finished; other shards in the folder are removed."""
    found = ((shard, saved_part(plan, shard)) for shard in range(len(plan.shards)))
    parts = {shard: part for shard, part in found if part is not None}
    kept = {part.shard.name for part in parts.values()}
    for path in plan.folder.glob("shard-*.tar"):
        if path.name not in kept and re.fullmatch(r"shard-\d{6,}\.tar", path.name):
            path.unlink()
    return parts


def _finish(plan: Plan, parts: dict[int, Part], stats: Stats, stats_source: str) -> Manifest:
    """Writes the manifest, which makes the split whole, then removes the records."""
    ordered = [parts[index] for index in range(len(plan.shards))]
    trajectories = tuple(trajectory for part in ordered for trajectory in part.trajectories)
    manifest = Manifest(
        dataset=plan.card.name,
        split=plan.split,
        state_channels=plan.card.state_channels,
        constant_channels=plan.card.constant_channels,
        grid=plan.grid,
        boundary=plan.boundary,
        dt=plan.trajectories[0].dt,
        frames_per_chunk=plan.frames_per_chunk,
        dtype="float32",
        encoding={},
        stats=stats,
        stats_source=stats_source,
        sources=plan.sources,
        trajectories=trajectories,
        shards=tuple(part.shard for part in ordered),
        findings=tuple(finding for part in ordered for finding in part.findings),
        skip=(),
        converter=f"data-pipeline {__version__}",
        plan=plan.digest,
    )
    manifest.save(plan.folder / MANIFEST_NAME)
    shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
    return manifest
