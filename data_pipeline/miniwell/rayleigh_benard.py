"""Rayleigh-Benard convection (The Well's `rayleigh_benard` at low Rayleigh number, on a uniform grid in y).

    b_t + u . grad b = kappa lap b,   u_t + u . grad u = -grad p + nu lap u + b e_y,   div u = 0
    kappa = (Ra Pr)^(-1/2),  nu = (Ra / Pr)^(-1/2),  x in [0, 4) periodic,  y in [0, 1] no-slip,  b = 1 below, 0 above

Finite volumes on a MAC grid, SSP-RK3 with a projection at every stage, buoyancy by limited upwind fluxes, which keep it
between its wall values. Convection starts from noise and takes some time to set in; that spin-up is not stored.
The Well has Chebyshev nodes in y; here they are uniform, as in its `rayleigh_benard_uniform`.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from data_pipeline.miniwell.mac import (
    Arrays,
    MacGrid,
    diff_x,
    half_slope,
    momentum_tendency,
    pad_x,
    ssp_rk3,
    upwind,
)
from data_pipeline.miniwell.system import ParameterSet, Preset, Simulation, System, counts, integrate
from data_pipeline.well.layout import edge

BUOYANCY_BELOW, BUOYANCY_ABOVE = 1.0, 0.0
INITIAL_DROPS = (0.4, 0.6, 0.8, 1.0)  # The Well's initial buoyancy differences, but for its 0.2


def diffusivities(rayleigh: float, prandtl: float) -> tuple[float, float]:
    """Return (kappa, nu) in units of the height and the free-fall velocity."""
    return (rayleigh * prandtl) ** -0.5, (rayleigh / prandtl) ** -0.5


def initial_buoyancy(grid: MacGrid, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Return (X, Y): a linear profile with a random drop over the height, and noise that vanishes at the walls."""
    drop = rng.choice(INITIAL_DROPS)
    noise = rng.standard_normal((grid.nx, grid.ny))
    buoyancy = (1 - grid.y) * drop + amplitude * grid.y * (1 - grid.y) * noise
    return np.clip(buoyancy, BUOYANCY_ABOVE, BUOYANCY_BELOW)


def buoyancy_tendency(grid: MacGrid, buoyancy: np.ndarray, u: np.ndarray, v: np.ndarray, kappa: float) -> np.ndarray:
    """Return -div(u b - kappa grad b), (b, X, Y), with the wall values imposed through ghost cells."""
    in_x = pad_x(buoyancy, 2, 1)
    steps = in_x[:, 1:] - in_x[:, :-1]
    half = half_slope(steps[:, :-1], steps[:, 1:])  # cells -1 .. X-1
    flux = upwind(u, in_x[:, 1:-2] + half[:, :-1], in_x[:, 2:-1] - half[:, 1:])
    flux -= steps[:, 1:-1] * (kappa / grid.dx)
    tendency = diff_x(flux, -grid.dx)

    below = 2 * BUOYANCY_BELOW - buoyancy[:, :, :1]
    above = 2 * BUOYANCY_ABOVE - buoyancy[:, :, -1:]
    steps = np.diff(buoyancy, axis=2, prepend=below, append=above)
    half = half_slope(steps[:, :, :-1], steps[:, :, 1:])
    flux = -(kappa / grid.dy) * steps
    flux[:, :, 1:-1] += upwind(
        v[:, :, 1:-1], buoyancy[:, :, :-1] + half[:, :, :-1], buoyancy[:, :, 1:] - half[:, :, 1:]
    )
    tendency -= np.diff(flux, axis=2) / grid.dy
    return tendency


