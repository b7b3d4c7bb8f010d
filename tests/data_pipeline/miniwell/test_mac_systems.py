"""Physics of the MAC grid and of the two systems that are solved on it, against truths from outside the code."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from data_pipeline.miniwell import rayleigh_benard, viscoelastic
from data_pipeline.miniwell.mac import Arrays, MacGrid, half_slope, momentum_tendency, ssp_rk3
from data_pipeline.miniwell.system import Simulation, System
from data_pipeline.miniwell.viscoelastic import XX, XY, YY, ZZ, Fluid

SYSTEMS = (rayleigh_benard.SYSTEM, viscoelastic.SYSTEM)
CHANNEL = MacGrid(16, 12, lx=2 * np.pi, ly=2.0, y0=-1.0)
FLUID = Fluid(Re=1000.0, Wi=10.0, beta=0.9, epsilon=4e-3, Lmax=70.0)


def rngs(*trajectories: int) -> list[np.random.Generator]:
    return [np.random.default_rng([3, trajectory]) for trajectory in trajectories]


def solenoidal(grid: MacGrid, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Rough random divergence-free velocities that do not vanish in the mean."""
    rng = np.random.default_rng(0)
    psi = rng.standard_normal((batch, grid.nx, grid.ny + 1))
    psi[:, :, 0], psi[:, :, -1] = 0.0, 0.3
    return grid.from_streamfunction(psi)


def run_tiny(system: System, num_frames: int = 9, trajectories: tuple[int, ...] = (0, 1, 2)) -> Simulation:
    preset = replace(system.presets["tiny"], num_frames=num_frames)
    return system.simulate(preset, preset.parameter_sets[0], rngs(*trajectories))


@pytest.fixture(scope="module")
def convection() -> Simulation:
    return run_tiny(rayleigh_benard.SYSTEM)


@pytest.fixture(scope="module")
def channel_flow() -> Simulation:
    return run_tiny(viscoelastic.SYSTEM)


# The grid


def test_poisson_agrees_with_a_dense_solve() -> None:
    grid = MacGrid(6, 5, lx=1.5, ly=2.0)
    in_x = np.roll(np.eye(6), 1, axis=0) + np.roll(np.eye(6), -1, axis=0) - 2 * np.eye(6)
    in_y = np.diag(np.ones(4), 1) + np.diag(np.ones(4), -1) - np.diag([1.0, 2, 2, 2, 1])
    laplacian = np.kron(in_x, np.eye(5)) / grid.dx**2 + np.kron(np.eye(6), in_y) / grid.dy**2
    source = np.random.default_rng(1).standard_normal((3, 6, 5))
    dense = np.linalg.lstsq(laplacian, (source - source.mean(axis=(1, 2), keepdims=True)).reshape(3, 30).T, rcond=None)
    np.testing.assert_allclose(grid.poisson(source), dense[0].T.reshape(3, 6, 5), atol=1e-13)


def test_projection_removes_the_divergence_and_only_a_gradient() -> None:
    rng = np.random.default_rng(2)
    u, v = rng.standard_normal((2, 16, 12)), np.zeros((2, 16, 13))
    v[:, :, 1:-1] = rng.standard_normal((2, 16, 11))
    projected_u, projected_v = CHANNEL.project(u, v)
    assert np.abs(CHANNEL.divergence(projected_u, projected_v)).max() < 1e-13
    assert np.abs(projected_v[:, :, [0, -1]]).max() == 0
    np.testing.assert_allclose(projected_u.mean(axis=(1, 2)), u.mean(axis=(1, 2)), atol=1e-15)
    removed = np.sum((u - projected_u) * projected_u) + np.sum((v - projected_v) * projected_v)
    assert abs(removed) < 1e-12  # orthogonal to divergence-free fields
    again_u, again_v = CHANNEL.project(projected_u, projected_v)
    np.testing.assert_allclose(again_u, projected_u, atol=1e-14)
    np.testing.assert_allclose(again_v, projected_v, atol=1e-14)


