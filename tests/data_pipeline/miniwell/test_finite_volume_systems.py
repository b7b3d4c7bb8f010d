"""Physics of the three finite-volume systems: radiative layer, acoustic maze, Helmholtz staircase."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.ndimage import label
from scipy.optimize import brentq
from scipy.special import hankel1

from data_pipeline.miniwell import acoustic_maze, helmholtz, radiative_layer
from data_pipeline.miniwell.radiative_layer import GAMMA
from data_pipeline.miniwell.system import SPLITS, ParameterSet, Simulation, System

SYSTEMS = [module.SYSTEM for module in (radiative_layer, acoustic_maze, helmholtz)]


def rngs(*numbers: int) -> list[np.random.Generator]:
    return [np.random.default_rng([7, number]) for number in numbers]


def tiny(system: System, generators: list[np.random.Generator], index: int = 0) -> Simulation:
    preset = system.presets["tiny"]
    return system.simulate(preset, preset.parameter_sets[index], generators)


# --- every system


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_tiny_simulation_has_the_promised_arrays_and_moves(system: System) -> None:
    preset = system.presets["tiny"]
    simulation = tiny(system, rngs(0, 1))
    assert list(simulation.fields) == list(system.tensor_orders)
    assert (len(simulation.x), len(simulation.y)) == preset.grid
    for name, order in system.tensor_orders.items():
        values = simulation.fields[name]
        assert values.shape == (2, preset.num_frames, *preset.grid) + (2,) * order
        assert np.isfinite(values).all()
        change = np.abs(np.diff(values, axis=1)).max(axis=(2, 3))
        assert (change > 1e-3 * values.std()).all(), f"{name} stands still"
    assert len(simulation.time) == preset.num_frames
    for boundary in simulation.boundaries:
        assert boundary.mask.shape == tuple(len(getattr(simulation, dim)) for dim in boundary.dims)
        assert boundary.mask.any()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_trajectory_depends_on_its_own_generator_only(system: System) -> None:
    together, alone = tiny(system, rngs(0, 1, 2)), tiny(system, rngs(1))
    for name, values in together.fields.items():
        np.testing.assert_array_equal(values[1], alone.fields[name][0])
        assert np.abs(values[1] - values[0]).max() > 1e-3 * values.std()
    for name, constant in together.constant_fields.items():
        sample_varying = constant.ndim == 3
        np.testing.assert_array_equal(
            constant[1] if sample_varying else constant,
            alone.constant_fields[name][0] if sample_varying else alone.constant_fields[name],
        )


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_every_parameter_set_is_trained_and_tested_on(system: System, name: str) -> None:
    sets = system.presets[name].parameter_sets
    assert all(one.num_trajectories["train"] and one.num_trajectories["test"] for one in sets)
    assert all(any(one.num_trajectories[split] for one in sets) for split in SPLITS)
    assert len({one.label for one in sets}) == len(sets)


# --- turbulent radiative layer


def exact_sod(position_over_time: np.ndarray) -> np.ndarray:
    """Density, velocities and pressure of Sod's problem (Toro, chapter 4): rarefaction left, shock right."""
    rho_l, p_l, rho_r, p_r = 1.0, 1.0, 0.125, 0.1
    sound_l = np.sqrt(GAMMA * p_l / rho_l)

    def shock(p: float) -> float:
        return (p - p_r) * np.sqrt(2 / ((GAMMA + 1) * rho_r) / (p + (GAMMA - 1) / (GAMMA + 1) * p_r))

    def rarefaction(p: float) -> float:
        return 2 * sound_l / (GAMMA - 1) * (1 - (p / p_l) ** ((GAMMA - 1) / (2 * GAMMA)))

    p_star = brentq(lambda p: shock(p) - rarefaction(p), p_r, p_l)
    u_star, weak = shock(p_star), (GAMMA - 1) / (GAMMA + 1)
    rho_star_l = rho_l * (p_star / p_l) ** (1 / GAMMA)
    rho_star_r = rho_r * (p_star / p_r + weak) / (weak * p_star / p_r + 1)
    shock_speed = rho_star_r * u_star / (rho_star_r - rho_r)
    head, tail = -sound_l, u_star - sound_l * (p_star / p_l) ** ((GAMMA - 1) / (2 * GAMMA))

    xi = position_over_time
    fan_sound = (2 * sound_l - (GAMMA - 1) * xi) / (GAMMA + 1)
    fan = rho_l * (fan_sound / sound_l) ** (2 / (GAMMA - 1))
    regions = [xi < head, xi < tail, xi < u_star, xi < shock_speed]
    density = np.select(regions, [rho_l, fan, rho_star_l, rho_star_r], rho_r)
    velocity = np.select(regions, [0.0, xi + fan_sound, u_star, u_star], 0.0)
    pressure = np.select(regions, [p_l, fan_sound**2 * fan / GAMMA, p_star, p_star], p_r)
    return np.stack([density, velocity, np.where(xi < u_star, 0.1, -0.1), pressure])


