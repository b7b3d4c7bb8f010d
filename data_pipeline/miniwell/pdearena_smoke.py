"""pdearena_navier_stokes: smoke that rises in a closed box (PDEArena's Navier-Stokes at half the resolution).

    u_t + u . grad u = -grad p + nu lap u + buoyancy s e_y,   div u = 0,   s_t + u . grad s = 0

on [0, 32]^2 with no-slip walls all round. The fluid is at rest at first, and the smoke is the absolute value of a
smooth random field (Gupta & Brandstetter 2022, arXiv 2209.15616; microsoft/pdearena, pdedatagen/navier_stokes.py).
Plumes rise, meet the lid and roll up. The first steps are not stored, as in PDEArena.

Finite volumes on a MAC grid with twice the stored points along each axis, SSP-RK3 with a projection at every stage.
Limited upwind fluxes carry the smoke and conserve it. The stored fields are means over 2 x 2 cells. PDEArena instead
takes semi-Lagrangian steps of 1.5: their interpolation smooths more and loses smoke.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from scipy import fft

from data_pipeline.miniwell.mac import Arrays, MacGrid, diff_x, half_slope, momentum_tendency, pad_x, ssp_rk3, upwind
from data_pipeline.miniwell.system import ParameterSet, Preset, Simulation, System, counts
from data_pipeline.well.layout import edges

LENGTH = 32.0
WALLS = (("WALL", "WALL"), ("WALL", "WALL"))
REFINE = 2  # cells per stored point, along each axis
NU = 0.01  # viscosity
NOISE_POWER = 6.0  # of PDEArena's noise: waves of number n have amplitudes in proportion to (n^2)^-6
LARGEST_MODE = 3  # of the start: the waves left out have amplitudes below 1e-7 of the first ones'
COURANT = 0.9  # largest (|u| + |v|) dt / dx
MAX_STEP = 0.5  # limits the first steps, from rest


@dataclass(frozen=True)
class BoxGrid(MacGrid):
    """A MAC grid with walls in x, too. The face x = 0, where u is zero, is also the face x = lx of the last cells."""

    @cached_property
    def _inverse_eigenvalues(self) -> np.ndarray:
        """(X, Y): 1 / eigenvalue of the five-point Laplacian per pair of cosine modes, 0 for the mean."""
        in_x, in_y = (
            (2 - 2 * np.cos(np.pi * np.arange(count) / count)) / step**2
            for count, step in ((self.nx, self.dx), (self.ny, self.dy))
        )
        eigenvalues = -in_x[:, None] - in_y[None, :]
        eigenvalues[0, 0] = np.inf
        return 1 / eigenvalues

    def poisson(self, source: np.ndarray) -> np.ndarray:
        """Return the zero-mean p of laplacian(p) = source - mean(source), no normal derivative at the walls; (b, X, Y).

        Exact for the five-point Laplacian: cosine modes (DCT-II) in x and y diagonalize it.
        """
        return fft.idctn(fft.dctn(source, axes=(1, 2)) * self._inverse_eigenvalues, axes=(1, 2))

    def project(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the divergence-free part of (u, v), both zero on the walls that they are normal to."""
        u, v = super().project(u, v)
        u[:, 0] = 0
        return u, v


def start(grid: MacGrid, rng: np.random.Generator) -> np.ndarray:
    """Return smoke (X, Y): the absolute value of smooth periodic noise of mean 0 and standard deviation 1."""
    modes = np.arange(-LARGEST_MODE, LARGEST_MODE + 1)
    numbers = modes[:, None] ** 2 + modes[None, :] ** 2
    envelope = np.where(numbers > 0, np.maximum(numbers, 1.0) ** -NOISE_POWER, 0.0)
    real, imaginary = rng.standard_normal((2, *numbers.shape))
    wave_x, wave_y = (
        np.exp(2j * np.pi * modes[:, None] * points / length)
        for points, length in ((grid.x, grid.lx), (grid.y, grid.ly))
    )
    noise = (wave_x.T @ (envelope * (real + 1j * imaginary)) @ wave_y).real
    return np.abs(noise / noise.std())


