"""acoustic_scattering_maze: sound in the corridors of a random maze with very heavy walls.

    d_t p + K div u = 0,   rho d_t u + grad p = 0,   K = 4,   rho = 3 in corridors and 1e6 + 3 in walls

Staggered leapfrog (Yee): p in cells at whole steps n, normal velocities on faces at half steps. A closed end has u = 0.
The face at an open end carries the mass of half a cell and is held back by the impedance of an endless tube,
rho h/2 d_t u = p - Z u with Z = sqrt(K rho) and u averaged over the step. The discrete energy
sum p(n) p(n+1) / 2K + sum m u(n+1/2)^2 / 2 is then conserved exactly in a closed box and never grows in an open one.
As in the Well's files the lower ends of both axes are closed and the upper ends open. The waves are solved on a grid
twice as fine as the stored one, because on the stored grid the corridors fill with grid-scale dispersion.

Arrays are (b, X, Y): cells, and for each axis the upper face of every cell, the last of which is the end of the box.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.miniwell.system import ParameterSet, Preset, Simulation, System, counts
from data_pipeline.well.layout import edge

BULK_MODULUS = 4.0
CORRIDOR_DENSITY = 3.0
WALL_DENSITY = 1.0e6 + 3.0
COURANT = 0.5  # c dt / h; the scheme is stable up to 1 / sqrt(2)
REFINE = 2  # solved cells per stored cell and axis
SMALLEST, LARGEST = 3, 6  # rooms along a side of the maze
MAX_RINGS = 5


@dataclass(frozen=True)
class Leap:
    """The state around one whole step n: p at n, x- and y-face velocities at n - 1/2 and n + 1/2, all (b, X, Y)."""

    pressure: np.ndarray
    before: tuple[np.ndarray, np.ndarray]
    after: tuple[np.ndarray, np.ndarray]


def maze(rooms: int, rng: np.random.Generator) -> np.ndarray:
    """Return a perfect maze (exactly one way between any two rooms), True in corridors, (2 * rooms + 1,) * 2.

    A depth-first walk digs into a random undug neighbor and steps back where there is none. The outer wall has one gap
    on the lower and one on the upper y side.
    """
    corridor = np.zeros((2 * rooms + 1, 2 * rooms + 1), dtype=bool)
    start = tuple(int(room) for room in rng.integers(rooms, size=2))
    corridor[2 * start[0] + 1, 2 * start[1] + 1] = True
    trail = [start]
    while trail:
        i, j = trail[-1]
        neighbors = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        undug = [
            (k, m) for k, m in neighbors if 0 <= k < rooms and 0 <= m < rooms and not corridor[2 * k + 1, 2 * m + 1]
        ]
        if not undug:
            trail.pop()
            continue
        k, m = undug[rng.integers(len(undug))]
        corridor[i + k + 1, j + m + 1] = corridor[2 * k + 1, 2 * m + 1] = True
        trail.append((k, m))
    corridor[2 * rng.integers(rooms) + 1, 0] = corridor[2 * rng.integers(rooms) + 1, -1] = True
    return corridor


def enlarge(cells: np.ndarray, size: int) -> np.ndarray:
    """Return a square array enlarged to (size, size), by its nearest neighbors."""
    source = ((np.arange(size) + 0.5) * len(cells) / size).astype(int)
    return cells[np.ix_(source, source)]


def rings(x: np.ndarray, corridor: np.ndarray, width_scale: float, rng: np.random.Generator) -> np.ndarray:
    """Return one to five pressure rings centered in corridors and cut off at walls, (X, Y).

    Ring: I exp(-((r - r0) / w)^2), I in [3, 5], r0 in [.03, .1], w in [.05, .07] * width_scale.
    """
    inside = np.argwhere(corridor)
    pressure = np.zeros(corridor.shape)
    for _ in range(rng.integers(1, MAX_RINGS + 1)):
        center_x, center_y = x[inside[rng.integers(len(inside))]]
        intensity, radius, width = rng.uniform([3.0, 0.03, 0.05], [5.0, 0.1, 0.07])
        distance = np.hypot(x[:, None] - center_x, x[None, :] - center_y)
        pressure += intensity * np.exp(-(((distance - radius) / (width * width_scale)) ** 2))
    return np.where(corridor, pressure, 0.0)


def _but_first(faces: np.ndarray, axis: int) -> np.ndarray:
    return faces[:, 1:] if axis == 1 else faces[:, :, 1:]


def _but_last(faces: np.ndarray, axis: int) -> np.ndarray:
    return faces[:, :-1] if axis == 1 else faces[:, :, :-1]


def face_mass(density: np.ndarray, axis: int) -> np.ndarray:
    """Return the mass per cell volume moved by each upper face along `axis`: half of either neighbor; (b, X, Y)."""
    mass = 0.5 * density
    _but_last(mass, axis)[...] += 0.5 * _but_first(density, axis)
    return mass


def leapfrog(
    pressure: np.ndarray, density: np.ndarray, spacing: float, step: float, open_upper: tuple[bool, bool]
) -> Iterator[Leap]:
    """Yield the states at times 0, step, 2 step, ..., without end; the fluid starts at rest.

    pressure, density (b, X, Y); `open_upper` opens the upper end of x and of y, the lower ends are walls.
    """
    (keep_x, push_x), (keep_y, push_y) = (_face_response(density, axis, step / spacing, open_upper) for axis in (1, 2))
    # At rest the velocities half a step before and after are opposite.
    after_x = push_x / (1 + keep_x) * pressure_drop(pressure, 1)
    after_y = push_y / (1 + keep_y) * pressure_drop(pressure, 2)
    before_x, before_y = -after_x, -after_y
    while True:
        yield Leap(pressure, (before_x, before_y), (after_x, after_y))
        outflow = after_x + after_y
        _but_first(outflow, 1)[...] -= _but_last(after_x, 1)
        _but_first(outflow, 2)[...] -= _but_last(after_y, 2)
        pressure = pressure - BULK_MODULUS * step / spacing * outflow
        before_x, before_y = after_x, after_y
        after_x = keep_x * before_x + push_x * pressure_drop(pressure, 1)
        after_y = keep_y * before_y + push_y * pressure_drop(pressure, 2)


def pressure_drop(pressure: np.ndarray, axis: int) -> np.ndarray:
    """Return the pressure below each upper face minus that above it, which is 0 outside the box; (b, X, Y)."""
    drop = pressure.copy()
    _but_last(drop, axis)[...] -= _but_first(pressure, axis)
    return drop


def _face_response(
    density: np.ndarray, axis: int, ratio: float, open_upper: tuple[bool, bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of u(n+1/2) = keep * u(n-1/2) + push * pressure_drop(n); ratio = time step / spacing."""
    push = ratio / face_mass(density, axis)
    resistance = np.zeros_like(density)
    end = np.s_[:, -1] if axis == 1 else np.s_[:, :, -1]
    if open_upper[axis - 1]:
        resistance[end] = 0.5 * push[end] * np.sqrt(BULK_MODULUS * density[end])
    else:
        push[end] = 0.0
    return (1 - resistance) / (1 + resistance), push / (1 + resistance)


