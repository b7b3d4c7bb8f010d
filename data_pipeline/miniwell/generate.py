"""The mini-Well: real simulations of the eight datasets, and of the extras, at low resolution, in the Well's layout.

out/<dataset>/simulation.json                       preset, seed and settings behind the data
out/<dataset>/data/{train,valid,test}/<file>.hdf5   one file per parameter set
out/<dataset>/stats.yaml                            moments of the train split, written last: the dataset is complete
"""

import difflib
import importlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_pipeline.errors import UserError
from data_pipeline.files import TEMPORARY_SUFFIX, load_json, write_whole
from data_pipeline.miniwell.system import SPLITS, ParameterSet, Simulation, System
from data_pipeline.progress import write_above
from data_pipeline.well.stats import DELTA_STATISTICS, VALUE_STATISTICS, Moments, pool
from data_pipeline.well.write import write_well_file
from data_pipeline.workers import available_cores, run_tasks

SYSTEMS: Mapping[str, str] = {  # dataset name -> module of this package
    "acoustic_scattering_maze": "acoustic_maze",
    "active_matter": "active_matter",
    "burgers": "burgers",
    "euler_multi_quadrants_periodicBC": "euler_quadrants",
    "gray_scott_reaction_diffusion": "gray_scott",
    "helmholtz_staircase": "helmholtz",
    "pdearena_navier_stokes": "pdearena_smoke",
    "rayleigh_benard": "rayleigh_benard",
    "shear_flow": "shear_flow",
    "turbulent_radiative_layer_2D": "radiative_layer",
    "viscoelastic_instability": "viscoelastic",
}
EXTRAS = (
    "burgers",
    "euler_multi_quadrants_periodicBC",
    "pdearena_navier_stokes",
)  # beyond the paper's eight: made only when asked for
EIGHT = tuple(name for name in SYSTEMS if name not in EXTRAS)
PRESETS = ("mini", "tiny")
VERSION = 1  # raise it when the same preset and seed begin to give other arrays

# BLAS reads these when it is loaded; one simulation each keeps the cores busy.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def load_system(dataset: str) -> System:
    """Return the system of a dataset of SYSTEMS; its module is imported only now."""
    return importlib.import_module(f"data_pipeline.miniwell.{SYSTEMS[dataset]}").SYSTEM


def total_trajectories(parameter_set: ParameterSet) -> int:
    """Return the number of trajectories of a parameter set over all splits."""
    return sum(parameter_set.num_trajectories.values())


def trajectory_rng(seed: int, dataset: str, set_index: int, trajectory: int) -> np.random.Generator:
    """Return the generator of one trajectory, a function of these four only."""
    return np.random.default_rng([seed, zlib.crc32(dataset.encode()), set_index, trajectory])


@dataclass(frozen=True)
class Task:
    """A parameter set of a dataset, by number, and the folder that gets its files; small enough to send to a worker."""

    dataset: str
    preset: str
    set_index: int
    seed: int
    folder: Path  # <out>/<dataset>


