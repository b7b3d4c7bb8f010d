"""The Fourier tools and the three systems on them, against exact solutions, other solvers and conservation laws."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from data_pipeline.miniwell import active_matter, gray_scott, shear_flow
from data_pipeline.miniwell.spectral import Etdrk4, FourierGrid
from data_pipeline.miniwell.system import ParameterSet, Preset


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


# Fourier tools


def test_wavenumbers_differentiate_a_sine_exactly_on_an_oblong() -> None:
    grid = FourierGrid((16, 24), (2.0, 3.0))
    x, y = grid.points((-1.0, 0.5))
    phase = 2 * np.pi * (3 * x[:, None] / 2.0 + 2 * y / 3.0)
    coefficients = grid.forward(np.sin(phase))
    assert np.allclose(grid.inverse(1j * grid.kx * coefficients), 3 * np.pi * np.cos(phase), atol=1e-12)
    assert np.allclose(grid.inverse(1j * grid.ky * coefficients), 4 * np.pi / 3 * np.cos(phase), atol=1e-12)
    assert np.allclose(grid.inverse(grid.k_squared * grid.inverse_k_squared * coefficients), np.sin(phase), atol=1e-12)
    assert (x[0], y[0]) == (-1.0, 0.5)
    assert x[1] - x[0] == pytest.approx(2 / 16)


@pytest.mark.parametrize("size", [16, 24, 32])
def test_two_thirds_rule_keeps_products_free_of_aliases(size: int) -> None:
    grid = FourierGrid((size, size), (1.0, 1.0))
    fine = FourierGrid((2 * size, 2 * size), (1.0, 1.0))
    one, other = (grid.forward(rng(i).standard_normal((size, size))) * grid.dealias for i in range(2))

    def refine(coefficients: np.ndarray) -> np.ndarray:
        padded = np.zeros((2 * size, size + 1), dtype=complex)
        half = size // 2
        padded[:half, : half + 1], padded[-half:, : half + 1] = coefficients[:half], coefficients[half:]
        return 4 * fine.inverse(padded)  # 4: the transforms are not normalised

    exact = fine.forward(refine(one) * refine(other)) / 4
    exact = np.concatenate([exact[: size // 2], exact[-size // 2 :]])[:, : size // 2 + 1]
    product = grid.forward(grid.inverse(one) * grid.inverse(other))
    kept = grid.dealias > 0
    assert np.allclose(product[kept], exact[kept], atol=1e-10)
    assert not np.allclose(product, exact, atol=1e-3), "without the mask the product does alias"


def test_exponential_stepper_is_of_fourth_order_against_a_closed_form() -> None:
    linear, start, span = np.array([-30.0, -1.0, 0.0, 0.5]), 0.4, 1.0

    def exact(rate: np.ndarray) -> np.ndarray:  # y' = rate y - y^2
        safe = np.where(rate == 0, 1.0, rate)
        growth = np.exp(safe * span)
        return np.where(rate == 0, start / (1 + start * span), safe * start * growth / (safe + start * (growth - 1)))

    errors = []
    for steps in (8, 16):
        stepper = Etdrk4.of(linear, span / steps)
        state = np.full(4, start)
        for _ in range(steps):
            state = stepper.advance(state, lambda y: -y * y)
        errors.append(np.abs(state - exact(linear)).max())
    assert errors[1] < 1e-7
    assert np.log2(errors[0] / errors[1]) > 3.6


# Gray-Scott


def test_gray_scott_uniform_start_follows_the_reaction_equations() -> None:
    feed, kill = 0.029, 0.057
    start = np.array([0.6, 0.3])
    frames = gray_scott.evolve(np.tile(start[None, :, None, None], (1, 1, 8, 8)), feed, kill, 3, 50.0)

    def rhs(_: float, y: np.ndarray) -> list[float]:
        rate = y[0] * y[1] ** 2
        return [-rate + feed * (1 - y[0]), rate - (feed + kill) * y[1]]

    truth = solve_ivp(rhs, (0, 100), start, t_eval=[0, 50, 100], rtol=1e-11, atol=1e-13).y
    assert np.abs(frames[0, :, :, 3, 5].T - truth).max() < 1e-4
    assert frames.std(axis=(-2, -1)).max() < 1e-12


def test_gray_scott_means_obey_the_balance_of_feed_and_loss() -> None:
    """d<A + B>/dt = F (1 - <A>) - (F + k) <B>: reaction and diffusion drop out. Simpson's rule over the frames."""
    feed, kill, step = 0.018, 0.051, 2.5
    start = np.stack([gray_scott.start_blobs(rng(i), 32) for i in range(2)])
    a, b = np.moveaxis(gray_scott.evolve(start, feed, kill, 81, step).mean(axis=(-2, -1)), -1, 0)
    gain = feed * (1 - a) - (feed + kill) * b
    integral = step / 3 * (gain[:, :-2] + 4 * gain[:, 1:-1] + gain[:, 2:])
    defect = np.abs((a + b)[:, 2:] - (a + b)[:, :-2] - integral)
    assert defect.max() < 2e-5
    assert defect[:, 40:].max() < 1e-6
    assert np.abs((a + b)[:, -1] - (a + b)[:, 0]).min() > 1e-2, "the balance must have something to balance"


