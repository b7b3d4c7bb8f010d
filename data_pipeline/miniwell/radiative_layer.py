"""turbulent_radiative_layer_2D: hot dilute gas shearing over cold dense gas, and cooling where the two mix.

    d_t (rho, rho v, E) + div (rho v, rho v v + p, (E + p) v) = (0, 0, -cooling)
    E = p / (gamma - 1) + rho |v|^2 / 2,   gamma = 5/3

Sweeps of euler.py with Strang splitting. Cooling acts at fixed density and switches off in both pure phases, so only
mixed gas radiates. The density contrast is 10, the Well's is 100: its slow mixing would need tens of thousands of
steps. x is periodic, y is open (zero gradient).

Arrays: `conserved` is (4, b, X, Y) with rows density, momentum_x, momentum_y, energy; cells are square.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.miniwell import euler
from data_pipeline.miniwell.system import ParameterSet, Preset, Simulation, System, counts
from data_pipeline.well.layout import edges

GAMMA = 5.0 / 3.0
HOT_TEMPERATURE = 1.0
COLD_TEMPERATURE = 0.1  # pressure and hot density are 1, so the cold density is 10
SHEAR = 0.5  # velocity difference, 0.39 of the hot sound speed
CFL = 0.85
COOLING_WIDTH = 0.17  # of the cooling peak, in ln(T) measured from cold (0) to hot (1)
COOLING_REACH = 0.4  # no cooling further than this from the peak at 1/2


def sweep_x(conserved: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Take a sweep along x, periodic; conserved (4, b, X, Y)."""
    return euler.sweep(conserved.swapaxes(-1, -2), ratio, 1, periodic=True, gamma=GAMMA)[0].swapaxes(-1, -2)


