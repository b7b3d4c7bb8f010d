"""Twins: a trajectory of the mini-Well, and the same one from a slightly different start.

How fast twins part is how fast the flow itself lets errors grow. No forecast can do better in the long run, however
good: the rate is a lower bound, like the largest Lyapunov exponent that it approaches.
"""

from typing import Any

import numpy as np

from data_pipeline.miniwell.generate import load_system, trajectory_rng
from data_pipeline.miniwell.system import Simulation, System

AMPLITUDE = 1e-5  # of each random number: far above rounding in float64, far below where differences stop growing


class DisturbedGenerator(np.random.Generator):
    """Gives what a generator would give, continuous numbers multiplied by 1 + amplitude * noise.

    A system builds its start from such numbers, so the disturbed start keeps every constraint (no divergence, values at
    the walls). Integers, choices and `random`, which the systems toss coins with, pass unchanged: both twins are the
    same case. The noise has a generator of its own, so the stream of numbers is the same.
    """

    def __init__(self, generator: np.random.Generator, amplitude: float, noise_seed: int) -> None:
        super().__init__(generator.bit_generator)
        self._amplitude, self._noise = amplitude, np.random.default_rng(noise_seed)

    def standard_normal(self, *args: Any, **kwargs: Any) -> Any:
        """Return disturbed numbers."""
        return self._disturbed(super().standard_normal(*args, **kwargs))

    def normal(self, *args: Any, **kwargs: Any) -> Any:
        """Return disturbed numbers."""
        return self._disturbed(super().normal(*args, **kwargs))

    def uniform(self, *args: Any, **kwargs: Any) -> Any:
        """Return disturbed numbers."""
        return self._disturbed(super().uniform(*args, **kwargs))

    def _disturbed(self, values: Any) -> Any:
        return values * (1 + self._amplitude * self._noise.standard_normal(np.shape(values)))


def twin_states(
    dataset: str,
    preset: str,
    set_index: int,
    trajectory: int,
    seed: int,
    amplitude: float = AMPLITUDE,
    noise_seed: int = 0,
) -> np.ndarray:
    """Return a trajectory and its twin, float64 (2, T, C, X, Y): the components of the fields in the Well's order.

    `trajectory` counts those of the parameter set over all splits: train, valid, test.
    """
    system = load_system(dataset)
    settings = system.presets[preset]
    first, second = (trajectory_rng(seed, dataset, set_index, trajectory) for _ in range(2))
    pair = [first, DisturbedGenerator(second, amplitude, noise_seed)]
    return _channels(system, system.simulate(settings, settings.parameter_sets[set_index], pair))


def twin_distance(states: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return the rms distance of twins (2, T, C, X, Y) in each frame, (T,), channels in units of their `std` (C,)."""
    difference = (states[1] - states[0]) / std[:, None, None]
    return np.sqrt(np.square(difference).mean(axis=(1, 2, 3)))


def _channels(system: System, simulation: Simulation) -> np.ndarray:
    """Return the state fields (b, T, X, Y) + (2,) * order as (b, T, C, X, Y): scalars; x, y; xx, xy, yx, yy."""
    fields = [simulation.fields[name] for name in system.tensor_orders]
    columns = [field.reshape(*field.shape[:4], -1) for field in fields]
    return np.moveaxis(np.concatenate(columns, axis=-1), -1, 2)