@pytest.mark.parametrize("parameter_set", gray_scott.SYSTEM.presets["mini"].parameter_sets, ids=lambda one: one.label)
def test_gray_scott_patterns_stay_bounded_and_alive(parameter_set: ParameterSet) -> None:
    preset = Preset(grid=(32, 32), num_frames=5, dt=100.0, parameter_sets=())
    fields = gray_scott.simulate(preset, parameter_set, [rng(1), rng(2)]).fields
    assert fields["A"].min() > -0.05
    assert fields["A"].max() < 1.02
    assert fields["B"].min() > -0.02
    assert fields["A"][:, -1].std(axis=(-2, -1)).min() >= gray_scott.LIVE_STD


def test_gray_scott_trajectory_depends_on_its_own_generator_only() -> None:
    preset = Preset(grid=(32, 32), num_frames=3, dt=40.0, parameter_sets=())
    spots = gray_scott.SYSTEM.presets["tiny"].parameter_sets[1]
    together = gray_scott.simulate(preset, spots, [rng(1), rng(2)]).fields["A"]
    alone = gray_scott.simulate(preset, spots, [rng(2)]).fields["A"]
    assert np.allclose(together[1], alone[0], atol=1e-12)
    assert not np.allclose(together[0], alone[0], atol=1e-2)


# Shear flow


def divergence(velocity: np.ndarray, grid: FourierGrid) -> np.ndarray:
    """(..., X, Y, 2) -> (..., X, Y), spectral."""
    u, v = (grid.forward(velocity[..., i]) for i in range(2))
    return grid.inverse(1j * (grid.kx * u + grid.ky * v))


def test_taylor_green_vortices_decay_at_the_exact_rate_with_the_exact_pressure() -> None:
    """u = sin kx cos ky e^{-2 nu k^2 t}, v = -cos kx sin ky e^{..}, p = (cos 2kx + cos 2ky) / 4 e^{-4 nu k^2 t}."""
    flow = shear_flow.ShearFlow((32, 64), reynolds=500.0, schmidt=0.5)
    x, y = flow.grid.points((0.0, -1.0))
    k = 2 * np.pi
    x, y = k * x[:, None], k * y[None, :]
    velocity = np.stack([np.sin(x) * np.cos(y), -np.cos(x) * np.sin(y)])[None]
    tracer = (np.sin(x) * np.sin(y))[None]  # a function of the stream function: it only diffuses, at rate 2 k^2 nu / Sc
    frames = flow.evolve(velocity, tracer, 3, 0.5, 25)[0]
    for time, (u, v, s, p) in zip((0.0, 0.5, 1.0), frames, strict=True):
        decay = np.exp(-2 * k**2 * time / 500)
        assert np.allclose(u, velocity[0, 0] * decay, atol=1e-12)
        assert np.allclose(v, velocity[0, 1] * decay, atol=1e-12)
        assert np.allclose(s, tracer[0] * decay**2, atol=1e-12)
        assert np.allclose(p, (np.cos(2 * x) + np.cos(2 * y)) / 4 * decay**2, atol=1e-12)


def test_uniform_stream_carries_the_flow_without_changing_it() -> None:
    flow = shear_flow.ShearFlow((32, 64), reynolds=1000.0, schmidt=1.0)
    velocity = shear_flow.start(rng(3), (32, 64))
    still = flow.evolve(velocity[None], velocity[None, 0], 2, 0.25, 20)[0, 1]
    moving = flow.evolve(velocity[None] + np.array([1.0, 0.5])[:, None, None], velocity[None, 0], 2, 0.25, 20)[0, 1]
    carried = np.roll(still, (8, 4), axis=(1, 2))  # 0.25 time units at speed 1 (dx = 1/32) and 0.5 (dy = 1/32)
    assert np.allclose(moving[0] - 1.0, carried[0], atol=1e-4)
    assert np.allclose(moving[2:], carried[2:], atol=1e-4)


