"""shear_flow: layers of fluid that slide past each other and roll up, with a passive tracer, doubly periodic.

    u_t + u . grad u = -grad p + nu lap u,   div u = 0,   s_t + u . grad s = D lap s,   nu = 1 / Re,   D = nu / Sc

Solved as vorticity w = v_x - u_y and stream function psi (u = psi_y, v = -psi_x, lap psi = -w): a Galerkin method with
2/3 dealiasing, exact diffusion (integrating factor) and classical RK4. x in [0, 1), y in [-1, 1). The Well calls the
Reynolds number `Rayleigh`, and so do the files.
"""

from collections.abc import Callable, Sequence

import numpy as np

from data_pipeline.miniwell.spectral import FourierGrid
from data_pipeline.miniwell.system import (
    PERIODIC,
    ParameterSet,
    Preset,
    Simulation,
    System,
    counts,
    num_steps,
    snapshots,
)
from data_pipeline.well.layout import edges

LENGTHS = (1.0, 2.0)
MAX_STEP = 0.02  # at 64 points along x and |u| <= 0.9: k_max |u| dt = 2.4, below RK4's 2.83 on the imaginary axis


class ShearFlow:
    """The equations on one grid; a state is (b, 2, X, Y // 2 + 1): vorticity and tracer coefficients."""

    def __init__(self, shape: tuple[int, int], reynolds: float, schmidt: float) -> None:
        self.grid = FourierGrid(shape, LENGTHS)
        self.kx, self.ky, self.mask = self.grid.kx, self.grid.ky, self.grid.dealias
        self.inverse_k_squared = self.grid.inverse_k_squared
        viscosity = 1 / reynolds
        self.diffusion = np.array([viscosity, viscosity / schmidt])[:, None, None] * self.grid.k_squared

    def state(self, velocity: np.ndarray, tracer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return state and mean velocity (b, 2, 1, 1) from velocity (b, 2, X, Y), without divergence, and tracer.

        The mean velocity is not in the vorticity; it is conserved, so it is carried beside the state.
        """
        u, v = np.moveaxis(self.grid.forward(velocity), 1, 0)
        vorticity = 1j * (self.kx * v - self.ky * u)
        coefficients = np.stack([vorticity, self.grid.forward(tracer)], axis=1) * self.mask
        return coefficients, velocity.mean(axis=(-2, -1), keepdims=True)

    def velocity_and_tracer(self, state: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return u, v and s on the grid, (b, 3, X, Y)."""
        psi = state[:, 0] * self.inverse_k_squared
        fields = self.grid.inverse(np.stack([1j * self.ky * psi, -1j * self.kx * psi, state[:, 1]], axis=1))
        fields[:, :2] += mean
        return fields

    def tendency(self, state: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return -u . grad of vorticity and tracer: w_t = (d_yy - d_xx) uv + d_xy (u^2 - v^2) and s_t = -div(u s)."""
        u, v, s = np.moveaxis(self.velocity_and_tracer(state, mean), 1, 0)
        products = np.stack([u * v, v * v - u * u, u * s, v * s], axis=1)
        uv, difference, us, vs = np.moveaxis(self.grid.forward(products), 1, 0)
        kx, ky = self.kx, self.ky
        vorticity = (kx**2 - ky**2) * uv + kx * ky * difference
        return self.mask * np.stack([vorticity, -1j * (kx * us + ky * vs)], axis=1)

    def stepper(self, step: float, mean: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Return one RK4 step in the variable exp(diffusion t) y, in which diffusion is exact."""
        half = np.exp(-self.diffusion * step / 2)
        full = half * half

        def advance(state: np.ndarray) -> np.ndarray:
            k1 = self.tendency(state, mean)
            k2 = self.tendency(half * (state + step / 2 * k1), mean)
            k3 = self.tendency(half * state + step / 2 * k2, mean)
            k4 = self.tendency(full * state + step * half * k3, mean)
            return full * (state + step / 6 * k1) + step / 3 * half * (k2 + k3) + step / 6 * k4

        return advance

    def pressure(self, velocity: np.ndarray) -> np.ndarray:
        """Return the pressure (b, X, Y) of a velocity (b, 2, X, Y): lap p = -d_i d_j (u_i u_j), zero mean."""
        u, v = np.moveaxis(velocity, 1, 0)
        uu, uv, vv = np.moveaxis(self.grid.forward(np.stack([u * u, u * v, v * v], axis=1)), 1, 0)
        source = self.kx**2 * uu + 2 * self.kx * self.ky * uv + self.ky**2 * vv
        return self.grid.inverse(-source * self.mask * self.inverse_k_squared)

    def evolve(self, velocity: np.ndarray, tracer: np.ndarray, num_frames: int, dt: float, steps: int) -> np.ndarray:
        """Return u, v, tracer, pressure (b, T, 4, X, Y); `steps` time steps between frames."""
        state, mean = self.state(velocity, tracer)
        advance = self.stepper(dt / steps, mean)
        frames = []
        for frame in snapshots(state, advance, num_frames, steps):
            fields = self.velocity_and_tracer(frame, mean)
            frames.append(np.concatenate([fields, self.pressure(fields[:, :2])[:, None]], axis=1))
        return np.stack(frames, axis=1)


def start(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return the velocity (2, X, Y): 2 or 4 layers +-0.5 with tanh joins, each with a divergence-free disturbance.

    The joins are wider than the Well's: thinner ones are under-resolved, and n waves along x grow only while
    2 pi n width < 1 or so (Kelvin-Helmholtz). Each join has its own phases: the layers would stay alike for ever.
    """
    grid = FourierGrid(shape, LENGTHS)
    x, y = grid.points((0.0, -1.0))
    num_layers, waves = int(rng.choice([2, 4])), int(rng.integers(1, 4))
    width = rng.uniform(0.035, 0.06) * 64 / shape[0]
    joins = -1 + (np.arange(num_layers) + 0.5) * 2 / num_layers
    distances = (y[:, None] - joins + 1) % 2 - 1  # (Y, joins), signed, periodic
    nearest = np.abs(distances).argmin(axis=1)
    signed = distances[np.arange(len(y)), nearest]
    layers = 0.5 * np.where(nearest % 2, -1.0, 1.0) * np.tanh(signed / width)
    numbers = np.arange(1, 5)
    amplitudes = 0.05 * np.where(numbers == waves, 1.0, 0.3) / (2 * np.pi * numbers)
    phases = rng.uniform(0, 2 * np.pi, size=(num_layers, len(numbers), 1))
    ripples = np.einsum("m,jmx->jx", amplitudes, np.cos(2 * np.pi * numbers[:, None] * x + phases))
    envelopes = np.exp(-((distances.T / (3 * width)) ** 2))
    psi = grid.forward((ripples[:, :, None] * envelopes[:, None, :]).sum(axis=0))
    u, v = grid.inverse(np.stack([1j * grid.ky * psi, -1j * grid.kx * psi]) * grid.dealias)
    return np.stack([layers + u, v])


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate layers whose tracer starts as u, as in the Well; see System.simulate."""
    flow = ShearFlow(preset.grid, parameter_set.scalars["Rayleigh"], parameter_set.scalars["Schmidt"])
    velocity = np.stack([start(rng, preset.grid) for rng in rngs])
    steps = num_steps(preset.dt, MAX_STEP * 64 / preset.grid[0])
    frames = flow.evolve(velocity, velocity[:, 0], preset.num_frames, preset.dt, steps)
    x, y = flow.grid.points((0.0, -1.0))
    return Simulation(
        time=preset.times,
        x=x,
        y=y,
        fields={
            "tracer": frames[:, :, 2],
            "pressure": frames[:, :, 3],
            "velocity": np.moveaxis(frames[:, :, :2], 2, -1),
        },
        boundaries=edges(PERIODIC, preset.grid),
    )


def _set(reynolds: float, schmidt: float, *trajectories: int) -> ParameterSet:
    label, scalars = f"Reynolds_{reynolds:g}_Schmidt_{schmidt:g}", {"Rayleigh": reynolds, "Schmidt": schmidt}
    return ParameterSet(label, scalars, counts(*trajectories))


SYSTEM = System(
    name="shear_flow",
    tensor_orders={"tracer": 0, "pressure": 0, "velocity": 1},
    presets={
        "mini": Preset(
            grid=(64, 128),
            num_frames=28,
            dt=0.3,
            parameter_sets=(_set(2000.0, 1.0, 5, 1, 4), _set(1000.0, 0.5, 4, 1, 4)),
        ),
        "tiny": Preset(
            grid=(32, 64),
            num_frames=9,
            dt=0.4,
            parameter_sets=(_set(1000.0, 1.0, 1, 1, 1), _set(500.0, 0.5, 1, 0, 1)),
        ),
    },
    simulate=simulate,
    cost=6.0,
)
