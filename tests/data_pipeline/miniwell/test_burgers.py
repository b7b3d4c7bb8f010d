"""burgers against Cole and Hopf's exact solutions in one and two dimensions, and the laws of fronts."""

import numpy as np
import pytest
from scipy.special import ive
from small_cases import rngs, tiny

from data_pipeline.miniwell import burgers

TURN = 2 * np.pi


def heat(time: float, nu: float, cells: int, waves: list[tuple[float, int, int, float]]) -> list[np.ndarray]:
    """1 + waves a cos(2 pi (m x + n y) + phase) that fade as heat does, and the gradient; each (cells, cells)."""
    x, y = np.meshgrid(np.arange(cells) / cells, np.arange(cells) / cells, indexing="ij")
    value, slope_x, slope_y = np.ones_like(x), np.zeros_like(x), np.zeros_like(x)
    for amplitude, m, n, phase in waves:
        faded = amplitude * np.exp(-nu * TURN**2 * (m**2 + n**2) * time)
        angle = TURN * (m * x + n * y) + phase
        value += faded * np.cos(angle)
        slope_x -= faded * TURN * m * np.sin(angle)
        slope_y -= faded * TURN * n * np.sin(angle)
    return [value, slope_x, slope_y]


def cole_hopf(time: float, nu: float, cells: int) -> np.ndarray:
    """u, v and tracer (3, cells, cells): u = -2 nu grad phi / phi, s = psi / phi."""
    phi, phi_x, phi_y = heat(time, nu, cells, [(0.25, 1, 0, 0.3), (0.2, 0, 1, 1.1), (0.15, 1, -1, 2.0)])
    psi, _, _ = heat(time, nu, cells, [(0.5, 0, 1, 0.0), (0.5, 1, 1, 0.7)])
    return np.stack([-2 * nu * phi_x / phi, -2 * nu * phi_y / phi, psi / phi])


def test_two_dimensional_cole_hopf_solution_is_reproduced() -> None:
    nu = 0.05
    frames = burgers.Burgers((48, 48), nu).evolve(cole_hopf(0.0, nu, 48)[None], 3, 0.1, 20)[0]
    for time, frame in zip((0.0, 0.1, 0.2), frames, strict=True):
        np.testing.assert_allclose(frame, cole_hopf(time, nu, 48), atol=1e-8)
    assert np.abs(frames[2] - frames[0]).max() > 0.1


def test_time_stepping_is_of_fourth_order() -> None:
    nu, flow = 0.05, burgers.Burgers((48, 48), 0.05)
    start = cole_hopf(0.0, nu, 48)[None]
    exact = flow.evolve(start, 2, 0.2, 128)
    errors = [np.abs(flow.evolve(start, 2, 0.2, steps) - exact).max() for steps in (4, 8)]
    assert np.log2(errors[0] / errors[1]) > 3.6


def fading_sine(time: float, speed: float, nu: float, x: np.ndarray) -> np.ndarray:
    """Cole 1951: u from speed sin(2 pi x), as a ratio of series in modified Bessel functions."""
    size = speed / (2 * TURN * nu)  # phi(0) = exp(size cos(2 pi x)) = I0 + 2 sum In cos(2 pi n x)
    n = np.arange(1, 60)[:, None]
    weight = 2 * ive(n, size) * np.exp(-nu * (TURN * n) ** 2 * time)
    above = (weight * n * np.sin(TURN * n * x)).sum(axis=0)
    return 2 * nu * TURN * above / (ive(0, size) + (weight * np.cos(TURN * n * x)).sum(axis=0))