def smoke_tendency(grid: MacGrid, smoke: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return -div(u s), (b, X, Y); nothing flows through the walls."""
    in_x = pad_x(smoke, 2, 1)
    steps = in_x[:, 1:] - in_x[:, :-1]
    steps[:, [1, -1]] = 0  # across the walls; the first is that between the cells -1 and 0
    half = half_slope(steps[:, :-1], steps[:, 1:])  # cells -1 .. X-1
    tendency = diff_x(upwind(u, in_x[:, 1:-2] + half[:, :-1], in_x[:, 2:-1] - half[:, 1:]), -grid.dx)

    steps = np.diff(smoke, axis=2, prepend=smoke[:, :, :1], append=smoke[:, :, -1:])
    half = half_slope(steps[:, :, :-1], steps[:, :, 1:])
    flux = np.zeros_like(v)
    flux[:, :, 1:-1] = upwind(v[:, :, 1:-1], smoke[:, :, :-1] + half[:, :, :-1], smoke[:, :, 1:] - half[:, :, 1:])
    tendency -= np.diff(flux, axis=2) / grid.dy
    return tendency


def velocity_tendency(
    grid: MacGrid, smoke: np.ndarray, u: np.ndarray, v: np.ndarray, nu: float, buoyancy: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return all of u_t but the pressure gradient, (b, X, Y) and (b, X, Y + 1)."""
    du, dv = momentum_tendency(grid, u, v, nu)
    du[:, 0] = 0
    # momentum_tendency took the first and the last cells for neighbors. Beyond a no-slip wall, v is its mirror image
    # with the opposite sign, and the difference of the two viscous fluxes is the same for both columns.
    dv[:, [0, -1], 1:-1] -= (v[:, :1, 1:-1] + v[:, -1:, 1:-1]) * (nu / grid.dx**2)
    dv[:, :, 1:-1] += (smoke[:, :, 1:] + smoke[:, :, :-1]) * (buoyancy / 2)
    return du, dv


def euler_step(state: Arrays, grid: MacGrid, nu: float, buoyancy: float, dt: float) -> Arrays:
    """Take one projected forward Euler step of (smoke, u, v)."""
    smoke, u, v = state
    du, dv = velocity_tendency(grid, smoke, u, v, nu, buoyancy)
    projected = grid.project(u + dt * du, v + dt * dv)
    return smoke + dt * smoke_tendency(grid, smoke, u, v), *projected


def advance(grid: MacGrid, state: Arrays, buoyancy: float, interval: float) -> Arrays:
    """Return the state after `interval`, in steps that the largest speed limits."""
    left = interval
    while left > 1e-9 * interval:
        speed = np.abs(grid.to_centers(*state[1:])).sum(axis=-1).max()  # dx = dy
        dt = min(COURANT * grid.dx / max(speed, COURANT * grid.dx / MAX_STEP), left)
        state = ssp_rk3(state, partial(euler_step, grid=grid, nu=NU, buoyancy=buoyancy, dt=dt))
        left -= dt
    return state


def block_mean(values: np.ndarray) -> np.ndarray:
    """Return the means over REFINE x REFINE cells: (X, Y, ...) -> (X / REFINE, Y / REFINE, ...)."""
    nx, ny, *rest = values.shape
    return values.reshape(nx // REFINE, REFINE, ny // REFINE, REFINE, *rest).mean(axis=(1, 3))


def simulate(preset: Preset, parameters: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate one trajectory per generator, each with its own time steps; see System.simulate."""
    nx, ny = preset.grid
    grid, stored = (BoxGrid(factor * nx, factor * ny, lx=LENGTH, ly=LENGTH) for factor in (REFINE, 1))
    shape, spin_up = (len(rngs), preset.num_frames, *preset.grid), preset.options["spin_up"]
    smoke, velocity = np.empty(shape), np.empty((*shape, 2))
    for row, rng in enumerate(rngs):
        at_rest = np.zeros((1, grid.nx, grid.ny)), np.zeros((1, grid.nx, grid.ny + 1))
        state: Arrays = (start(grid, rng)[None], *at_rest)
        for frame in range(preset.num_frames):
            state = advance(grid, state, parameters.scalars["buo_y"], preset.dt if frame else spin_up)
            smoke[row, frame] = block_mean(state[0][0])
            velocity[row, frame] = block_mean(grid.to_centers(*state[1:])[0])
    fields = {"smoke": smoke, "velocity": velocity}
    return Simulation(spin_up + preset.times, stored.x, stored.y, fields, edges(WALLS, preset.grid))


def _set(label: str, *trajectories: int) -> ParameterSet:
    return ParameterSet(label, {"buo_y": 0.5}, counts(*trajectories))  # the name of the buoyancy in PDEArena's files


# PDEArena has 5,200 training trajectories, in files of 32. With 16, a small model overfits within 3,200 steps
# (tests/benchmarks/RESULTS.md). With 128, the simulation takes five CPU minutes.
FILES = tuple(_set(str(number), 16, 1, 2) for number in range(8))

SYSTEM = System(
    name="pdearena_navier_stokes",
    tensor_orders={"smoke": 0, "velocity": 1},
    presets={  # PDEArena's first stored frame is the ninth step of 1.5
        "mini": Preset((64, 64), 14, 1.5, FILES, {"spin_up": 13.5}),
        "tiny": Preset((16, 16), 9, 1.5, (_set("", 2, 1, 1),), {"spin_up": 13.5}),
    },
    simulate=simulate,
    cost=350.0,
)