def sod_errors(cells: int, normal: int) -> list[float]:
    """Mean absolute errors at time 0.2 on [0, 1]: density, normal and tangential velocity, pressure.

    The tangential velocity, 0.1 left and -0.1 right, is carried along and jumps at the contact.
    """
    x = (np.arange(cells) + 0.5) / cells
    primitive = np.zeros((4, 1, 1, cells))
    primitive[0], primitive[3] = np.where(x < 0.5, 1.0, 0.125), np.where(x < 0.5, 1.0, 0.1)
    primitive[3 - normal] = np.where(x < 0.5, 0.1, -0.1)
    conserved = radiative_layer.conserved_from_primitive(primitive)
    remaining = 0.2
    while remaining > 0:
        step = np.minimum(radiative_layer.stable_step(conserved, 1 / cells), remaining)
        conserved, _ = radiative_layer.sweep(conserved, step[:, None, None] * cells, normal, periodic=False)
        remaining -= step[0]
    result = radiative_layer.primitive_from_conserved(conserved)[[0, normal, 3 - normal, 3], 0, 0]
    return list(np.abs(result - exact_sod((x - 0.5) / 0.2)).mean(axis=1))


def test_sod_tube_converges_to_the_exact_riemann_solution() -> None:
    coarse, fine = sod_errors(100, 1), sod_errors(200, 1)
    assert np.all(np.array(fine) < [3.5e-3, 4e-3, 2e-3, 2e-3])
    assert np.all(np.array(fine) < 0.7 * np.array(coarse))
    assert sod_errors(100, 2) == coarse  # the scheme does not know which axis it is on


@pytest.mark.parametrize("normal", [1, 2])
def test_hllc_carries_tangential_velocity_with_the_mass(normal: int) -> None:
    left, right = np.array([1.0, 0.2, 0.2, 1.0]), np.array([0.125, -0.1, -0.1, 0.1])
    left[3 - normal] = right[3 - normal] = 0.7
    flux = radiative_layer.hllc_flux(left[:, None], right[:, None], normal)
    assert flux[3 - normal] == pytest.approx(0.7 * flux[0], rel=1e-14)
    same = radiative_layer.hllc_flux(left[:, None], left[:, None], normal)
    energy = 1.0 / (GAMMA - 1) + 0.5 * (0.2**2 + 0.7**2)
    expected = {0: 0.2, normal: 0.2**2 + 1.0, 3 - normal: 0.2 * 0.7, 3: 0.2 * (energy + 1.0)}
    assert list(same[:, 0]) == pytest.approx([expected[row] for row in range(4)], rel=1e-12)


def wave_error(cells: int, wave: np.ndarray, speed: float) -> float:
    """A weak plane wave (its density, velocities and pressure) once around the periodic axis, against no change."""
    x = (np.arange(cells) + 0.5) / cells
    amplitude = 1e-4
    shape = np.broadcast_to(np.sin(2 * np.pi * x)[:, None], (cells, 4))
    primitive = np.array([1.0, 0.5, 0.2, 1.0])[:, None, None] + amplitude * wave[:, None, None] * shape
    start = radiative_layer.conserved_from_primitive(primitive)[:, None]
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
        state = radiative_layer.conserved_from_primitive(gas)
        for _ in range(steps):
            state, _ = radiative_layer.cool(state, np.full((1, 1, 1), duration / steps), tcool)
        density, velocity_x, velocity_y, pressure = radiative_layer.primitive_from_conserved(state)[:, 0, 0, 0]
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