@pytest.mark.parametrize("axis", [1, 2])
def test_plane_wave_steepens_into_the_exact_front_on_both_axes(axis: int) -> None:
    """At the mini preset's smallest viscosity and grid, with the front at its steepest; then on a finer grid."""
    nu, speed, time = 0.005, 0.35, 0.8
    errors = []
    for cells in (64, 128):
        x = np.arange(cells) / cells
        fields = np.zeros((1, 3, cells, cells))
        fields[0, axis - 1] = speed * np.expand_dims(np.sin(TURN * x), 2 - axis)
        frames = burgers.Burgers((cells, cells), nu).evolve(fields, 2, time, 80 * cells // 64)
        wave = frames[0, 1, axis - 1] if axis == 1 else frames[0, 1, axis - 1].T
        np.testing.assert_allclose(wave, np.broadcast_to(wave[:, :1], wave.shape), atol=1e-12)
        assert not frames[0, 1, 2 - axis].any(), "nothing may move across the wave"
        errors.append(np.abs(wave[:, 0] - fading_sine(time, speed, nu, x)).max())
    assert errors[0] < 2e-3 * speed
    assert errors[1] < 1e-2 * errors[0], "twice the waves, a hundredth of the error and less: a spectral method"


def test_energy_of_a_plane_wave_falls_by_what_viscosity_takes() -> None:
    """d<u^2 / 2>/dt = -nu <u_x^2>: in one dimension the steepening itself costs nothing. Simpson's rule over frames."""
    nu, step, x = 0.01, 0.02, np.arange(64) / 64
    flow, fields = burgers.Burgers((64, 64), nu), np.zeros((1, 3, 64, 64))
    fields[0, 0] = (0.4 * np.sin(TURN * x) + 0.2 * np.cos(2 * TURN * x))[:, None]
    u = flow.evolve(fields, 41, step, 2)[0, :, 0]
    energy = 0.5 * (u**2).mean(axis=(-2, -1))
    taken = nu * (flow.grid.inverse(flow.ikx * flow.grid.forward(u)) ** 2).mean(axis=(-2, -1))
    integral = step / 3 * (taken[:-2:2] + 4 * taken[1:-1:2] + taken[2::2])
    np.testing.assert_allclose(energy[:-2:2] - energy[2::2], integral, rtol=2e-3)
    assert (np.diff(energy) < 0).all()
    assert energy[-1] < 0.5 * energy[0]


@pytest.mark.parametrize("index", [0, 1])
def test_no_velocity_and_no_tracer_leaves_the_range_of_the_start(index: int) -> None:
    """The maximum principle, for each velocity component and the tracer; a hundredth is left to the fronts' ripples."""
    fields = tiny(burgers.SYSTEM, rngs(0, 1, 2), index).fields
    for values in (fields["tracer"], fields["velocity"][..., 0], fields["velocity"][..., 1]):
        highest, lowest = values.max(axis=(2, 3)), values.min(axis=(2, 3))
        ripple = 0.01 * (highest[:, :1] - lowest[:, :1])
        assert (highest <= highest[:, :1] + ripple).all()
        assert (lowest >= lowest[:, :1] - ripple).all()
        assert (highest[:, -1] < 0.9 * highest[:, 0]).all(), "waves must fade"


def test_start_is_smooth_and_has_eddies_as_well_as_divergence() -> None:
    grid = burgers.Burgers((64, 64), 0.01).grid
    for rng in rngs(0, 1, 2):
        fields = burgers.start(rng, (64, 64))
        np.testing.assert_allclose(fields.mean(axis=(1, 2)), 0, atol=1e-14)
        np.testing.assert_allclose(fields.std(axis=(1, 2)), [burgers.SPEED, burgers.SPEED, burgers.TRACER])
        u, v, s = grid.forward(fields)
        high = (np.abs(grid.kx) > TURN * 3.5) | (grid.ky > TURN * 3.5)
        assert np.abs(np.stack([u, v, s])[:, high]).max() < 1e-10
        divergence, curl = (grid.inverse(part).std() for part in (grid.kx * u + grid.ky * v, grid.kx * v - grid.ky * u))
        assert 0.2 < divergence / curl < 5


def test_the_same_start_is_drawn_on_every_grid() -> None:
    coarse, fine = (burgers.start(rngs(4)[0], (size, size)) for size in (32, 64))
    np.testing.assert_allclose(fine[:, ::2, ::2], coarse, rtol=1e-12, atol=1e-12)
