"""The cards' symmetries, proved with the mini-Well's equations: transform, then evolve = evolve, then transform."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from data_pipeline.miniwell import (
    acoustic_maze,
    active_matter,
    euler,
    gray_scott,
    helmholtz,
    pdearena_smoke,
    radiative_layer,
    rayleigh_benard,
    shear_flow,
    viscoelastic,
)
from data_pipeline.miniwell.mac import Arrays, MacGrid, pad_x, ssp_rk3
from data_pipeline.registry import Card, Field, load_registry
from fm.training.augment import ChannelSymmetry, Transformation

CARDS = load_registry().cards
BY = {
    "shift_x": Transformation(shift=(5, 0)),
    "shift_y": Transformation(shift=(0, 3)),
    "reflect_x": Transformation(reflect=(True, False)),
    "reflect_y": Transformation(reflect=(False, True)),
    "transpose": Transformation(transpose=True),
}
# Symmetries that the boundary types allow, and the equations do not: gravity, a driven flow.
BROKEN = {
    "rayleigh_benard": "reflect_y",
    "viscoelastic_instability": "reflect_x",
    "pdearena_navier_stokes": "reflect_y",
}


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


# For each system: channels (C, H, W) of a first state in the card's order, its constants (c, H, W), and the function
# that returns the channels some time steps later.
State = tuple[np.ndarray, np.ndarray, Callable[[np.ndarray, np.ndarray], np.ndarray]]


def active_matter_state() -> State:
    c, a, d = active_matter.start(rng(), 32)
    model = active_matter.ActiveMatter(32, -3.0, 1.0)

    def channels(frame: np.ndarray) -> np.ndarray:
        c, a, d, u, v, e_xx, e_xy = frame
        return np.stack([c, u, v, c / 2 + a, d, d, c / 2 - a, e_xx, e_xy, e_xy, -e_xx])

    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        start = np.stack([state[0], (state[3] - state[6]) / 2, state[4]])
        return channels(model.evolve(start[None], 2, 0.1, 0.025)[0, -1])

    zero = np.zeros_like(c)
    return channels(np.stack([c, a, d, zero, zero, zero, zero])), np.empty((0, 32, 32)), evolve


def gray_scott_state() -> State:
    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        return gray_scott.evolve(state[None], 0.029, 0.057, 2, 25.0)[0, -1]

    return gray_scott.start_blobs(rng(), 32), np.empty((0, 32, 32)), evolve


def shear_flow_state() -> State:
    flow = shear_flow.ShearFlow((32, 64), 500.0, 0.5)

    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        u, v, tracer, pressure = flow.evolve(state[None, 2:], state[None, 0], 2, 0.2, 10)[0, -1]
        return np.stack([tracer, pressure, u, v])

    velocity = shear_flow.start(rng(), (32, 64))
    return np.stack([velocity[0], 0 * velocity[0], *velocity]), np.empty((0, 32, 64)), evolve


def radiative_layer_state() -> State:
    x, y = (np.arange(16) + 0.5) / 16 - 0.5, (np.arange(48) + 0.5) / 16 - 1
    start = radiative_layer.initial_state(x, y, 0.3, rng())

    def channels(conserved: np.ndarray) -> np.ndarray:
        density, u, v, pressure = euler.primitive_from_conserved(conserved, radiative_layer.GAMMA)
        return np.stack([density, pressure, u, v])

    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        density, pressure, u, v = state
        conserved = euler.conserved_from_primitive(np.stack([density, u, v, pressure]), radiative_layer.GAMMA)
        return channels(radiative_layer.advance(conserved[:, None], 0.2, 1 / 16, 0.32)[0][:, 0])

    return channels(start), np.empty((0, 16, 48)), evolve


def to_faces(grid: MacGrid, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A velocity (2, X, Y) at the centers, averaged to the faces, at rest on the walls, without divergence."""
    u, v = pad_x(velocity[0][None], 1, 0), np.zeros((1, grid.nx, grid.ny + 1))
    v[:, :, 1:-1] = (velocity[1][None, :, 1:] + velocity[1][None, :, :-1]) / 2
    return grid.project((u[:, 1:] + u[:, :-1]) / 2, v)


