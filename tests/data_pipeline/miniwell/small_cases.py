"""What the tests of several systems share: generators, tiny runs, reading files, Sod's problem solved exactly."""

from pathlib import Path

import h5py
import numpy as np
from scipy.optimize import brentq

from data_pipeline.miniwell.system import Simulation, System


def rngs(*numbers: int) -> list[np.random.Generator]:
    return [np.random.default_rng([7, number]) for number in numbers]


def tiny(system: System, generators: list[np.random.Generator], index: int = 0) -> Simulation:
    preset = system.presets["tiny"]
    return system.simulate(preset, preset.parameter_sets[index], generators)


def read_arrays(well: Path, dataset: str, split: str) -> dict[str, dict[str, np.ndarray]]:
    """File -> field -> array, straight from HDF5."""
    found = {}
    for path in sorted((well / dataset / "data" / split).glob("*.hdf5")):
        with h5py.File(path) as file:
            found[path.name] = {
                name: file[f"t{order}_fields"][name][:] for order in range(3) for name in file[f"t{order}_fields"]
            }
    return found


def exact_sod(position_over_time: np.ndarray, gamma: float) -> np.ndarray:
    """Density, velocities and pressure of Sod's problem (Toro, chapter 4): rarefaction left, shock right.

    The tangential velocity, 0.1 left and -0.1 right, is carried along and jumps at the contact.
    """
    rho_l, p_l, rho_r, p_r = 1.0, 1.0, 0.125, 0.1
    sound_l = np.sqrt(gamma * p_l / rho_l)

    def shock(p: float) -> float:
        return (p - p_r) * np.sqrt(2 / ((gamma + 1) * rho_r) / (p + (gamma - 1) / (gamma + 1) * p_r))

    def rarefaction(p: float) -> float:
        return 2 * sound_l / (gamma - 1) * (1 - (p / p_l) ** ((gamma - 1) / (2 * gamma)))

    p_star = brentq(lambda p: shock(p) - rarefaction(p), p_r, p_l)
    u_star, weak = shock(p_star), (gamma - 1) / (gamma + 1)
    rho_star_l = rho_l * (p_star / p_l) ** (1 / gamma)
    rho_star_r = rho_r * (p_star / p_r + weak) / (weak * p_star / p_r + 1)
    shock_speed = rho_star_r * u_star / (rho_star_r - rho_r)
    head, tail = -sound_l, u_star - sound_l * (p_star / p_l) ** ((gamma - 1) / (2 * gamma))

    xi = position_over_time
    fan_sound = (2 * sound_l - (gamma - 1) * xi) / (gamma + 1)
    fan = rho_l * (fan_sound / sound_l) ** (2 / (gamma - 1))
    regions = [xi < head, xi < tail, xi < u_star, xi < shock_speed]
    density = np.select(regions, [rho_l, fan, rho_star_l, rho_star_r], rho_r)
    velocity = np.select(regions, [0.0, xi + fan_sound, u_star, u_star], 0.0)
    pressure = np.select(regions, [p_l, fan_sound**2 * fan / gamma, p_star, p_star], p_r)
    return np.stack([density, velocity, np.where(xi < u_star, 0.1, -0.1), pressure])