def test_broken_gas_is_reported() -> None:
    state = radiative_layer.conserved_from_primitive(np.ones((4, 1, 2, 2)))
    state[3, 0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="pressure nan"):
        radiative_layer.stable_step(state, 0.1)


# --- acoustic maze

SPACING, STEP = 2 / 64, 0.5 * 2 / 64 / np.sqrt(4 / 3)
CLOSED, OPEN = (False, False), (True, True)


def maze_start() -> tuple[np.ndarray, np.ndarray]:
    """Pressure and density (2, 64, 64) of two mazes."""
    pressures, densities = [], []
    for rng in rngs(0, 1):
        corridor = acoustic_maze.enlarge(acoustic_maze.maze(4, rng), 64)
        pressures.append(acoustic_maze.rings(-1 + SPACING * (np.arange(64) + 0.5), corridor, 2.0, rng))
        densities.append(np.where(corridor, acoustic_maze.CORRIDOR_DENSITY, acoustic_maze.WALL_DENSITY))
    return np.stack(pressures), np.stack(densities)


def energies(leaps: Sequence[acoustic_maze.Leap], density: np.ndarray) -> np.ndarray:
    """Discrete energy half a step after each of `leaps` but the last, (steps, b)."""
    rows = []
    for now, then in pairwise(leaps):
        total = now.pressure * then.pressure / (2 * acoustic_maze.BULK_MODULUS)
        for axis, velocity in zip((1, 2), now.after, strict=True):
            total = total + 0.5 * acoustic_maze.face_mass(density, axis) * velocity**2
        rows.append(total.sum(axis=(1, 2)))
    return np.stack(rows)


def test_closed_maze_conserves_energy_and_total_pressure() -> None:
    pressure, density = maze_start()
    leaps = list(islice(acoustic_maze.leapfrog(pressure, density, SPACING, STEP, CLOSED), 400))
    energy = energies(leaps, density)
    np.testing.assert_allclose(energy, np.broadcast_to(energy[0], energy.shape), rtol=1e-12)
    np.testing.assert_allclose(leaps[-1].pressure.sum(axis=(1, 2)), pressure.sum(axis=(1, 2)), rtol=1e-11)
    assert np.abs(leaps[-1].pressure - pressure).max() > 1


def test_open_maze_only_loses_energy() -> None:
    pressure, density = maze_start()
    leaps = list(islice(acoustic_maze.leapfrog(pressure, density, SPACING, STEP, OPEN), 1500))
    energy = energies(leaps, density)
    assert (np.diff(energy, axis=0) <= 1e-13 * energy[0]).all()
    assert (energy[-1] < 0.97 * energy[0]).any()


def pulse(x: np.ndarray, centre: float) -> np.ndarray:
    return np.exp(-(((x - centre) / 0.12) ** 2))


def plane_wave(cells: int, density: np.ndarray, centre: float, duration: float) -> np.ndarray:
    """Pressure (cells,) of a plane pulse along x after `duration`; density (cells,); the upper end of x is open."""
    spacing = 2 / cells
    x = -1 + spacing * (np.arange(cells) + 0.5)
    pressure = np.repeat(pulse(x, centre)[None, :, None], 3, axis=2)
    steps = int(np.ceil(duration * np.sqrt(4 / 3) / (0.5 * spacing)))
    medium = np.broadcast_to(density[None, :, None], pressure.shape)
    leaps = acoustic_maze.leapfrog(pressure, medium, spacing, duration / steps, (True, False))
    return next(islice(leaps, steps, None)).pressure[0, :, 1]


