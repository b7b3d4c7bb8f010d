"""turbulent_radiative_layer_2D against waves, balances and the cooling law; the solver itself is in test_euler.py."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from small_cases import rngs, tiny

from data_pipeline.miniwell import euler, radiative_layer
from data_pipeline.miniwell.radiative_layer import GAMMA


def wave_error(cells: int, wave: np.ndarray, speed: float) -> float:
    """A weak plane wave (its density, velocities and pressure) once around the periodic axis, against no change."""
    x = (np.arange(cells) + 0.5) / cells
    amplitude = 1e-4
    shape = np.broadcast_to(np.sin(2 * np.pi * x)[:, None], (cells, 4))
    primitive = np.array([1.0, 0.5, 0.2, 1.0])[:, None, None] + amplitude * wave[:, None, None] * shape
    start = euler.conserved_from_primitive(primitive, GAMMA)[:, None]
    end, losses = radiative_layer.advance(start, 1 / speed, 1 / cells, tcool=0.1)
    assert losses[2, 0] == 0  # this gas is hot everywhere, and the hot phase does not cool
    return float(np.abs(end - start).mean()) / amplitude


@pytest.mark.parametrize("kind", ["entropy", "shear", "sound"])
def test_smooth_waves_travel_at_second_order(kind: str) -> None:
    sound = np.sqrt(GAMMA)
    wave, speed = {
        "entropy": (np.array([1.0, 0, 0, 0]), 0.5),
        "shear": (np.array([0, 0, 1.0, 0]), 0.5),
        "sound": (np.array([1.0, sound, 0, GAMMA]), 0.5 + sound),
    }[kind]
    coarse, fine = wave_error(32, wave, speed), wave_error(64, wave, speed)
    assert fine < 0.01
    assert fine < coarse / 3.5


def stirred_layer(tcool: float, duration: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and losses (3, 2) of two trajectories on 16 x 48 cells."""
    x, y = -0.5 + (np.arange(16) + 0.5) / 16, -1 + (np.arange(48) + 0.5) / 16
    start = np.stack([radiative_layer.initial_state(x, y, 0.3, rng) for rng in rngs(0, 1)], axis=1)
    end, losses = radiative_layer.advance(start, duration, 1 / 16, tcool)
    return start, end, losses


def test_mass_and_energy_change_by_what_leaves_and_radiates() -> None:
    start, end, (mass_out, energy_out, radiated) = stirred_layer(0.1, 3.0)
    total_before, total_after = (state[[0, 3]].sum(axis=(-1, -2)) / 16**2 for state in (start, end))
    np.testing.assert_allclose(total_after[0] + mass_out, total_before[0], rtol=1e-12)
    np.testing.assert_allclose(total_after[1] + energy_out + radiated, total_before[1], rtol=1e-12)
    assert (radiated > 0.1).all()
    assert (np.abs(mass_out) > 1e-3).all()  # cooling gas draws in more, so the balance above is not 0 = 0


def test_faster_cooling_radiates_more() -> None:
    radiated = [stirred_layer(tcool, 3.0)[2][2] for tcool in (0.1, 0.32, 1.0, 3.16)]
    assert all((more > 1.2 * less).all() for more, less in pairwise(radiated))


def test_cooling_of_a_resting_gas_follows_its_rate_equation() -> None:
    temperature, tcool, duration = 0.6, 0.5, 1.0

    def slope(_: float, value: np.ndarray) -> np.ndarray:
        return -value * radiative_layer.cooling_rate(value) / tcool

    expected = solve_ivp(slope, (0, duration), [temperature], rtol=1e-10, atol=1e-12).y[0, -1]
    errors = []
    for steps in (40, 80):
        gas = np.array([2.0, 0.3, -0.1, 2.0 * temperature]).reshape(4, 1, 1, 1)
        state = euler.conserved_from_primitive(gas, GAMMA)
        for _ in range(steps):
            state, _ = radiative_layer.cool(state, np.full((1, 1, 1), duration / steps), tcool)
        density, velocity_x, velocity_y, pressure = euler.primitive_from_conserved(state, GAMMA)[:, 0, 0, 0]
        assert (density, velocity_x, velocity_y) == (2.0, 0.3, -0.1)
        errors.append(abs(pressure / density - expected))
    assert expected < 0.7 * temperature
    assert errors[0] < 5e-4
    assert errors[1] < errors[0] / 3.5


def test_both_phases_are_in_thermal_equilibrium() -> None:
    rate = radiative_layer.cooling_rate(np.array([0.08, 0.1, 1.0, 1.1, np.sqrt(0.1)]))
    np.testing.assert_allclose(rate, [0, 0, 0, 0, 1], atol=1e-12)


def test_mirrored_layer_stays_mirrored() -> None:
    start, end, _ = stirred_layer(0.32, 1.5)
    flip = np.array([1, -1, 1, 1]).reshape(4, 1, 1, 1)
    mirrored, _ = radiative_layer.advance(flip * start[:, :, ::-1], 1.5, 1 / 16, 0.32)
    np.testing.assert_allclose(flip * mirrored[:, :, ::-1], end, atol=1e-9)


def test_radiative_layer_mixes_and_keeps_its_temperatures() -> None:
    fields = tiny(radiative_layer.SYSTEM, rngs(0, 1)).fields
    temperature = fields["pressure"] / fields["density"]
    assert temperature.min() > 0.07
    assert temperature.max() < 1.15
    mixed = ((temperature > 0.2) & (temperature < 0.7)).mean(axis=(2, 3))
    assert (mixed > 0.01).all()
    assert (fields["velocity"][..., 1].std(axis=(2, 3)) > 0.02).all()