def test_inviscid_momentum_keeps_kinetic_energy_and_momentum() -> None:
    u, v = solenoidal(CHANNEL)
    du, dv = momentum_tendency(CHANNEL, u, v, viscosity=0.0)
    size = np.sum(np.abs(u * du), axis=(1, 2))
    assert np.all(np.abs(np.sum(u * du, axis=(1, 2)) + np.sum(v * dv, axis=(1, 2))) < 1e-13 * size)
    assert np.abs(du.mean(axis=(1, 2))).max() < 1e-13 * np.abs(du).max()


def test_viscous_decay_of_a_sine_between_the_walls() -> None:
    grid = MacGrid(8, 24, lx=4.0, ly=1.0)
    u = np.tile(np.sin(np.pi * grid.y), (1, 8, 1))
    du, dv = momentum_tendency(grid, u, np.zeros((1, 8, 25)), viscosity=0.01)
    np.testing.assert_allclose(du, -0.01 * np.pi**2 * u, rtol=2e-3)  # pi^2 (1 - (pi dy)^2 / 12)
    assert np.abs(dv).max() < 1e-15


def test_center_velocity_and_gradient_converge_at_second_order() -> None:
    errors = []
    for n in (24, 48):
        grid = MacGrid(n, n, lx=2 * np.pi, ly=2.0, y0=-1.0)
        x, y = np.arange(n) * grid.dx, -1 + np.arange(n + 1) * grid.dy
        u, v = grid.from_streamfunction((np.sin(2 * x)[:, None] * (1 - y**2) ** 2)[None])
        x, y = grid.x[:, None], grid.y
        wall, slope, curve = (1 - y**2) ** 2, -4 * y * (1 - y**2), 12 * y**2 - 4
        sine, cosine = np.sin(2 * x), np.cos(2 * x)
        exact = (sine * slope, -2 * cosine * wall, 2 * cosine * slope, sine * curve, 4 * sine * wall)
        found = (*np.moveaxis(grid.to_centers(u, v)[0], -1, 0), *(g[0] for g in grid.gradient(u, v)))
        errors.append([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(found, exact, strict=True)])
    ratio = np.array(errors[0]) / np.array(errors[1])
    assert np.all(ratio > 3.3), ratio


def test_van_leer_slope() -> None:
    below, above = np.array([1.0, 1.0, -2.0, 1.0, 0.0, 0.0]), np.array([1.0, 3.0, -2.0, -1.0, 0.0, 5.0])
    np.testing.assert_allclose(half_slope(below, above), [0.5, 0.75, -1.0, 0.0, 0.0, 0.0])


def transport_errors(n: int) -> list[float]:
    """Mean |tendency + u . grad f| of both transport schemes for a smooth f and flow, two rows from the walls on."""
    grid = MacGrid(n, n, lx=2 * np.pi, ly=2.0, y0=-1.0)
    x, y = np.arange(n) * grid.dx, -1 + np.arange(n + 1) * grid.dy
    u, v = grid.from_streamfunction((np.sin(x)[:, None] * (1 - y**2) ** 2)[None])
    x, y = grid.x[:, None], grid.y
    smooth = (0.5 + 0.3 * np.sin(2 * x + 0.4) * np.cos(2 * y + 0.3))[None]
    by_x = 0.6 * np.cos(2 * x + 0.4) * np.cos(2 * y + 0.3)
    by_y = -0.6 * np.sin(2 * x + 0.4) * np.sin(2 * y + 0.3)
    exact = np.sin(x) * 4 * y * (1 - y**2) * by_x + np.cos(x) * (1 - y**2) ** 2 * by_y
    tensor = np.stack([smooth, 0 * smooth, smooth, smooth])
    found = (
        rayleigh_benard.buoyancy_tendency(grid, smooth, u, v, kappa=0.0)[0],
        viscoelastic.transport_tendency(grid, tensor, u, v, epsilon=0.0)[XX, 0],
    )
    return [float(np.abs(tendency - exact)[:, 2:-2].mean()) for tendency in found]


def test_transport_of_smooth_fields_is_nearly_second_order() -> None:
    ratios = np.array(transport_errors(32)) / np.array(transport_errors(64))
    assert np.all(ratios > 3.0), ratios  # first-order upwind: 2; the limiter clips the extrema


# Rayleigh-Benard


