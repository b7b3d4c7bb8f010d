"""burgers: the viscous Burgers equation in two dimensions, with a passive tracer, doubly periodic.

    u_t + u . grad u = nu lap u,   s_t + u . grad s = nu lap s

Crests overtake troughs and steepen into fronts of width nu / |jump of u|, which meet, merge and fade; the tracer piles
up gradients where they stand. No dataset of the Well: a ninth system whose channels the eight already have. If u is a
gradient, Cole and Hopf turn it into the heat equation, and the tracer with it: with phi_t = nu lap phi and
psi_t = nu lap psi, u = -2 nu grad phi / phi and s = psi / phi (Cole 1951, Quart. Appl. Math. 9; insert s to check).

A Galerkin method with 2/3 dealiasing and fourth-order exponential time stepping on the unit square.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.miniwell.spectral import Etdrk4, FourierGrid
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

LENGTHS = (1.0, 1.0)
MAX_STEP = 0.01  # at 64 points and |u|, |v| <= 1: k_max (|u| + |v|) dt = 2.6, below RK4's 2.83 on the imaginary axis
LARGEST_MODE = 3  # of the start, along each axis
SPEED = 0.35  # rms of a velocity component at the start
TRACER = 0.5  # rms of the tracer at the start


class Burgers:
    """The equations on one grid; a state is (b, 3, X, Y // 2 + 1): coefficients of u, v and the tracer."""

    def __init__(self, shape: tuple[int, int], viscosity: float) -> None:
        self.grid = FourierGrid(shape, LENGTHS)
        self.ikx, self.iky, self.mask = 1j * self.grid.kx, 1j * self.grid.ky, self.grid.dealias
        self.diffusion = -viscosity * self.grid.k_squared

    def tendency(self, state: np.ndarray) -> np.ndarray:
        """Return -u . grad of all three, not in divergence form: u is compressible, and nothing is conserved."""
        values = self.grid.inverse(np.stack([state, self.ikx * state, self.iky * state]))  # (3, b, 3, X, Y)
        u, v = values[0, :, :1], values[0, :, 1:2]
        return -self.mask * self.grid.forward(u * values[1] + v * values[2])

    def evolve(self, fields: np.ndarray, num_frames: int, dt: float, steps: int) -> np.ndarray:
        """Return u, v, tracer (b, T, 3, X, Y) from (b, 3, X, Y); `steps` time steps between frames."""
        state = self.grid.forward(fields) * self.mask
        stepper = Etdrk4.of(self.diffusion, dt / steps)
        states = snapshots(state, lambda state: stepper.advance(state, self.tendency), num_frames, steps)
        return np.stack([self.grid.inverse(state) for state in states], axis=1)


def start(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return u, v and tracer (3, X, Y): random waves up to LARGEST_MODE along each axis, eddies and divergence."""
    grid = FourierGrid(shape, LENGTHS)
    x, y = grid.points((0.0, 0.0))
    modes = np.arange(-LARGEST_MODE, LARGEST_MODE + 1)
    numbers = modes[:, None] ** 2 + modes[None, :] ** 2
    envelope = np.where(numbers > 0, np.exp(-numbers / 4), 0.0)  # no mean: the box does not drift
    real, imaginary = rng.standard_normal((2, 3, len(modes), len(modes)))
    wave_x, wave_y = (np.exp(2j * np.pi * modes[:, None] * points) for points in (x, y))
    fields = np.einsum("fmn,mx,ny->fxy", envelope * (real + 1j * imaginary), wave_x, wave_y, optimize=True).real
    return fields * (np.array([SPEED, SPEED, TRACER]) / fields.std(axis=(-2, -1)))[:, None, None]


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate trajectories of one viscosity `nu`; see System.simulate."""
    flow = Burgers(preset.grid, parameter_set.scalars["nu"])
    steps = num_steps(preset.dt, MAX_STEP * 64 / preset.grid[0])
    frames = flow.evolve(np.stack([start(rng, preset.grid) for rng in rngs]), preset.num_frames, preset.dt, steps)
    x, y = flow.grid.points((0.0, 0.0))
    return Simulation(
        time=preset.times,
        x=x,
        y=y,
        fields={"tracer": frames[:, :, 2], "velocity": np.moveaxis(frames[:, :, :2], 2, -1)},
        boundaries=edges(PERIODIC, preset.grid),
    )


def _set(nu: float, *trajectories: int) -> ParameterSet:
    return ParameterSet(f"nu_{nu:g}", {"nu": nu}, counts(*trajectories))


SYSTEM = System(
    name="burgers",
    tensor_orders={"tracer": 0, "velocity": 1},
    presets={
        # 16 to train on: how many of them does a model need? (`fm finetune --few-shot`)
        "mini": Preset((64, 64), 28, 0.04, (_set(0.005, 3, 1, 3), _set(0.01, 1, 1, 2), _set(0.007, 12, 0, 3))),
        "tiny": Preset((32, 32), 9, 0.1, (_set(0.01, 1, 1, 1), _set(0.02, 1, 0, 1))),
    },
    simulate=simulate,
    cost=3.0,
)
