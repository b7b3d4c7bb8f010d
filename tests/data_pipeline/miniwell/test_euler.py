"""The Euler solver along one axis against exact Riemann solutions and what a flux must be."""

import numpy as np
import pytest
from small_cases import exact_sod

from data_pipeline.miniwell import euler

GAMMA = 5 / 3


def sod_errors(cells: int, normal: int) -> list[float]:
    """Mean absolute errors at time 0.2 on [0, 1]: density, normal and tangential velocity, pressure."""
    x = (np.arange(cells) + 0.5) / cells
    primitive = np.zeros((4, 1, 1, cells))
    primitive[0], primitive[3] = np.where(x < 0.5, 1.0, 0.125), np.where(x < 0.5, 1.0, 0.1)
    primitive[3 - normal] = np.where(x < 0.5, 0.1, -0.1)
    conserved = euler.conserved_from_primitive(primitive, GAMMA)
    remaining = 0.2
    while remaining > 0:
        step = np.minimum(euler.stable_step(conserved, 1 / cells, GAMMA, courant=0.85), remaining)
        conserved, _ = euler.sweep(conserved, step[:, None, None] * cells, normal, periodic=False, gamma=GAMMA)
        remaining -= step[0]
    result = euler.primitive_from_conserved(conserved, GAMMA)[[0, normal, 3 - normal, 3], 0, 0]
    return list(np.abs(result - exact_sod((x - 0.5) / 0.2, GAMMA)).mean(axis=1))


def test_sod_tube_converges_to_the_exact_riemann_solution() -> None:
    coarse, fine = sod_errors(100, 1), sod_errors(200, 1)
    assert np.all(np.array(fine) < [3.5e-3, 4e-3, 2e-3, 2e-3])
    assert np.all(np.array(fine) < 0.7 * np.array(coarse))
    assert sod_errors(100, 2) == coarse  # the scheme does not know which axis it is on


@pytest.mark.parametrize("normal", [1, 2])
def test_hllc_carries_tangential_velocity_with_the_mass(normal: int) -> None:
    left, right = np.array([1.0, 0.2, 0.2, 1.0]), np.array([0.125, -0.1, -0.1, 0.1])
    left[3 - normal] = right[3 - normal] = 0.7
    flux = euler.hllc_flux(left[:, None], right[:, None], normal, GAMMA)
    assert flux[3 - normal] == pytest.approx(0.7 * flux[0], rel=1e-14)
    same = euler.hllc_flux(left[:, None], left[:, None], normal, GAMMA)
    energy = 1.0 / (GAMMA - 1) + 0.5 * (0.2**2 + 0.7**2)
    expected = {0: 0.2, normal: 0.2**2 + 1.0, 3 - normal: 0.2 * 0.7, 3: 0.2 * (energy + 1.0)}
    assert list(same[:, 0]) == pytest.approx([expected[row] for row in range(4)], rel=1e-12)


def test_broken_gas_is_reported() -> None:
    state = euler.conserved_from_primitive(np.ones((4, 1, 2, 2)), GAMMA)
    state[3, 0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="pressure nan"):
        euler.stable_step(state, 0.1, GAMMA, courant=0.85)
