"""What a mini-Well system is: presets, parameter sets, the arrays of a simulation, and its steps in time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from data_pipeline.well.layout import BoundaryMask

SPLITS = ("train", "valid", "test")
PERIODIC = (("PERIODIC", "PERIODIC"), ("PERIODIC", "PERIODIC"))  # boundaries of x and of y

T = TypeVar("T")


@dataclass(frozen=True)
class ParameterSet:
    """One parameter set: its constant scalars under the Well's names and how many trajectories each split gets.

    All trajectories of a set are simulated together, in the order train, valid, test, and written to one file a split.
    """

    label: str  # part of the file name, e.g. "Re_1000_Sc_0.5"
    scalars: Mapping[str, float]  # the Well's constant scalars, in its order; may be empty
    num_trajectories: Mapping[str, int]  # split -> count; a split with 0 gets no file
    options: Mapping[str, float | str] = field(default_factory=dict)  # what the simulation needs and the file does not


@dataclass(frozen=True)
class Preset:
    """Resolution and length of the stored trajectories."""

    grid: tuple[int, int]  # stored (X, Y)
    num_frames: int
    dt: float  # time between stored frames
    parameter_sets: tuple[ParameterSet, ...]
    options: Mapping[str, float] = field(default_factory=dict)  # solver settings of this resolution

    @property
    def times(self) -> np.ndarray:
        """Times of the stored frames from the first on, (T,)."""
        return self.dt * np.arange(self.num_frames)


@dataclass(frozen=True)
class Simulation:
    """Trajectories of one parameter set, float64: b trajectories, T frames, X x Y grid (axis 0 = x, axis 1 = y)."""

    time: np.ndarray  # (T,)
    x: np.ndarray  # (X,)
    y: np.ndarray  # (Y,)
    fields: Mapping[str, np.ndarray]  # the Well's names; (b, T, X, Y) + (2,) * tensor order
    boundaries: tuple[BoundaryMask, ...]
    constant_fields: Mapping[str, np.ndarray] = field(default_factory=dict)  # (X, Y), or (b, X, Y) if it varies


@dataclass(frozen=True)
class System:
    """A mini-Well system.

    `simulate(preset, parameter_set, rngs)` returns a Simulation with one trajectory per generator in `rngs`; a
    trajectory depends on its own generator only, so neither the preset's other sets nor the number of jobs change it.
    """

    name: str  # the Well's dataset name
    tensor_orders: Mapping[str, int]  # state field -> tensor order, in the Well's order
    presets: Mapping[str, Preset]  # "mini" and "tiny"
    simulate: Callable[[Preset, ParameterSet, Sequence[np.random.Generator]], Simulation]
    cost: float  # rough CPU seconds of the mini preset, to start the longest first


def counts(train: int, valid: int, test: int) -> dict[str, int]:
    """Return the numbers of trajectories by split."""
    return {"train": train, "valid": valid, "test": test}


def num_steps(interval: float, limit: float) -> int:
    """Return in how many equal steps to cover `interval` so that none exceeds `limit`."""
    return int(np.ceil(interval / limit - 1e-9))


def integrate(state: T, step: Callable[[T, float], T], interval: float, limit: float) -> T:
    """Return the state after `interval`, in equal time steps of at most `limit`."""
    steps = num_steps(interval, limit)
    for _ in range(steps):
        state = step(state, interval / steps)
    return state


def snapshots(state: T, advance: Callable[[T], T], num_frames: int, steps: int) -> Iterator[T]:
    """Yield the state of each frame, the given one first, with `steps` calls of `advance` between two frames."""
    yield state
    for _ in range(num_frames - 1):
        for _ in range(steps):
            state = advance(state)
        yield state