def test_conduction_is_steady_and_hydrostatic() -> None:
    grid = MacGrid(8, 10, lx=4.0, ly=1.0)
    state = (np.tile(1 - grid.y, (1, 8, 1)), np.zeros((1, 8, 10)), np.zeros((1, 8, 11)))
    after = rayleigh_benard.euler_step(state, grid, kappa=1e-3, nu=1e-3, dt=0.02)
    for before, now in zip(state, after, strict=True):
        np.testing.assert_allclose(now, before, atol=1e-15)
    pressure = rayleigh_benard.pressure(grid, state, nu=1e-3)
    y = grid.y
    np.testing.assert_allclose(pressure[0, 3], (y - y**2 / 2) - np.mean(y - y**2 / 2), atol=1e-14)


def test_heat_content_changes_by_the_flux_through_the_walls() -> None:
    grid, kappa, dt = MacGrid(16, 12, lx=4.0, ly=1.0), 2e-3, 0.01
    u, v = (0.1 * component for component in solenoidal(grid))
    buoyancy = np.random.default_rng(4).uniform(0, 1, (2, 16, 12))
    after = rayleigh_benard.euler_step((buoyancy, u, v), grid, kappa, 2e-3, dt)
    flux_below = 2 * kappa * (1 - buoyancy[:, :, 0]).mean(axis=1) / grid.dy
    flux_above = 2 * kappa * buoyancy[:, :, -1].mean(axis=1) / grid.dy
    change = (after[0] - buoyancy).mean(axis=(1, 2)) / dt
    np.testing.assert_allclose(change, flux_below - flux_above, rtol=1e-10)


def growth_rate(rayleigh: float) -> float:
    """Growth rate of the most unstable wavelength (2.016 heights; here 2) on a 32 x 16 grid, Pr = 1."""
    grid = MacGrid(32, 16, lx=4.0, ly=1.0)
    kappa, nu = rayleigh_benard.diffusivities(rayleigh, 1.0)
    dt = rayleigh_benard.time_step(grid, kappa, nu, limit=0.1)
    mode = 1e-4 * np.cos(np.pi * grid.x)[:, None] * np.sin(np.pi * grid.y)
    state: Arrays = ((1 - grid.y + mode)[None], np.zeros((1, 32, 16)), np.zeros((1, 32, 17)))
    euler = partial(rayleigh_benard.euler_step, grid=grid, kappa=kappa, nu=nu, dt=dt)
    amplitudes = []
    for _ in range(2):
        for _ in range(round(10 / dt)):
            state = ssp_rk3(state, euler)
        amplitudes.append(np.sqrt(np.mean(state[2] ** 2)))
    return np.log(amplitudes[1] / amplitudes[0]) / (round(10 / dt) * dt)


def test_convection_sets_in_at_the_critical_rayleigh_number() -> None:
    below, above = growth_rate(1550.0), growth_rate(1850.0)
    assert below < 0 < above
    critical = 1550 - below * 300 / (above - below)
    assert critical == pytest.approx(1707.76, rel=0.04)  # 1675 on this grid


def test_convection_stays_between_its_wall_values_and_is_alive(convection: Simulation) -> None:
    buoyancy, pressure, velocity = (convection.fields[name] for name in ("buoyancy", "pressure", "velocity"))
    assert buoyancy.min() >= 0
    assert buoyancy.max() <= 1
    assert np.abs(pressure.mean(axis=(2, 3))).max() < 1e-13
    assert np.std(velocity, axis=(2, 3)).min() > 1e-2
    assert np.abs(velocity[..., 1].mean(axis=2)).max() < 1e-13  # no net flow through a horizontal line
    kappa, _ = rayleigh_benard.diffusivities(3e5, 1.0)
    nusselt = 1 + (velocity[..., 1] * buoyancy)[:, -4:].mean() / kappa
    assert 3 < nusselt < 10  # two-dimensional rolls at this Rayleigh number carry about six times conduction


# Viscoelastic channel