def test_shear_flow_conserves_what_it_must() -> None:
    preset = Preset(grid=(32, 64), num_frames=9, dt=0.4, parameter_sets=())
    parameters = shear_flow.SYSTEM.presets["tiny"].parameter_sets[0]
    simulation = shear_flow.simulate(preset, parameters, [rng(i) for i in range(3)])
    velocity, tracer = simulation.fields["velocity"], simulation.fields["tracer"]
    grid = FourierGrid((32, 64), shear_flow.LENGTHS)
    assert np.abs(divergence(velocity, grid)).max() < 1e-11
    assert np.abs(np.diff(tracer.mean(axis=(-2, -1)))).max() < 1e-15
    assert np.abs(np.diff(velocity.mean(axis=(-3, -2)), axis=1)).max() < 1e-15
    energy = (velocity**2).sum(axis=-1).mean(axis=(-2, -1)) / 2
    assert (np.diff(energy) < 1e-10).all()
    assert energy[:, -1].min() > 0.2 * energy[:, 0].max(), "decay, not collapse"
    assert np.abs(tracer).max() < 0.75
    assert np.abs(simulation.fields["pressure"].mean(axis=(-2, -1))).max() < 1e-15


def test_tanh_layers_grow_at_the_kelvin_helmholtz_rate() -> None:
    """Michalke 1964, J. Fluid Mech. 19: U tanh(y / w) is most unstable at k w = 0.4446, growth rate 0.1897 U / w."""
    flow = shear_flow.ShearFlow((16, 256), reynolds=1e6, schmidt=1.0)
    grid, width = flow.grid, 0.4446 / (2 * np.pi)
    x, y = grid.points((0.0, -1.0))
    distance = np.where(y < 0, y + 0.5, 0.5 - y)  # two joins, 14 widths apart
    layers = np.broadcast_to(0.5 * np.tanh(distance / width), (16, 256))
    psi = grid.forward(1e-7 * np.cos(2 * np.pi * x[:, None]) * np.exp(-((distance / width) ** 2)))
    disturbance = grid.inverse(np.stack([1j * grid.ky * psi, -1j * grid.kx * psi]))
    frames = flow.evolve((np.stack([layers, np.zeros_like(layers)]) + disturbance)[None], layers[None], 5, 1.0, 40)
    growth = np.diff(np.log(frames[0, :, 1].std(axis=(-2, -1))))
    assert growth[2:] == pytest.approx([0.1897 * 0.5 / width] * 2, rel=0.01)


# Active matter


def bingham_by_quadrature(kappa: float) -> tuple[float, float]:
    """|q| = <cos 2 theta> and <cos 4 theta> for the density exp(kappa cos 2 theta)."""
    theta = np.linspace(0, 2 * np.pi, 4001)[:-1]
    weight = np.exp(kappa * (np.cos(2 * theta) - 1))
    return (weight * np.cos(2 * theta)).sum() / weight.sum(), (weight * np.cos(4 * theta)).sum() / weight.sum()


@pytest.mark.parametrize("kappa", [1e-2, 0.3, 1.0, 4.0, 30.0])
def test_closure_agrees_with_quadrature_at_any_angle_and_concentration(kappa: float) -> None:
    q, fourth = bingham_by_quadrature(kappa)
    angle, c = 0.7, 1.3
    a, d = (np.array([c * q / 2 * part]) for part in (np.cos(2 * angle), np.sin(2 * angle)))
    s1, s2 = active_matter.fourth_moment(np.array([c]), a, d)
    assert s1[0] == pytest.approx(c * fourth * np.cos(4 * angle), rel=1e-5, abs=1e-9)
    assert s2[0] == pytest.approx(c * fourth * np.sin(4 * angle), rel=1e-5, abs=1e-9)


def test_alignment_and_contraction_are_those_of_the_rods_themselves() -> None:
    """Against sums over angles of p p (p.M.p), which is what S:M means."""
    theta = np.linspace(0, 2 * np.pi, 721)[:-1]
    weight = np.exp(1.5 * np.cos(2 * (theta - 0.4)))
    c = 0.8
    weight *= c / weight.sum()
    p = np.stack([np.cos(theta), np.sin(theta)])
    second = np.einsum("n,in,jn->ij", weight, p, p)
    fourth = np.einsum("n,in,jn,kn,ln->ijkl", weight, p, p, p, p)
    strain = np.array([[0.3, -0.2], [-0.2, -0.3]])
    a, d = np.array([(second[0, 0] - second[1, 1]) / 2]), np.array([second[0, 1]])
    s1, s2 = active_matter.fourth_moment(np.array([c]), a, d)

    def parts(tensor: np.ndarray) -> list[float]:
        return [(tensor[0, 0] - tensor[1, 1]) / 2, tensor[0, 1]]

    aligned = active_matter.alignment(np.array([c]), a, d, s1, s2)
    contracted = active_matter.contract(np.array([c]), s1, s2, np.array([0.3]), np.array([-0.2]))
    exact = second @ second - np.einsum("ijkl,kl->ij", fourth, second)
    assert np.allclose(np.ravel(aligned), parts(exact), atol=1e-5)
    assert np.allclose(np.ravel(contracted), parts(np.einsum("ijkl,kl->ij", fourth, strain)), atol=1e-5)


