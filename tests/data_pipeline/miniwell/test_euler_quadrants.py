"""euler_multi_quadrants_periodicBC against exact solutions of the Euler equations, conservation and symmetry."""

import numpy as np
import pytest
from small_cases import exact_sod, rngs, tiny

from data_pipeline.miniwell import euler, euler_quadrants


def quadrants(cells: int, gamma: float, *numbers: int) -> np.ndarray:
    """Conserved (4, b, cells, cells), one trajectory per number."""
    points = (np.arange(cells) + 0.5) / cells
    return np.stack([euler_quadrants.initial_state(points, gamma, rng) for rng in rngs(*numbers)], axis=1)


def two_shock_tubes(cells: int, normal: int, gamma: float) -> np.ndarray:
    """Mean absolute errors at time 0.1 of Sod's problem and, where the axis closes, its mirror image.

    Density, normal and tangential velocity, pressure. The two shocks meet only at time 0.14.
    """
    x = (np.arange(cells) + 0.5) / cells
    full = x < 0.5
    primitive = np.zeros((4, 1, cells, 2))
    primitive[0, 0], primitive[3, 0] = np.where(full, 1.0, 0.125)[:, None], np.where(full, 1.0, 0.1)[:, None]
    primitive[3 - normal, 0] = np.where(full, 0.1, -0.1)[:, None]
    state = euler.conserved_from_primitive(primitive, gamma)
    state = state if normal == 1 else state.swapaxes(-1, -2)
    state = euler_quadrants.advance(state, 0.1, 1 / cells, gamma)
    state = state if normal == 1 else state.swapaxes(-1, -2)
    np.testing.assert_array_equal(state[..., 0], state[..., 1])
    result = euler.primitive_from_conserved(state, gamma)[[0, normal, 3 - normal, 3], 0, :, 0]
    middle = np.abs(x - 0.5) < 0.25
    mirrored = np.where(x < 0.5, -x, 1 - x)  # distance to the other membrane, towards the gas of low pressure
    exact = np.where(middle, exact_sod((x - 0.5) / 0.1, gamma), exact_sod(mirrored / 0.1, gamma))
    exact[1] *= np.where(middle, 1, -1)
    return np.abs(result - exact).mean(axis=1)


@pytest.mark.parametrize("gamma", [1.22, 1.4])
def test_shock_tubes_converge_to_the_exact_riemann_solution_on_both_axes(gamma: float) -> None:
    coarse, fine = two_shock_tubes(100, 1, gamma), two_shock_tubes(200, 1, gamma)
    assert np.all(fine < [6e-3, 1e-2, 3e-3, 4e-3])
    assert np.all(fine < 0.7 * coarse)
    np.testing.assert_array_equal(two_shock_tubes(100, 2, gamma), coarse)


def vortex(cells: int, gamma: float) -> np.ndarray:
    """An isentropic vortex in the middle of a stream (1, 1/2): the wind carries it and changes nothing (Shu 1998)."""
    points = (np.arange(cells) + 0.5) / cells
    x, y = (points[:, None] - 0.5) / 0.1, (points[None, :] - 0.5) / 0.1
    swirl = 3 / (2 * np.pi) * np.exp((1 - x**2 - y**2) / 2)
    temperature = 1 - (gamma - 1) / (2 * gamma) * swirl**2
    density = temperature ** (1 / (gamma - 1))
    primitive = np.stack([density, 1 - y * swirl, 0.5 + x * swirl, density * temperature])
    return euler.conserved_from_primitive(primitive, gamma)[:, None]


def test_a_vortex_is_carried_around_the_box_at_second_order() -> None:
    errors = []
    for cells in (32, 64):
        start = vortex(cells, 1.4)
        end = euler_quadrants.advance(start, 1.0, 1 / cells, 1.4)
        # Once around in x and half way in y.
        errors.append(np.abs(end - np.roll(start, cells // 2, axis=-1)).mean())
    assert errors[1] < 3e-3
    assert errors[1] < errors[0] / 3.5


def test_mass_momentum_and_energy_are_conserved_to_rounding() -> None:
    fields = tiny(euler_quadrants.SYSTEM, rngs(0, 1, 2)).fields
    for name in ("density", "energy", "momentum"):
        mean = fields[name].mean(axis=(2, 3))
        np.testing.assert_allclose(mean, np.broadcast_to(mean[:, :1], mean.shape), rtol=1e-13, atol=1e-14)
        assert np.abs(fields[name][:, -1] - fields[name][:, 0]).max() > 0.3, "nothing moved"


def test_entropy_only_grows() -> None:
    """-rho ln(p / rho^gamma) summed over the box: the second law, which shocks must obey and errors may break."""
    fields = tiny(euler_quadrants.SYSTEM, rngs(0, 1, 2)).fields
    entropy = (fields["density"] * np.log(fields["pressure"] / fields["density"] ** 1.4)).mean(axis=(2, 3))
    assert (np.diff(entropy, axis=1) > 0).all()


def test_shifted_and_mirrored_quadrants_give_shifted_and_mirrored_gas() -> None:
    start = quadrants(32, 1.4, 0, 1)
    end = euler_quadrants.advance(start, 0.2, 1 / 32, 1.4)
    shifted = euler_quadrants.advance(np.roll(start, (5, -9), axis=(2, 3)), 0.2, 1 / 32, 1.4)
    np.testing.assert_array_equal(shifted, np.roll(end, (5, -9), axis=(2, 3)))
    for axis, row in ((2, 1), (3, 2)):
        flip = np.where(np.arange(4) == row, -1.0, 1.0)[:, None, None, None]
        mirrored = euler_quadrants.advance(flip * np.flip(start, axis), 0.2, 1 / 32, 1.4)
        np.testing.assert_allclose(mirrored, flip * np.flip(end, axis), atol=1e-10)


def test_quadrants_are_blocks_of_uniform_gas_that_wrap_around() -> None:
    for number in range(8):
        density = quadrants(50, 1.4, number)[0, 0]
        rows = np.flatnonzero((density != np.roll(density, 1, axis=0)).any(axis=1))
        columns = np.flatnonzero((density != np.roll(density, 1, axis=1)).any(axis=0))
        assert len(np.unique(density)) == len(rows) * len(columns)
        for cuts in (rows, columns):
            assert 2 <= len(cuts) <= 3
            assert np.diff(cuts, append=cuts[0] + 50).min() >= euler_quadrants.SMALLEST_BLOCK * 50 - 1
    assert len({quadrants(50, 1.4, number).tobytes() for number in range(8)}) == 8


def test_stored_pressure_is_that_of_the_stored_energy() -> None:
    for index, gamma in enumerate((1.4, 1.22)):
        simulation = tiny(euler_quadrants.SYSTEM, rngs(3), index)
        density, momentum = simulation.fields["density"], simulation.fields["momentum"]
        inner = simulation.fields["energy"] - 0.5 * (momentum**2).sum(axis=-1) / density
        np.testing.assert_allclose(simulation.fields["pressure"], (gamma - 1) * inner, rtol=1e-12)
        assert simulation.fields["pressure"].min() > 0.1
        assert density.min() > 0.05