def simulate(
    out: Path, preset: str, datasets: Sequence[str] | None = None, seed: int = 0, jobs: int | None = None
) -> None:
    """Simulate datasets into `out` (None: the eight, no extras); what is complete there is kept.

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
    """Return what the arrays of a dataset depend on, as JSON returns it."""
    settings = asdict(load_system(dataset).presets[preset])
    return json.loads(json.dumps({"version": VERSION, "preset": preset, "seed": seed, "settings": settings}))


def _is_complete(folder: Path, marker: dict[str, Any]) -> bool:
    """Return whether `folder` holds the finished data of `marker`; UserError if it holds anything else."""
    path = folder / "simulation.json"
    if not path.exists():
        if (folder / "data").exists() or (folder / "stats.yaml").exists():
            raise UserError(
                f"expected no data, or data made by simulate, in {folder}; got data without a simulation.json. "
                "Choose another --out, or move that folder away."
            )
        return False
    try:
        found = load_json(path.read_text())
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
    """Return one task per parameter set, the longest first, so that no worker has a long one at the end."""
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
    # A simulation reports nothing until it is done, so after an error or an interrupt the others are ended at once.
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
    write_above(f"{last.dataset}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB in {last.folder}")


def run_task(task: Task, on_done: Callable[[int], None]) -> dict[str, Moments] | None:
    """Simulate and write one parameter set; return its train moments, or None if it has no train trajectory.

    Calls on_done(1) at the end. Raises UserError if a file cannot be written.
    """
    _keep_freed_memory()
    system = load_system(task.dataset)
    preset = system.presets[task.preset]
    parameter_set = preset.parameter_sets[task.set_index]
    rngs = [
        trajectory_rng(task.seed, task.dataset, task.set_index, index)
        for index in range(total_trajectories(parameter_set))
    ]
    simulation = system.simulate(preset, parameter_set, rngs)
    moments = None
    for split, rows in split_rows(parameter_set).items():
        arrays = trajectory_arrays(system, simulation, rows)
        path = task.folder / "data" / split / file_name(task.dataset, parameter_set)
        write_well_file(
            path,
            system.name,
            (simulation.time, simulation.x, simulation.y),
            {name: arrays[name] for name in system.tensor_orders},
            {name: arrays[name] for name in simulation.constant_fields},
            parameter_set.scalars,
            simulation.boundaries,
        )
        if split == "train":
            moments = field_moments(arrays, system.tensor_orders)
    on_done(1)
    return moments


def _keep_freed_memory() -> None:
    """Make glibc reuse freed arrays: by default it hands each back to the system, which doubles the cost of a run.

    Freeing one large block raises the thresholds for mapping and trimming to its size and twice its size, if that is
    at most 32 MiB (mallopt(3), M_MMAP_THRESHOLD). The block is never touched, and elsewhere this does nothing.
    """
    np.empty(30 * 2**20, dtype=np.uint8)


def split_rows(parameter_set: ParameterSet) -> dict[str, slice]:
    """Return the range of trajectories of each split; a parameter set counts train, then valid, then test."""
    rows, first = {}, 0
    for split in SPLITS:
        count = parameter_set.num_trajectories.get(split, 0)
        if count:
            rows[split] = slice(first, first + count)
        first += count
    return rows


def file_name(dataset: str, parameter_set: ParameterSet) -> str:
    """Return `<dataset>_<label>.hdf5`, or `<dataset>.hdf5` for a dataset with a single, unlabeled parameter set."""
    return f"{dataset}_{parameter_set.label}.hdf5" if parameter_set.label else f"{dataset}.hdf5"


def trajectory_arrays(system: System, simulation: Simulation, rows: slice) -> dict[str, np.ndarray]:
    """Return the chosen trajectories as float32, state fields in the Well's order, then constant fields.

    Shapes: state (n, T, X, Y) + (2,) * order; constant (X, Y), or (n, X, Y) where it varies between trajectories.
    Raises RuntimeError if a value is not finite in float32: a solver blew up.
    """
    arrays = {name: simulation.fields[name][rows].astype(np.float32) for name in system.tensor_orders}
    for name, values in simulation.constant_fields.items():
        arrays[name] = (values[rows] if values.ndim == 3 else values).astype(np.float32)
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise RuntimeError(f"{system.name}: field {name} holds values that are not finite")
    return arrays


def field_moments(arrays: Mapping[str, np.ndarray], tensor_orders: Mapping[str, int]) -> dict[str, Moments]:
    """Return the moments of each array by name and, for state fields, of its changes between frames as <name>_delta.

    arrays: state (n, T, X, Y) + (2,) * order, constant (X, Y) or (n, X, Y); a name not in `tensor_orders` is constant.
    """
    moments = {}
    for name, values in arrays.items():
        moments[name] = Moments.of(values, range(values.ndim - tensor_orders.get(name, 0)))
        if name in tensor_orders:
            change = np.diff(values.astype(np.float64), axis=1)
            moments[f"{name}_delta"] = Moments.of(change, range(values.ndim - tensor_orders[name]))
    return moments


def statistics(files: Sequence[Mapping[str, Moments]]) -> dict[str, dict[str, object]]:
    """Return the content of stats.yaml, statistic -> field -> number or nested list, from the train files' moments.

    Population moments in float64 of each tensor component, as in the Well. Constant fields have mean, std and rms only.
    """
    merged = {key: pool([file[key] for file in files]) for key in files[0]}
    stats: dict[str, dict[str, object]] = {statistic: {} for statistic in VALUE_STATISTICS + DELTA_STATISTICS}
    for key, moments in merged.items():
        name, suffix = (key.removesuffix("_delta"), "_delta") if key.endswith("_delta") else (key, "")
        stats[f"mean{suffix}"][name] = moments.mean.tolist()
        stats[f"std{suffix}"][name] = moments.std.tolist()
        stats[f"rms{suffix}"][name] = moments.rms.tolist()
    return stats