def velocity_tendency(
    grid: MacGrid, buoyancy: np.ndarray, u: np.ndarray, v: np.ndarray, nu: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return all of u_t but the pressure gradient, (b, X, Y) and (b, X, Y + 1)."""
    du, dv = momentum_tendency(grid, u, v, nu)
    dv[:, :, 1:-1] += (buoyancy[:, :, 1:] + buoyancy[:, :, :-1]) / 2
    return du, dv


def euler_step(state: Arrays, grid: MacGrid, kappa: float, nu: float, dt: float) -> Arrays:
    """Take one projected forward Euler step of (buoyancy, u, v)."""
    buoyancy, u, v = state
    du, dv = velocity_tendency(grid, buoyancy, u, v, nu)
    projected = grid.project(u + dt * du, v + dt * dv)
    return buoyancy + dt * buoyancy_tendency(grid, buoyancy, u, v, kappa), *projected


def pressure(grid: MacGrid, state: Arrays, nu: float) -> np.ndarray:
    """Return the zero-mean pressure that keeps this very state divergence-free, (b, X, Y)."""
    buoyancy, u, v = state
    return grid.poisson(grid.divergence(*velocity_tendency(grid, buoyancy, u, v, nu)))


def time_step(grid: MacGrid, kappa: float, nu: float, limit: float) -> float:
    """Return the largest step allowed: the preset's limit for advection, and the explicit diffusion limit."""
    return min(limit, 0.2 * min(grid.dx, grid.dy) ** 2 / max(kappa, nu))


def simulate(preset: Preset, parameters: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate one trajectory per generator; see System.simulate."""
    grid = MacGrid(*preset.grid, lx=4.0, ly=1.0)
    kappa, nu = diffusivities(parameters.scalars["Rayleigh"], parameters.scalars["Prandtl"])
    limit, spin_up = time_step(grid, kappa, nu, preset.options["dt"]), preset.options["spin_up"]

    def step(state: Arrays, dt: float) -> Arrays:
        return ssp_rk3(state, partial(euler_step, grid=grid, kappa=kappa, nu=nu, dt=dt))

    buoyancy = np.stack([initial_buoyancy(grid, preset.options["amplitude"], rng) for rng in rngs])
    walls = np.zeros((len(rngs), grid.nx, grid.ny + 1))
    state: Arrays = (buoyancy, np.zeros_like(buoyancy), walls)
    shape = (len(rngs), preset.num_frames, *preset.grid)
    fields = {"buoyancy": np.empty(shape), "pressure": np.empty(shape), "velocity": np.empty((*shape, 2))}
    for frame in range(preset.num_frames):
        state = integrate(state, step, preset.dt if frame else spin_up, limit)
        fields["buoyancy"][:, frame] = state[0]
        fields["pressure"][:, frame] = pressure(grid, state, nu)
        fields["velocity"][:, frame] = grid.to_centers(*state[1:])
    boundaries = (edge("x_periodic", "PERIODIC", "x", grid.nx), edge("y_wall_dirichlet", "WALL", "y", grid.ny))
    return Simulation(spin_up + preset.times, grid.x, grid.y, fields, boundaries)


def _parameters(rayleigh: float, prandtl: float, *trajectories: int) -> ParameterSet:
    label = f"Rayleigh_{rayleigh:.0e}_Prandtl_{prandtl:g}".replace("e+0", "e")
    return ParameterSet(label, {"Rayleigh": rayleigh, "Prandtl": prandtl}, counts(*trajectories))


# Above Ra = 1e6 this grid over-predicts the heat flux by more than a tenth.
SYSTEM = System(
    name="rayleigh_benard",
    tensor_orders={"buoyancy": 0, "pressure": 0, "velocity": 1},
    presets={
        "mini": Preset(
            grid=(128, 32),
            num_frames=41,
            dt=0.75,
            parameter_sets=(_parameters(1e6, 1.0, 5, 1, 4), _parameters(3e5, 0.5, 5, 1, 4)),
            options={"dt": 0.02, "spin_up": 6.0, "amplitude": 0.2},
        ),
        "tiny": Preset(
            grid=(64, 16),
            num_frames=9,
            dt=1.25,
            parameter_sets=(_parameters(3e5, 1.0, 2, 1, 1),),
            options={"dt": 0.04, "spin_up": 5.0, "amplitude": 0.3},
        ),
    },
    simulate=simulate,
    cost=10.0,
)