def test_steady_shear_solves_the_constitutive_equation() -> None:
    shear = np.array([-3.0, -0.4, 0.0, 1.0])
    xx, xy, yy, zz = FLUID.steady_conformation(shear)
    f = FLUID.spring(xx + yy + zz)
    np.testing.assert_allclose(2 * shear * xy, (f * xx - 1) / FLUID.Wi, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(shear * yy, f * xy / FLUID.Wi, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose([f * yy, f * zz], 1.0, rtol=1e-11)


def test_laminar_flow_of_almost_unlimited_polymers_is_the_parabola() -> None:
    grid = MacGrid(4, 64, lx=2 * np.pi, ly=2.0, y0=-1.0)
    u, conformation = viscoelastic.laminar_flow(grid, replace(FLUID, Lmax=1e6))
    np.testing.assert_allclose(u, 1.5 * (1 - grid.y**2), atol=1e-3)
    np.testing.assert_allclose(conformation[XX], 1 + 2 * (FLUID.Wi * 3 * grid.y) ** 2, rtol=2e-3)


def test_laminar_flow_is_an_equilibrium() -> None:
    grid, fluid = MacGrid(8, 48, lx=2 * np.pi, ly=2.0, y0=-1.0), replace(FLUID, epsilon=0.0)
    u, conformation = viscoelastic.laminar_flow(grid, fluid)
    state: Arrays = (np.tile(u, (1, 8, 1)), np.zeros((1, 8, 49)), np.tile(conformation[:, None, None], (1, 1, 8, 1)))
    start = state
    for _ in range(80):
        state = viscoelastic.step(grid, fluid, state, 0.0125)
    np.testing.assert_allclose(state[0], start[0], atol=1e-5)
    assert np.abs(state[1]).max() < 1e-12
    for component in range(4):
        drift = np.abs(state[2][component] - start[2][component]).max()
        assert drift < 3e-4 * np.abs(start[2][component]).max()


def test_stretching_alone_is_the_matrix_exponential() -> None:
    gradient = np.array([[0.7, -3.0], [0.4, -0.7]])
    conformation = np.array([[5.0, 1.2], [1.2, 2.0]])
    h = 0.02
    cells = np.array([5.0, 1.2, 2.0, 1.5]).reshape(4, 1, 1, 1)
    components = tuple(np.full((1, 1, 1), g) for g in (0.7, -3.0, 0.4))
    found = viscoelastic.stretch_and_relax(cells, components, replace(FLUID, Wi=1e12), h)[:, 0, 0, 0]
    exact = expm(h * gradient) @ conformation @ expm(h * gradient).T
    np.testing.assert_allclose(found, [exact[0, 0], exact[0, 1], exact[1, 1], 1.5], rtol=1e-8)


def test_source_follows_the_fene_p_equation() -> None:
    gradient, fluid = np.array([[0.3, 2.0], [-0.2, -0.3]]), replace(FLUID, Wi=2.0, Lmax=5.0)

    def rate(_: float, c: np.ndarray) -> np.ndarray:
        tensor = np.array([[c[XX], c[XY]], [c[XY], c[YY]]])
        f = fluid.spring(c[XX] + c[YY] + c[ZZ])
        change = gradient @ tensor + tensor @ gradient.T - (f * tensor - np.eye(2)) / fluid.Wi
        return np.array([change[0, 0], change[0, 1], change[1, 1], -(f * c[ZZ] - 1) / fluid.Wi])

    exact = solve_ivp(rate, (0, 2), [1.0, 0.0, 1.0, 1.0], rtol=1e-10, atol=1e-10).y[:, -1]
    cells = np.array([1.0, 0.0, 1.0, 1.0]).reshape(4, 1, 1, 1)
    components = tuple(np.full((1, 1, 1), g) for g in (0.3, 2.0, -0.2))
    errors = []
    for steps in (200, 400):
        found = cells
        for _ in range(steps):
            found = viscoelastic.stretch_and_relax(found, components, fluid, 2 / steps)
        errors.append(np.abs(found[:, 0, 0, 0] - exact).max())
    assert exact[XX] > 5  # stretched to a fifth of the limit and more
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_transport_keeps_rough_tensors_positive_definite_and_their_integral() -> None:
    rng = np.random.default_rng(5)
    stretch, angle = np.exp(rng.uniform(0, 6, (2, 16, 12))), rng.uniform(0, np.pi, (2, 16, 12))
    cosine, sine = np.cos(angle), np.sin(angle)
    xx, yy = stretch * cosine**2 + 0.1 * sine**2, stretch * sine**2 + 0.1 * cosine**2
    conformation = np.stack([xx, (stretch - 0.1) * cosine * sine, yy, np.ones_like(xx)])
    u, v = solenoidal(CHANNEL)
    dt = 0.45 / (np.abs(u).max() / CHANNEL.dx + np.abs(v).max() / CHANNEL.dy)
    after = viscoelastic.transport(CHANNEL, conformation, u, v, epsilon=1e-3, dt=dt)
    assert after[[XX, YY, ZZ]].min() > 0
    assert (after[XX] * after[YY] - after[XY] ** 2).min() > 0
    np.testing.assert_allclose(after[ZZ], 1.0, rtol=1e-12)
    np.testing.assert_allclose(after.mean(axis=(2, 3)), conformation.mean(axis=(2, 3)), rtol=1e-12)


def test_channel_keeps_flux_and_divergence() -> None:
    grid = MacGrid(32, 32, lx=2 * np.pi, ly=2.0, y0=-1.0)
    state = viscoelastic.initial_state(grid, FLUID, 0.15, rngs(0, 1))
    for _ in range(10):
        state = viscoelastic.step(grid, FLUID, state, 0.03)
    assert np.abs(grid.divergence(*state[:2])).max() < 1e-13
    np.testing.assert_allclose(state[0].mean(axis=2), 1.0, rtol=1e-13)  # through every cross-section
    assert np.abs(state[1]).max() > 0.1


def test_stored_conformation_is_a_bounded_positive_definite_tensor(channel_flow: Simulation) -> None:
    tensor = channel_flow.fields["C"].astype(np.float32).astype(np.float64)
    c_zz = channel_flow.fields["c_zz"]
    np.testing.assert_array_equal(tensor[..., 0, 1], tensor[..., 1, 0])
    assert min(tensor[..., 0, 0].min(), tensor[..., 1, 1].min(), c_zz.min()) > 0
    assert np.linalg.det(tensor).min() > 0
    trace = tensor[..., 0, 0] + tensor[..., 1, 1] + c_zz
    assert trace.max() < 70**2 + 3
    assert trace.max() > 500  # stretched, not at rest
    assert np.abs(channel_flow.fields["pressure"].mean(axis=(2, 3))).max() < 1e-13
    assert np.std(channel_flow.fields["velocity"][..., 1], axis=(2, 3)).min() > 0.01


# Both


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_trajectory_does_not_depend_on_its_batch(system: System) -> None:
    together, alone = run_tiny(system, 2, (0, 1, 2)), run_tiny(system, 2, (1,))
    for name, field in alone.fields.items():
        np.testing.assert_allclose(together.fields[name][1], field[0], rtol=1e-8, atol=1e-10)
        assert np.abs(together.fields[name][0] - field[0]).max() > 1e-3  # another seed, another trajectory


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_simulation_has_the_layout_it_announces(
    system: System, convection: Simulation, channel_flow: Simulation
) -> None:
    simulation = convection if system is rayleigh_benard.SYSTEM else channel_flow
    preset = system.presets["tiny"]
    assert list(simulation.fields) == list(system.tensor_orders)
    for name, order in system.tensor_orders.items():
        assert simulation.fields[name].shape == (3, preset.num_frames, *preset.grid) + (2,) * order
        assert np.isfinite(simulation.fields[name]).all()
    assert (len(simulation.x), len(simulation.y), len(simulation.time)) == (*preset.grid, preset.num_frames)
    np.testing.assert_allclose(np.diff(simulation.time), preset.dt)
    periodic, wall = simulation.boundaries
    assert (periodic.kind, periodic.dims, wall.kind, wall.dims) == ("PERIODIC", ("x",), "WALL", ("y",))
    for boundary in simulation.boundaries:
        assert boundary.mask.sum() == 2
        assert boundary.mask[[0, -1]].all()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
@pytest.mark.parametrize("preset", ["mini", "tiny"])
def test_every_parameter_set_is_trained_and_tested_on(system: System, preset: str) -> None:
    counts = [parameters.num_trajectories for parameters in system.presets[preset].parameter_sets]
    assert all(count["train"] and count["test"] for count in counts)
    assert any(count["valid"] for count in counts)
    labels = [parameters.label for parameters in system.presets[preset].parameter_sets]
    assert len(set(labels)) == len(labels)
