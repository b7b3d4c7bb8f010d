"""helmholtz_staircase against its linear system, a flat wall's image source, refinement and the flux of energy."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import hankel1
from small_cases import rngs, tiny

from data_pipeline.miniwell import helmholtz
from data_pipeline.miniwell.system import ParameterSet


@pytest.fixture(scope="module")
def staircase() -> helmholtz.Domain:
    return helmholtz.staircase(8)


def test_helmholtz_solution_solves_its_system_and_is_reciprocal(staircase: helmholtz.Domain) -> None:
    matrix = helmholtz.assemble(staircase, 1.1821)
    factors = helmholtz.factorize(matrix)
    sources = [helmholtz.source_term(staircase, position) for position in ((-1.3, 0.4), (2.2, 1.1))]
    first, second = (factors.solve(source + 0j) for source in sources)
    assert np.linalg.norm(matrix @ first - sources[0]) < 1e-11 * np.linalg.norm(sources[0])
    assert sources[1] @ first == pytest.approx(sources[0] @ second, rel=1e-10)
    assert abs(matrix - matrix.T).max() == 0


def test_helmholtz_power_of_the_source_leaves_the_box(staircase: helmholtz.Domain) -> None:
    source = helmholtz.source_term(staircase, (0.7, 0.3))
    solution = helmholtz.factorize(helmholtz.assemble(staircase, 1.5413)).solve(source + 0j)
    power = np.imag(solution @ source)
    u, (in_x, in_y) = helmholtz.on_grid(staircase, solution), staircase.box
    outflow = 0.0
    for inner, outer, is_open in (
        (u[in_x.start, in_y], u[in_x.start - 1, in_y], staircase.open_x[in_x.start - 1, in_y]),
        (u[in_x.stop - 1, in_y], u[in_x.stop, in_y], staircase.open_x[in_x.stop - 1, in_y]),
        (u[in_x, in_y.stop - 1], u[in_x, in_y.stop], staircase.open_y[in_x, in_y.stop - 1]),
    ):
        outflow += np.imag(np.conj(inner) * outer)[is_open].sum()
    assert power > 0.01
    assert outflow == pytest.approx(power, rel=1e-9)


def test_helmholtz_over_a_flat_wall_is_a_source_and_its_image() -> None:
    staircase = helmholtz.staircase(16)
    flat = replace(
        staircase,
        volume=np.ones_like(staircase.volume),
        open_x=np.ones_like(staircase.open_x),
        open_y=np.ones_like(staircase.open_y),
    )
    omega, (x0, y0) = 1.5413, (0.4, 1.3)
    solution = helmholtz.factorize(helmholtz.assemble(flat, omega)).solve(helmholtz.source_term(flat, (x0, y0)) + 0j)
    u = helmholtz.on_grid(flat, solution)[flat.box]
    x, y = flat.x[flat.box[0], None], flat.y[None, flat.box[1]]
    direct, image = np.hypot(x - x0, y - y0), np.hypot(x - x0, y + 2 * 0.5 + y0)
    smoothed = np.exp(-0.5 * (omega * helmholtz.SOURCE_WIDTH) ** 2)  # a Gaussian source is a weaker point source
    exact = 0.25j * smoothed * (hankel1(0, omega * direct) + hankel1(0, omega * image))
    far = direct > 1
    assert np.linalg.norm((u - exact)[far]) < 0.02 * np.linalg.norm(exact[far])


def test_helmholtz_refinement_converges() -> None:
    levels = []
    for cells_per_unit in (8, 16, 32):
        domain = helmholtz.staircase(cells_per_unit)
        factors = helmholtz.factorize(helmholtz.assemble(domain, 1.1821))
        unknowns = factors.solve(helmholtz.source_term(domain, (0.3, 0.6)) + 0j)
        u, volume = helmholtz.on_grid(domain, unknowns)[domain.box], domain.volume[domain.box]
        while len(u) > 128:
            u, volume = helmholtz.coarsen(u, volume)
        levels.append(u[volume > 0])
    distances = [np.linalg.norm(a - b) / np.linalg.norm(levels[-1]) for a, b in pairwise(levels)]
    assert distances[1] < 0.01
    # Not second order: at the tips of the teeth the solution goes like r^(2/3), which leaves order 4/3.
    assert distances[0] / distances[1] > 2 ** (4 / 3) * 0.95


def test_staircase_is_cut_exactly(staircase: helmholtz.Domain) -> None:
    inside = staircase.volume[staircase.box]
    assert set(np.unique(inside)) == {0.0, 0.5, 1.0}
    assert (1 - inside).sum() * staircase.spacing**2 == 16 * 0.25  # 16 teeth of width 1 and mean height 1/4
    surface = -0.5 + np.abs((staircase.x + 0.5) % 1 - 0.5)
    clear = np.abs(staircase.y[None, :] - surface[:, None]) > 0.1 * staircase.spacing
    above = staircase.y[None, :] > surface[:, None]
    np.testing.assert_array_equal(staircase.volume[clear], above[clear].astype(float))
    with pytest.raises(ValueError, match="must be even"):
        helmholtz.staircase(7)


def test_helmholtz_frames_are_one_turn_of_a_fixed_amplitude() -> None:
    simulation = tiny(helmholtz.SYSTEM, rngs(0, 1), index=1)
    wave = simulation.fields["pressure_re"] + 1j * simulation.fields["pressure_im"]
    np.testing.assert_allclose(np.abs(wave), np.abs(wave[:, :1]).repeat(9, axis=1), atol=1e-14)
    np.testing.assert_allclose(wave[:, -1], wave[:, 0], atol=1e-14)
    np.testing.assert_allclose(wave[:, 1:], wave[:, :-1] * np.exp(-2j * np.pi / 8), atol=1e-14)
    assert simulation.time[-1] == pytest.approx(2 * np.pi / 1.5413)
    solid = simulation.constant_fields["mask"] == 1
    assert not wave[..., solid].any()
    assert (np.abs(wave[..., ~solid]) > 0).all()
    np.testing.assert_array_equal(simulation.boundaries[1].mask, solid)


def test_parameter_sets_of_helmholtz_stay_where_the_absorber_works() -> None:
    omegas = [one.scalars["omega"] for preset in helmholtz.SYSTEM.presets.values() for one in preset.parameter_sets]
    assert min(omegas) >= 0.25
    assert max(omegas) <= 1.9
    thin = helmholtz.SYSTEM.simulate(
        helmholtz.SYSTEM.presets["tiny"], ParameterSet("omega_0.4393", {"omega": 0.4393}, {"train": 1}), rngs(3)
    )
    assert np.isfinite(thin.fields["pressure_re"]).all()
