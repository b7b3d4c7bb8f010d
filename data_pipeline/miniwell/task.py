"""One parameter set's trajectories as HDF5 files in the Well's layout (well/layout.py): one file per split.

One unit of work of the mini-Well: simulate a parameter set, write its files, return its train split's moments.
"""

import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.miniwell.system import SPLITS, ParameterSet, Simulation, System, field_moments
from data_pipeline.well.stats import Moments
from data_pipeline.well.write import write_well_file


def split_rows(parameter_set: ParameterSet) -> dict[str, slice]:
    """Which trajectories of a parameter set, in their order train, valid, test, belong to each split that has any."""
    rows, first = {}, 0
    for split in SPLITS:
        count = parameter_set.num_trajectories.get(split, 0)
        if count:
            rows[split] = slice(first, first + count)
        first += count
    return rows


def file_name(dataset: str, parameter_set: ParameterSet) -> str:
    """`<dataset>_<label>.hdf5`, or `<dataset>.hdf5` for a dataset with a single, unlabelled parameter set."""
    return f"{dataset}_{parameter_set.label}.hdf5" if parameter_set.label else f"{dataset}.hdf5"


def trajectory_arrays(system: System, simulation: Simulation, rows: slice) -> dict[str, np.ndarray]:
    """The chosen trajectories as float32, state fields in the Well's order, then constant fields.

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


SYSTEMS: Mapping[str, str] = {  # the Well's dataset name -> module of this package
    "acoustic_scattering_maze": "acoustic_maze",
    "active_matter": "active_matter",
    "burgers": "burgers",
    "euler_multi_quadrants_periodicBC": "euler_quadrants",
    "gray_scott_reaction_diffusion": "gray_scott",
    "helmholtz_staircase": "helmholtz",
    "rayleigh_benard": "rayleigh_benard",
    "shear_flow": "shear_flow",
    "turbulent_radiative_layer_2D": "radiative_layer",
    "viscoelastic_instability": "viscoelastic",
}
EXTRAS = ("burgers", "euler_multi_quadrants_periodicBC")  # beyond the paper's eight: made only when asked for
EIGHT = tuple(name for name in SYSTEMS if name not in EXTRAS)


@dataclass(frozen=True)
class Task:
    """A parameter set of a dataset, by number, and the folder that gets its files; small enough to send to a worker."""

    dataset: str
    preset: str
    set_index: int
    seed: int
    folder: Path  # <out>/<dataset>


def load_system(dataset: str) -> System:
    """The system behind one of the names in `SYSTEMS`; its module is imported only now."""
    return importlib.import_module(f"data_pipeline.miniwell.{SYSTEMS[dataset]}").SYSTEM


def total_trajectories(parameter_set: ParameterSet) -> int:
    """Trajectories of a parameter set over all splits."""
    return sum(parameter_set.num_trajectories.values())


def trajectory_rng(seed: int, dataset: str, set_index: int, trajectory: int) -> np.random.Generator:
    """The generator of one trajectory, a function of these four only."""
    return np.random.default_rng([seed, zlib.crc32(dataset.encode()), set_index, trajectory])


def run_task(task: Task, on_done: Callable[[int], None]) -> dict[str, Moments] | None:
    """Simulate and write one parameter set; returns its train moments, or None if it has no train trajectory.

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