@pytest.mark.parametrize(("alpha", "zeta"), [(-3.0, 1.0), (-5.0, 3.0)])
def test_small_disturbances_grow_at_the_rates_of_linear_theory(alpha: float, zeta: float) -> None:
    """Splay (a varies along x) moves no fluid and grows at zeta - 4 d_R - d_T k^2; bend (d along x) drives a shear
    flow, which adds -(alpha - zeta beta / 2) / 4 / (1 + beta / 8).
    """
    model = active_matter.ActiveMatter(16, alpha, zeta)
    x, _ = model.grid.points((0.0, 0.0))
    k, small = 2 * np.pi / active_matter.LENGTH, 1e-6
    start = np.zeros((2, 3, 16, 16))
    start[:, 0] = 1.0
    start[0, 1] = start[1, 2] = small * np.cos(k * x)[:, None]
    frames = model.evolve(start, 3, 0.5, step=0.00625)
    size = np.stack([frames[0, :, 1], frames[1, :, 2]]).std(axis=(-2, -1))
    measured = np.log(size[:, 2] / size[:, 1]) / 0.5
    splay = zeta - 4 * active_matter.D_R - active_matter.D_T * k**2
    bend = splay - (alpha - zeta * active_matter.BETA / 2) / 4 / (1 + active_matter.BETA / 8)
    assert measured == pytest.approx([splay, bend], rel=5e-4)


def test_active_matter_fields_are_consistent_and_physical() -> None:
    tiny = active_matter.SYSTEM.presets["tiny"]
    fields = active_matter.simulate(tiny, tiny.parameter_sets[1], [rng(i) for i in range(2)]).fields
    c, velocity, moment, strain = (fields[name] for name in ("concentration", "velocity", "D", "E"))
    grid = FourierGrid((32, 32), (active_matter.LENGTH, active_matter.LENGTH))
    assert np.abs(divergence(velocity, grid)).max() < 1e-12
    assert np.abs(c.mean(axis=(-2, -1)) - c[:, :1].mean(axis=(-2, -1))).max() < 1e-14
    assert np.allclose(np.trace(moment, axis1=-2, axis2=-1), c, atol=1e-14)
    assert np.abs(np.trace(strain, axis1=-2, axis2=-1)).max() < 1e-14
    assert np.linalg.det(moment).min() > 0, "D is a second moment, so it is positive semi-definite"
    gradient = [[grid.inverse(1j * k * grid.forward(velocity[..., i])) for k in (grid.kx, grid.ky)] for i in range(2)]
    assert np.allclose(strain[..., 0, 1], (gradient[0][1] + gradient[1][0]) / 2, atol=1e-12)
    assert np.allclose(strain[..., 0, 0], gradient[0][0], atol=1e-12)
    speed = velocity.std(axis=(-3, -2, -1))
    assert (speed[:, -1] > 5 * speed[:, 0]).all(), "activity must set the fluid in motion"


def test_stokes_fixed_point_converges_to_the_flow_that_balances_the_stress() -> None:
    """Residual of k^4 psi = curl div (alpha D + beta S:E - 2 zeta beta (D.D - S:D)), with E of that same flow."""
    model = active_matter.ActiveMatter(32, alpha=-3.0, zeta=3.0)
    start = active_matter.start(rng(5), 32)[None]
    start[:, 1:] *= 10  # order about 0.5, where S:E is far from isotropic
    state = model.grid.forward(start) * model.mask
    psi = model.flow(state, np.zeros_like(state[:, 0]), iterations=30)
    c, a, d = np.moveaxis(model.grid.inverse(state), 1, 0)
    s1, s2 = active_matter.fourth_moment(c, a, d)
    e_xx, e_xy = np.moveaxis(model.strain(psi), 1, 0)
    turned, aligned = active_matter.contract(c, s1, s2, e_xx, e_xy), active_matter.alignment(c, a, d, s1, s2)
    stress = [
        model.grid.forward(model.alpha * q + active_matter.BETA * t - 2 * model.zeta * active_matter.BETA * g)
        for q, t, g in zip((a, d), turned, aligned, strict=True)
    ]
    forcing = 2 * model.grid.kx * model.grid.ky * stress[0] - (model.grid.kx**2 - model.grid.ky**2) * stress[1]
    residual = (model.k_squared**2 * psi - forcing) * model.mask
    assert np.abs(residual).max() < 1e-9 * np.abs(forcing).max()