def cell_velocity(leap: Leap) -> np.ndarray:
    """Return the velocity at cell centers and at the whole step, (b, X, Y, 2): means over two half steps and faces."""
    components = []
    for axis, before, after in zip((1, 2), leap.before, leap.after, strict=True):
        upper = 0.5 * (before + after)
        center = 0.5 * upper
        _but_first(center, axis)[...] += 0.5 * _but_last(upper, axis)
        components.append(center)
    return np.stack(components, axis=-1)


def coarsen(cells: np.ndarray) -> np.ndarray:
    """Return means over REFINE x REFINE blocks of axes 1 and 2: (b, X, Y, ...) -> (b, X/REFINE, Y/REFINE, ...)."""
    b, num_x, num_y = cells.shape[:3]
    return cells.reshape(b, num_x // REFINE, REFINE, num_y // REFINE, REFINE, *cells.shape[3:]).mean(axis=(2, 4))


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate trajectories in one random maze each; see System.simulate."""
    size = preset.grid[0]
    fine = size * REFINE
    spacing = 2.0 / fine
    x = -1.0 + spacing * (np.arange(fine) + 0.5)
    corridors, pressures = [], []
    for rng in rngs:
        # Enlarged on the stored grid first, so that no stored cell is half wall.
        stored = enlarge(maze(int(rng.integers(SMALLEST, LARGEST + 1)), rng), size)
        corridors.append(stored)
        pressures.append(rings(x, np.kron(stored, np.ones((REFINE, REFINE), dtype=bool)), 64 / size, rng))
    stored_density = np.where(np.stack(corridors), CORRIDOR_DENSITY, WALL_DENSITY)
    density = stored_density.repeat(REFINE, axis=1).repeat(REFINE, axis=2)
    fastest = np.sqrt(BULK_MODULUS / CORRIDOR_DENSITY)
    substeps = int(np.ceil(preset.dt * fastest / (COURANT * spacing)))

    pressure, velocity = [], []
    states = leapfrog(np.stack(pressures), density, spacing, preset.dt / substeps, open_upper=(True, True))
    for index, leap in zip(range((preset.num_frames - 1) * substeps + 1), states, strict=False):
        if index % substeps == 0:
            pressure.append(coarsen(leap.pressure))
            velocity.append(coarsen(cell_velocity(leap)))
    stored_x = coarsen(np.broadcast_to(x[None, :, None], (1, fine, fine)))[0, :, 0]
    return Simulation(
        time=preset.times,
        x=stored_x,
        y=stored_x.copy(),
        fields={"pressure": np.stack(pressure, axis=1), "velocity": np.stack(velocity, axis=1)},
        boundaries=(
            edge("x0_wall", "WALL", "x", size, upper=False),
            edge("xL_open", "OPEN", "x", size, lower=False),
            edge("y0_wall", "WALL", "y", size, upper=False),
            edge("yL_open", "OPEN", "y", size, lower=False),
        ),
        constant_fields={"density": stored_density, "speed_of_sound": np.sqrt(BULK_MODULUS / stored_density)},
    )


SYSTEM = System(
    name="acoustic_scattering_maze",
    tensor_orders={"pressure": 0, "velocity": 1},
    presets={
        "mini": Preset((64, 64), 36, 0.04, (ParameterSet("maze", {}, counts(12, 2, 8)),)),
        "tiny": Preset((32, 32), 9, 0.08, (ParameterSet("maze", {}, counts(2, 1, 1)),)),
    },
    simulate=simulate,
    cost=0.6,
)
