"""The statistics of each dataset that is converted: its stats.yaml, or computed once from its train files and kept."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cards.registry import Card
from data_pipeline.files import atomic_file
from data_pipeline.records import canonical, decode, load_json
from data_pipeline.shards.plan import Plan, stats_file
from data_pipeline.well.hdf5 import split_files
from data_pipeline.well.location import File, Folder, file_bytes
from data_pipeline.well.stats import Stats, compute_stats, read_stats
from data_pipeline.workers import OnBytes, run_tasks

FROM_FILE, FROM_DATA = "stats.yaml", "train files"  # where statistics come from
_NAME = "stats.json"


@dataclass(frozen=True)
class _Task:
    card: Card
    files: tuple[File, ...]
    frames_per_chunk: int
    result: Path
    key: str
    skip_nonfinite: bool


def dataset_stats(
    folders: Mapping[str, Folder], out: Path, plans: Sequence[Plan], jobs: int, skip_nonfinite: bool
) -> dict[str, tuple[Stats, str]]:
    """Dataset -> statistics and where they come from, for each dataset with a plan.

    folders: of each dataset. `skip_nonfinite`: frames with NaN or Inf count for nothing, else they raise UserError.
    """
    found: dict[str, tuple[Stats, str]] = {}
    tasks = []
    for plan in {plan.card.name: plan for plan in plans}.values():
        card, folder = plan.card, folders[plan.card.name]
        path = stats_file(folder)
        if path is not None:
            found[card.name] = (read_stats(path, card), FROM_FILE)
            continue
        files: tuple[File, ...] = tuple(split_files(folder, "train"))
        task = _Task(card, files, plan.frames_per_chunk, out / card.name / _NAME, plan.stats_key, skip_nonfinite)
        saved = _saved(task)
        if saved is None:
            tasks.append(task)
        else:
            found[card.name] = (saved, FROM_DATA)
    # What a task is worth in the bar: the size of its files, close to the bytes it reads.
    num_bytes = sum(file_bytes(file) for task in tasks for file in task.files)
    with closing(run_tasks(_compute_and_save, tasks, jobs, num_bytes, "statistics")) as results:
        found |= {task.card.name: (stats, FROM_DATA) for task, stats in results}
    return found


def _saved(task: _Task) -> Stats | None:
    """Statistics that an earlier run computed from the same files."""
    if not task.result.exists():
        return None
    saved = load_json(task.result)
    return decode(Stats, saved.get("stats"), str(task.result)) if saved.get("key") == task.key else None


def _compute_and_save(task: _Task, on_bytes: OnBytes) -> Stats:
    stats = compute_stats(task.files, task.card, task.frames_per_chunk, on_bytes, task.skip_nonfinite)
    with atomic_file(task.result) as file:
        file.write(canonical({"key": task.key, "stats": stats}))
    return stats
