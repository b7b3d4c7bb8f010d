"""The mini-Well: real simulations of the eight datasets, and of the extras, at low resolution, in the Well's layout.

out/<dataset>/simulation.json                       preset, seed and settings behind the data
out/<dataset>/data/{train,valid,test}/<file>.hdf5   one file per parameter set
out/<dataset>/stats.yaml                            moments of the train split, written last: the dataset is complete
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from data_pipeline.files import TEMPORARY_SUFFIX, UserError, write_whole
from data_pipeline.miniwell.contact_sheet import contact_sheet
from data_pipeline.miniwell.system import statistics
from data_pipeline.miniwell.task import (
    EIGHT,
    EXTRAS,
    SYSTEMS,
    Task,
    load_system,
    run_task,
    total_trajectories,
)
from data_pipeline.well.stats import Moments
from data_pipeline.workers import available_cores, run_tasks

__all__ = ["EIGHT", "EXTRAS", "PRESETS", "SYSTEMS", "contact_sheet", "load_system", "simulate"]

PRESETS = ("mini", "tiny")
VERSION = 1  # raise it when the same preset and seed begin to give other arrays

# BLAS reads these when it is loaded; one simulation each keeps the cores busy.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def simulate(
    out: Path, preset: str, datasets: Sequence[str] | None = None, seed: int = 0, jobs: int | None = None
) -> None:
    """Simulate datasets into `out` (None: the eight, no extras); what is complete there is kept, and said to be.

    The arrays depend on preset and seed, not on `jobs` (processes; None: one per available core).
    Raises UserError for an unknown dataset or preset, a seed below 0, jobs below 1, data of another preset, seed or
    origin in `out`, and for a disk that cannot be written.
    """
    names = _checked_names(datasets)
    if preset not in PRESETS:
        raise UserError(f"expected a preset among {', '.join(PRESETS)}; got {preset!r}{_nearest(preset, PRESETS)}")
    if seed < 0:
        raise UserError(f"expected a seed of 0 or more, got {seed}: choose another --seed")
    if jobs is not None and jobs < 1:
        raise UserError(f"expected 1 or more jobs, got {jobs}: choose another --jobs, or leave it out")
    pending = []
    for name in names:
        if _is_complete(out / name, _marker(name, preset, seed)):
            print(f"{name}: already simulated in {out / name}, kept")
        else:
            pending.append(name)
    for name in pending:
        for leftover in (out / name).rglob(f"*{TEMPORARY_SUFFIX}"):  # of a run that was killed
            leftover.unlink()
        write_whole(out / name / "simulation.json", json.dumps(_marker(name, preset, seed), indent=1).encode())
    _run(_tasks(out, pending, preset, seed), jobs or available_cores())


def _checked_names(datasets: Sequence[str] | None) -> list[str]:
    names = sorted(EIGHT) if datasets is None else list(dict.fromkeys(datasets))
    for name in names:
        if name not in SYSTEMS:
            raise UserError(
                f"expected datasets among {', '.join(EIGHT)}, or the extras {', '.join(EXTRAS)}; "
                f"got {name!r}{_nearest(name, list(SYSTEMS))}"
            )
    return names


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f". Did you mean {close[0]}?" if close else ""


def _marker(dataset: str, preset: str, seed: int) -> dict[str, Any]:
    """What the arrays of a dataset depend on, as it is read back from JSON."""
    settings = asdict(load_system(dataset).presets[preset])
    return json.loads(json.dumps({"version": VERSION, "preset": preset, "seed": seed, "settings": settings}))


def _is_complete(folder: Path, marker: dict[str, Any]) -> bool:
    """Whether `folder` holds the finished data that `marker` describes; UserError if it holds anything else."""
    path = folder / "simulation.json"
    if not path.exists():
        if (folder / "data").exists() or (folder / "stats.yaml").exists():
            raise UserError(
                f"expected no data, or data made by simulate, in {folder}; got data without a simulation.json. "
                "Choose another --out, or move that folder away."
            )
        return False
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"expected JSON in {path}, got: {error}. Remove {folder}, then run again.") from error
    if found != marker:
        expected, got = (_summary(data) for data in (marker, found))
        raise UserError(
            f"{folder} holds another simulation: expected {expected}, got {got}"
            f"{' with other settings' if expected == got else ''}. Choose another --out, or remove {folder}."
        )
    return (folder / "stats.yaml").exists()


def _summary(marker: Any) -> str:
    keys = ("version", "preset", "seed")
    return ", ".join(f"{key} {marker.get(key)}" for key in keys) if isinstance(marker, dict) else repr(marker)


def _tasks(out: Path, names: Sequence[str], preset: str, seed: int) -> list[Task]:
    """One task per parameter set, the longest first, so that no worker is left with a long one at the end."""
    costs = {}
    for name in names:
        system = load_system(name)
        sets = system.presets[preset].parameter_sets
        total = sum(total_trajectories(one) for one in sets)
        for index, one in enumerate(sets):
            task = Task(name, preset, index, seed, out / name)
            costs[task] = system.cost * total_trajectories(one) / total
    return sorted(costs, key=lambda task: (-costs[task], task.dataset, task.set_index))


def _run(tasks: Sequence[Task], jobs: int) -> None:
    """Run the tasks and finish each dataset as soon as its last one is done."""
    results: dict[Task, dict[str, Moments] | None] = {}
    waiting = {name: sum(task.dataset == name for task in tasks) for name in {task.dataset for task in tasks}}
    # A simulation says nothing until it is done, so one that is not wanted any more is cut short.
    run = run_tasks(run_task, tasks, jobs, len(tasks), "simulate", unit="set", environment=_ONE_THREAD, cut_short=True)
    with closing(run) as done:
        for task, moments in done:
            results[task] = moments
            waiting[task.dataset] -= 1
            if not waiting[task.dataset]:
                _finish(task, results)


def _finish(last: Task, results: Mapping[Task, dict[str, Moments] | None]) -> None:
    """Write stats.yaml, which makes the dataset of task `last` complete."""
    tasks = sorted((task for task in results if task.dataset == last.dataset), key=lambda task: task.set_index)
    moments = [found for task in tasks if (found := results[task]) is not None]
    write_whole(last.folder / "stats.yaml", yaml.safe_dump(statistics(moments)).encode())
    sizes = [path.stat().st_size for path in (last.folder / "data").rglob("*.hdf5")]
    tqdm.write(f"{last.dataset}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB in {last.folder}")