def swirl(shape: tuple[int, int]) -> np.ndarray:
    """A smooth velocity (2, X, Y) without any symmetry; waves along x, none of whose nodes are walls."""
    x, y = (2 * np.pi * (np.arange(size) + 0.5) / size for size in shape)
    phases = rng().uniform(0, 6, (2, 3))
    waves = [sum(np.cos(k * x[:, None] + (k - 2) * y + p[k - 1]) / k for k in (1, 2, 3)) for p in phases]
    return 0.2 * np.stack(waves)


def rayleigh_benard_state() -> State:
    grid, (kappa, nu) = MacGrid(32, 16, lx=4.0, ly=1.0), rayleigh_benard.diffusivities(1e5, 1.0)

    def euler_step(state: Arrays) -> Arrays:
        return rayleigh_benard.euler_step(state, grid, kappa, nu, 0.02)

    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        current: Arrays = (state[0][None], *to_faces(grid, state[2:]))
        for _ in range(5):
            current = ssp_rk3(current, euler_step)
        velocity = grid.to_centers(*current[1:])[0]
        return np.stack([current[0][0], rayleigh_benard.pressure(grid, current, nu)[0], *np.moveaxis(velocity, -1, 0)])

    buoyancy = rayleigh_benard.initial_buoyancy(grid, 0.3, rng())
    return np.stack([buoyancy, 0 * buoyancy, *swirl((32, 16))]), np.empty((0, 32, 16)), evolve


def pdearena_smoke_state() -> State:
    grid = pdearena_smoke.BoxGrid(16, 16, lx=pdearena_smoke.LENGTH, ly=pdearena_smoke.LENGTH)

    def euler_step(state: Arrays) -> Arrays:
        return pdearena_smoke.euler_step(state, grid, pdearena_smoke.NU, 0.5, 0.2)

    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        current: Arrays = (state[0][None], *to_faces(grid, state[1:]))
        for _ in range(5):
            current = ssp_rk3(current, euler_step)
        return np.stack([current[0][0], *np.moveaxis(grid.to_centers(*current[1:])[0], -1, 0)])

    return np.stack([pdearena_smoke.start(grid, rng()), *swirl((16, 16))]), np.empty((0, 16, 16)), evolve


def viscoelastic_state() -> State:
    grid = MacGrid(16, 12, lx=2 * np.pi, ly=2.0, y0=-1.0)
    fluid = viscoelastic.Fluid(Re=1000.0, Wi=10.0, beta=0.9, epsilon=4e-3, Lmax=70.0)

    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        _, c_zz, u, v, xx, xy, _, yy = state
        current: Arrays = (*to_faces(grid, np.stack([u, v])), np.stack([xx, xy, yy, c_zz])[:, None])
        for _ in range(5):
            current = viscoelastic.step(grid, fluid, current, 0.03)
        velocity = np.moveaxis(grid.to_centers(*current[:2])[0], -1, 0)
        xx, xy, yy, c_zz = current[2][:, 0]
        return np.stack([viscoelastic.pressure(grid, fluid, current)[0], c_zz, *velocity, xx, xy, xy, yy])

    u, conformation = viscoelastic.laminar_flow(grid, fluid)
    xx, xy, yy, zz = np.broadcast_to(conformation[:, None], (4, 16, 12))
    velocity = swirl((16, 12)) + np.stack([np.broadcast_to(u, (16, 12)), np.zeros((16, 12))])
    return np.stack([0 * xx, zz, *velocity, xx, xy, xy, yy]), np.empty((0, 16, 12)), evolve