def sweep_y(conserved: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take a sweep along y, open; also return mass and energy lost through both ends, (2, b), per area of a cell."""
    swept, flux = euler.sweep(conserved, ratio, 2, periodic=False, gamma=GAMMA)
    leaving = (flux[[0, 3], ..., -1] - flux[[0, 3], ..., 0]).sum(axis=-1)
    return swept, leaving * ratio[:, 0, 0]


def cooling_rate(temperature: np.ndarray) -> np.ndarray:
    """Return the cooling rate of ln(T) in units of 1/tcool: 1 midway between the phases (in ln T), 0 in both phases."""
    position = np.log(temperature / COLD_TEMPERATURE) / np.log(HOT_TEMPERATURE / COLD_TEMPERATURE)
    floor = np.exp(-((COOLING_REACH / COOLING_WIDTH) ** 2))
    return np.maximum(np.exp(-(((position - 0.5) / COOLING_WIDTH) ** 2)) - floor, 0.0) / (1 - floor)


def cool(conserved: np.ndarray, duration: np.ndarray, tcool: float) -> tuple[np.ndarray, np.ndarray]:
    """Cool every cell at fixed density and velocity for `duration` (b, 1, 1): exact for a frozen rate, taken midway.

    Returns the state and the energy radiated, (b,), per area of a cell.
    """
    density, _, _, pressure = euler.primitive_from_conserved(conserved, GAMMA)
    temperature = pressure / density
    midway = temperature * np.exp(-0.5 * duration / tcool * cooling_rate(temperature))
    kept = np.exp(-duration / tcool * cooling_rate(midway))
    radiated = pressure * (1 - kept) / (GAMMA - 1)
    cooled = conserved.copy()
    cooled[3] -= radiated
    return cooled, radiated.sum(axis=(-1, -2))


def double_step(conserved: np.ndarray, step: np.ndarray, spacing: float, tcool: float) -> tuple[np.ndarray, np.ndarray]:
    """Advance by 2 * step, step (b,): x, y, cooling, y, x, which is symmetric and so second order in time.

    Returns the state and the losses (3, b): mass and energy through the open ends, energy radiated.
    """
    ratio = (step / spacing)[:, None, None]
    conserved, first = sweep_y(sweep_x(conserved, ratio), ratio)
    conserved, radiated = cool(conserved, 2 * step[:, None, None], tcool)
    conserved, second = sweep_y(conserved, ratio)
    losses = np.concatenate([first + second, radiated[None]]) * spacing**2
    return sweep_x(conserved, ratio), losses


def advance(conserved: np.ndarray, duration: float, spacing: float, tcool: float) -> tuple[np.ndarray, np.ndarray]:
    """Advance all trajectories by `duration`, each with its own time steps; returns the state and losses (3, b)."""
    conserved = conserved.copy()
    losses = np.zeros((3, conserved.shape[1]))
    for running, step in euler.double_steps(conserved, duration, spacing, GAMMA, CFL):
        conserved[:, running], lost = double_step(conserved[:, running], step, spacing, tcool)
        losses[:, running] += lost
    return conserved, losses


def initial_state(x: np.ndarray, y: np.ndarray, perturbation: float, rng: np.random.Generator) -> np.ndarray:
    """Return cold dense gas below y = 0, hot gas above, in opposite motion along x; conserved (4, X, Y).

    The interface is stirred by six random modes, each of rms vertical velocity `perturbation` times the shear.
    """
    upper = 0.5 * (1 + np.tanh(y / (0.6 * (x[1] - x[0]))))  # (Y,) 0 in the cold gas, 1 in the hot gas
    cold, hot = 1 / COLD_TEMPERATURE, 1 / HOT_TEMPERATURE
    wavenumbers = 2 * np.pi * np.arange(1, 7)[:, None]
    cosines, sines = perturbation * SHEAR * rng.standard_normal((2, 6, 1))
    wave = np.exp(1j * wavenumbers * x) * (cosines - 1j * sines)  # (6, X)
    # Divergence-free, so that it starts vortices and not sound: v_y = d psi/dx, v_x = -d psi/dy.
    envelope, slope = np.exp(-((y / 0.1) ** 2)), -2 * y / 0.1**2 * np.exp(-((y / 0.1) ** 2))
    velocity_y = wave.real.sum(axis=0)[:, None] * envelope
    velocity_x = SHEAR * (upper - 0.5) - (wave / (1j * wavenumbers)).real.sum(axis=0)[:, None] * slope
    density = np.broadcast_to(cold + (hot - cold) * upper, velocity_x.shape)
    return euler.conserved_from_primitive(np.stack([density, velocity_x, velocity_y, np.ones_like(density)]), GAMMA)


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate trajectories of one cooling time `tcool`; see System.simulate.

    The first `spin_up` frames are not stored: pressure starts uniform and then is all sound from the sudden start.
    """
    num_x, num_y = preset.grid
    spacing = 1.0 / num_x
    x = -0.5 + spacing * (np.arange(num_x) + 0.5)
    y = -1.0 + spacing * (np.arange(num_y) + 0.5)
    tcool, spin_up = parameter_set.scalars["tcool"], round(preset.options["spin_up"])
    conserved = np.stack([initial_state(x, y, preset.options["perturbation"], rng) for rng in rngs], axis=1)
    frames = []
    for frame in range(spin_up + preset.num_frames):
        if frame > 0:
            conserved, _ = advance(conserved, preset.dt, spacing, tcool)
        if frame >= spin_up:
            frames.append(euler.primitive_from_conserved(conserved, GAMMA))
    density, velocity_x, velocity_y, pressure = np.stack(frames, axis=2)  # each (b, T, X, Y)
    return Simulation(
        time=preset.times,
        x=x,
        y=y,
        fields={"density": density, "pressure": pressure, "velocity": np.stack([velocity_x, velocity_y], axis=-1)},
        boundaries=edges((("PERIODIC", "PERIODIC"), ("OPEN", "OPEN")), preset.grid),
    )


def _set(tcool: float, *trajectories: int) -> ParameterSet:
    return ParameterSet(f"tcool_{tcool:.2f}", {"tcool": tcool}, counts(*trajectories))


SYSTEM = System(
    name="turbulent_radiative_layer_2D",
    tensor_orders={"density": 0, "pressure": 0, "velocity": 1},
    presets={
        "mini": Preset(
            (32, 96), 41, 0.3, (_set(0.32, 5, 1, 4), _set(1.0, 5, 1, 4)), {"perturbation": 0.05, "spin_up": 4}
        ),
        # A coarse grid and few frames: start with a larger ripple, or almost nothing happens.
        "tiny": Preset((16, 48), 9, 1.2, (_set(0.32, 2, 1, 1),), {"perturbation": 0.3, "spin_up": 1}),
    },
    simulate=simulate,
    cost=4.0,
)