def test_plane_pulse_follows_d_alembert_at_second_order() -> None:
    errors = []
    for cells in (128, 256):
        x = -1 + 2 / cells * (np.arange(cells) + 0.5)
        travelled = 0.5 * np.sqrt(4 / 3)
        exact = 0.5 * (pulse(x, travelled) + pulse(x, -travelled))
        errors.append(np.abs(plane_wave(cells, np.full(cells, 3.0), 0.0, 0.5) - exact).max())
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 3.5


def test_pulse_splits_at_a_density_jump_as_impedances_say() -> None:
    x = -1 + 2 / 512 * (np.arange(512) + 0.5)
    density = np.where(x < 0.3, 3.0, 27.0)  # impedances 1 : 3
    after = plane_wave(512, density, -0.2, 0.85)
    reflected, transmitted = after[(x > -0.5) & (x < 0.3)].max(), after[x > 0.3].max()
    assert reflected == pytest.approx(0.5 * (3 - 1) / (3 + 1), rel=0.02)
    assert transmitted == pytest.approx(0.5 * 2 * 3 / (3 + 1), rel=0.02)


def test_plane_pulse_leaves_through_the_open_end() -> None:
    # The left half bounces off the closed end first: by time 4 both have crossed the open one.
    assert np.abs(plane_wave(128, np.full(128, 3.0), 0.0, 4.0)).max() < 2e-3


def test_mazes_are_perfect_and_differ() -> None:
    mazes = [acoustic_maze.maze(5, rng) for rng in rngs(*range(5))]
    for corridor in mazes:
        assert label(corridor)[1] == 1
        assert corridor[1::2, 1::2].all()
        assert corridor.sum() == 5 * 5 + (5 * 5 - 1) + 2  # rooms, a tree of passages, two gaps
        assert corridor[:, 0].sum() == corridor[:, -1].sum() == 1
        assert not corridor[0].any()
        assert not corridor[-1].any()
    assert len({corridor.tobytes() for corridor in mazes}) == 5


def test_maze_walls_keep_sound_out_and_the_constants_say_where_they_are() -> None:
    simulation = tiny(acoustic_maze.SYSTEM, rngs(0, 1))
    density, speed = simulation.constant_fields["density"], simulation.constant_fields["speed_of_sound"]
    assert set(np.unique(density)) == {acoustic_maze.CORRIDOR_DENSITY, acoustic_maze.WALL_DENSITY}
    np.testing.assert_allclose(speed**2 * density, 4.0)
    wall = np.broadcast_to((density > 10)[:, None], simulation.fields["pressure"].shape)
    loudness = np.sqrt((simulation.fields["pressure"] ** 2)[wall].mean()), simulation.fields["pressure"][~wall].std()
    assert loudness[0] < 0.03 * loudness[1]
    assert not simulation.fields["velocity"][:, 0].any()  # the fluid starts at rest


# --- Helmholtz staircase


@pytest.fixture(scope="module")
def staircase() -> helmholtz.Domain:
    return helmholtz.staircase(8)


def test_helmholtz_solution_solves_its_system_and_is_reciprocal(staircase: helmholtz.Domain) -> None:
    matrix = helmholtz.assemble(staircase, 1.1821)
    factors = helmholtz.factorise(matrix)
    sources = [helmholtz.source_term(staircase, position) for position in ((-1.3, 0.4), (2.2, 1.1))]
    first, second = (factors.solve(source + 0j) for source in sources)
    assert np.linalg.norm(matrix @ first - sources[0]) < 1e-11 * np.linalg.norm(sources[0])
    assert sources[1] @ first == pytest.approx(sources[0] @ second, rel=1e-10)
    assert abs(matrix - matrix.T).max() == 0


def test_helmholtz_power_of_the_source_leaves_the_box(staircase: helmholtz.Domain) -> None:
    source = helmholtz.source_term(staircase, (0.7, 0.3))
    solution = helmholtz.factorise(helmholtz.assemble(staircase, 1.5413)).solve(source + 0j)
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
    solution = helmholtz.factorise(helmholtz.assemble(flat, omega)).solve(helmholtz.source_term(flat, (x0, y0)) + 0j)
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
        factors = helmholtz.factorise(helmholtz.assemble(domain, 1.1821))
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