def acoustic_maze_state() -> State:
    corridor = acoustic_maze.enlarge(acoustic_maze.maze(3, rng()), 28)
    x = (np.arange(28) + 0.5) / 14 - 1
    density = np.where(corridor, acoustic_maze.CORRIDOR_DENSITY, acoustic_maze.WALL_DENSITY)

    def evolve(state: np.ndarray, constants: np.ndarray) -> np.ndarray:
        states = acoustic_maze.leapfrog(state[:1], constants[:1], 1 / 14, 0.02, open_upper=(True, True))
        last = [next(states) for _ in range(40)][-1]
        return np.concatenate([last.pressure, np.moveaxis(acoustic_maze.cell_velocity(last)[0], -1, 0)])

    pressure = acoustic_maze.rings(x, corridor, 2.0, rng())
    constants = np.stack([density, np.sqrt(acoustic_maze.BULK_MODULUS / density)])
    return np.stack([pressure, 0 * pressure, 0 * pressure]), constants, evolve


STATES: dict[str, Callable[[], State]] = {
    "active_matter": active_matter_state,
    "gray_scott_reaction_diffusion": gray_scott_state,
    "shear_flow": shear_flow_state,
    "turbulent_radiative_layer_2D": radiative_layer_state,
    "rayleigh_benard": rayleigh_benard_state,
    "viscoelastic_instability": viscoelastic_state,
    "acoustic_scattering_maze": acoustic_maze_state,
    "pdearena_navier_stokes": pdearena_smoke_state,
}


def transformed(fields: tuple[Field, ...], values: np.ndarray, symmetry: str) -> np.ndarray:
    """Transform channels (C, H, W), in double precision but for the signs."""
    action = ChannelSymmetry(fields, torch.device("cpu"))
    return action.transform(torch.from_numpy(values.copy()), BY[symmetry]).numpy()


def difference(card: Card, symmetry: str) -> float:
    """How far the evolved transformed state is from the transformed evolved one, over how much the state changed."""
    state, constants, evolve = STATES[card.name]()
    later = evolve(state, constants)
    expected = transformed(card.state, later, symmetry)
    found = evolve(transformed(card.state, state, symmetry), transformed(card.constant, constants, symmetry))
    changed = np.abs(later - state).max(axis=(1, 2))
    assert (changed > 1e-6).all()  # in each channel: a state that stays as it is has all symmetries
    return float((np.abs(found - expected).max(axis=(1, 2)) / changed).max())


@pytest.mark.parametrize(("dataset", "symmetry"), [(name, one) for name in STATES for one in CARDS[name].symmetries])
def test_a_transformed_state_evolves_into_the_transformed_state(dataset: str, symmetry: str) -> None:
    assert difference(CARDS[dataset], symmetry) < 1e-9


@pytest.mark.parametrize(("dataset", "symmetry"), BROKEN.items())
def test_what_no_card_names_is_found_broken(dataset: str, symmetry: str) -> None:
    assert symmetry not in CARDS[dataset].symmetries
    assert difference(CARDS[dataset], symmetry) > 0.1


def test_a_mirrored_source_over_the_staircase_has_the_mirrored_sound() -> None:
    domain, omega = helmholtz.staircase(4), 1.2
    factors = helmholtz.factorize(helmholtz.assemble(domain, omega))
    sounds = [
        helmholtz.on_grid(domain, factors.solve(helmholtz.source_term(domain, (x, 0.7)) + 0j))[domain.box]
        for x in (1.3, -1.3)
    ]
    channels, mirrored = (np.stack([sound.real, sound.imag]) for sound in sounds)
    card = CARDS["helmholtz_staircase"]
    assert np.abs(transformed(card.state, channels, "reflect_x") - mirrored).max() < 1e-9 * np.abs(channels).max()
    solid = 1.0 - (domain.volume[domain.box] > 0)[None]
    assert np.array_equal(transformed(card.constant, solid, "reflect_x"), solid)
    assert not np.array_equal(transformed(card.constant, solid, "shift_x"), solid)
    assert {*STATES, card.name} == set(CARDS)  # every card is checked
