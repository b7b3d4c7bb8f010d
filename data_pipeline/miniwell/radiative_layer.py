"""turbulent_radiative_layer_2D: hot dilute gas shearing over cold dense gas, and cooling where the two mix.

    d_t (rho, rho v, E) + div (rho v, rho v v + p, (E + p) v) = (0, 0, -cooling)
    E = p / (gamma - 1) + rho |v|^2 / 2,   gamma = 5/3

MUSCL-Hancock on primitive variables with van Leer's harmonic slopes and the HLLC Riemann solver (Toro, "Riemann Solvers
and Numerical Methods for Fluid Dynamics", sections 10.4 and 14.4), one dimension at a time, with Strang splitting.
Cooling acts at fixed density and switches off in both pure phases, so only mixed gas radiates. The density contrast is
10, the Well's is 100: its slow mixing would need tens of thousands of steps. x is periodic, y is open (zero gradient).

Arrays: `conserved` is (4, b, X, Y) with rows density, momentum_x, momentum_y, energy; cells are square.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.miniwell.system import ParameterSet, Preset, Simulation, System, edge

GAMMA = 5.0 / 3.0
HOT_TEMPERATURE = 1.0
COLD_TEMPERATURE = 0.1  # pressure and hot density are 1, so the cold density is 10
SHEAR = 0.5  # velocity difference, 0.39 of the hot sound speed
CFL = 0.85
COOLING_WIDTH = 0.17  # of the cooling peak, in ln(T) measured from cold (0) to hot (1)
COOLING_REACH = 0.4  # no cooling further than this from the peak at 1/2


def conserved_from_primitive(primitive: np.ndarray) -> np.ndarray:
    """Density, velocity, pressure -> density, momentum, energy; both (4, ...)."""
    density, velocity_x, velocity_y, pressure = primitive
    energy = pressure / (GAMMA - 1) + 0.5 * density * (velocity_x**2 + velocity_y**2)
    return np.stack([density, density * velocity_x, density * velocity_y, energy])


def primitive_from_conserved(conserved: np.ndarray) -> np.ndarray:
    """Density, momentum, energy -> density, velocity, pressure; both (4, ...)."""
    density, momentum_x, momentum_y, energy = conserved
    velocity_x, velocity_y = momentum_x / density, momentum_y / density
    pressure = (GAMMA - 1) * (energy - 0.5 * (momentum_x * velocity_x + momentum_y * velocity_y))
    return np.stack([density, velocity_x, velocity_y, pressure])


def hllc_flux(left: np.ndarray, right: np.ndarray, normal: int) -> np.ndarray:
    """Flux through faces between primitive states `left` and `right`, (4, ...); row `normal` is the normal velocity.

    HLLC with Davis's wave speeds (Toro, sections 10.4 and 10.5).
    """
    rho_l, u_l, p_l = left[0], left[normal], left[3]
    rho_r, u_r, p_r = right[0], right[normal], right[3]
    sound_l, sound_r = np.sqrt(GAMMA * p_l / rho_l), np.sqrt(GAMMA * p_r / rho_r)
    slowest = np.minimum(u_l - sound_l, u_r - sound_r)
    fastest = np.maximum(u_l + sound_l, u_r + sound_r)
    mass_l, mass_r = rho_l * (slowest - u_l), rho_r * (fastest - u_r)
    contact = (p_r - p_l + mass_l * u_l - mass_r * u_r) / (mass_l - mass_r)

    # Between the outer wave S and the contact the flux is F + S (U* - U); beyond the outer wave it is F.
    from_left = contact >= 0
    state = np.where(from_left, left, right)
    rho, u, v, p = state[0], state[normal], state[3 - normal], state[3]
    signal = np.where(from_left, slowest, fastest)
    reached = np.where(from_left, np.minimum(slowest, 0.0), np.maximum(fastest, 0.0))
    outrun = signal - u
    rho_star = rho * outrun / (signal - contact)
    energy = p / (GAMMA - 1) + 0.5 * rho * (u * u + v * v)
    energy_star = rho_star * (energy / rho + (contact - u) * (contact + p / (rho * outrun)))
    mass_flux = rho * u + reached * (rho_star - rho)
    flux = np.empty_like(state)
    flux[0] = mass_flux
    flux[normal] = rho * u * u + p + reached * (rho_star * contact - rho * u)
    flux[3 - normal] = mass_flux * v
    flux[3] = (energy + p) * u + reached * (energy_star - energy)
    return flux


def _harmonic_slopes(padded: np.ndarray) -> np.ndarray:
    """Van Leer's limited difference 2 a b / (a + b) of each cell but the outermost two, along the last axis."""
    steps = np.diff(padded, axis=-1)
    before, after = steps[..., :-1], steps[..., 1:]
    product = before * after
    np.maximum(product, 0.0, out=product)  # 0 where the differences disagree
    total = before + after
    product *= 2 * total
    total *= total
    total += np.finfo(float).tiny  # 0 / tiny where both are 0
    product /= total
    return product


def sweep(conserved: np.ndarray, ratio: np.ndarray, normal: int, periodic: bool) -> tuple[np.ndarray, np.ndarray]:
    """One MUSCL-Hancock step along the last axis.

    conserved (4, b, M, N), row `normal` the momentum along the last axis; ratio (b, 1, 1) = time step / spacing.
    Returns the state after the step and the fluxes through the N + 1 faces (4, b, M, N + 1).
    """
    primitive = primitive_from_conserved(conserved)
    ghosts = ([-2, -1], [0, 1]) if periodic else ([0, 0], [-1, -1])
    padded = np.concatenate([primitive[..., ghosts[0]], primitive, primitive[..., ghosts[1]]], axis=-1)
    slopes = _harmonic_slopes(padded)
    centre = padded[..., 1:-1]
    density, velocity, pressure = centre[0], centre[normal], centre[3]
    change = velocity * slopes
    change[0] += density * slopes[normal]
    change[normal] += slopes[3] / density
    change[3] += GAMMA * pressure * slopes[normal]
    change *= 0.5 * ratio
    midway = np.subtract(centre, change, out=change)
    slopes *= 0.5
    flux = hllc_flux((midway + slopes)[..., :-1], (midway - slopes)[..., 1:], normal)
    return conserved - ratio * np.diff(flux, axis=-1), flux


def sweep_x(conserved: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """`sweep` along x, periodic; conserved (4, b, X, Y)."""
    return sweep(conserved.swapaxes(-1, -2), ratio, normal=1, periodic=True)[0].swapaxes(-1, -2)


def sweep_y(conserved: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`sweep` along y, open; also returns mass and energy that left through both ends, (2, b), per area of a cell."""
    swept, flux = sweep(conserved, ratio, normal=2, periodic=False)
    leaving = (flux[[0, 3], ..., -1] - flux[[0, 3], ..., 0]).sum(axis=-1)
    return swept, leaving * ratio[:, 0, 0]


def cooling_rate(temperature: np.ndarray) -> np.ndarray:
    """Cooling rate of ln(T) in units of 1/tcool: 1 midway between the phases (in ln T), 0 in both phases."""
    position = np.log(temperature / COLD_TEMPERATURE) / np.log(HOT_TEMPERATURE / COLD_TEMPERATURE)
    floor = np.exp(-((COOLING_REACH / COOLING_WIDTH) ** 2))
    return np.maximum(np.exp(-(((position - 0.5) / COOLING_WIDTH) ** 2)) - floor, 0.0) / (1 - floor)


def cool(conserved: np.ndarray, duration: np.ndarray, tcool: float) -> tuple[np.ndarray, np.ndarray]:
    """Cool every cell at fixed density and velocity for `duration` (b, 1, 1): exact for a frozen rate, taken midway.

    Returns the state and the energy radiated, (b,), per area of a cell.
    """
    density, _, _, pressure = primitive_from_conserved(conserved)
    temperature = pressure / density
    midway = temperature * np.exp(-0.5 * duration / tcool * cooling_rate(temperature))
    kept = np.exp(-duration / tcool * cooling_rate(midway))
    radiated = pressure * (1 - kept) / (GAMMA - 1)
    cooled = conserved.copy()
    cooled[3] -= radiated
    return cooled, radiated.sum(axis=(-1, -2))


def stable_step(conserved: np.ndarray, spacing: float) -> np.ndarray:
    """Time step of each trajectory at Courant number CFL, (b,); raises FloatingPointError if the gas broke down."""
    density, velocity_x, velocity_y, pressure = primitive_from_conserved(conserved)
    if not (density.min() > 0 and pressure.min() > 0):  # also catches NaN
        raise FloatingPointError(f"radiative layer: density {density.min():.3g}, pressure {pressure.min():.3g}")
    fastest = np.maximum(np.abs(velocity_x), np.abs(velocity_y)) + np.sqrt(GAMMA * pressure / density)
    return CFL * spacing / fastest.max(axis=(-1, -2))


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
    """Advance all trajectories by `duration`, each with its own time steps; returns the state and losses (3, b).

    A trajectory leaves the loop when it arrives, so its steps do not depend on the others.
    """
    conserved = conserved.copy()
    losses = np.zeros((3, conserved.shape[1]))
    remaining = np.full(conserved.shape[1], duration)
    running = np.arange(conserved.shape[1])
    while running.size:
        state = conserved[:, running]
        num_steps = np.ceil(remaining[running] / (2 * stable_step(state, spacing)))
        step = remaining[running] / (2 * num_steps)
        conserved[:, running], lost = double_step(state, step, spacing, tcool)
        losses[:, running] += lost
        remaining[running] -= 2 * step
        running = running[num_steps > 1]
    return conserved, losses


def initial_state(x: np.ndarray, y: np.ndarray, perturbation: float, rng: np.random.Generator) -> np.ndarray:
    """Cold dense gas below y = 0, hot gas above, opposite motion along x; conserved (4, X, Y).

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
    return conserved_from_primitive(np.stack([density, velocity_x, velocity_y, np.ones_like(density)]))


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Trajectories of one cooling time `tcool`; see System.simulate.

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
            frames.append(primitive_from_conserved(conserved))
    density, velocity_x, velocity_y, pressure = np.stack(frames, axis=2)  # each (b, T, X, Y)
    return Simulation(
        time=preset.dt * np.arange(preset.num_frames),
        x=x,
        y=y,
        fields={"density": density, "pressure": pressure, "velocity": np.stack([velocity_x, velocity_y], axis=-1)},
        boundaries=(edge("x_periodic", "PERIODIC", "x", num_x), edge("y_open", "OPEN", "y", num_y)),
    )


def _set(tcool: float, train: int, valid: int, test: int) -> ParameterSet:
    return ParameterSet(f"tcool_{tcool:.2f}", {"tcool": tcool}, {"train": train, "valid": valid, "test": test})


SYSTEM = System(
    name="turbulent_radiative_layer_2D",
    tensor_orders={"density": 0, "pressure": 0, "velocity": 1},
    presets={
        "mini": Preset(
            (32, 96), 41, 0.3, (_set(0.32, 3, 1, 1), _set(1.0, 3, 0, 1)), {"perturbation": 0.05, "spin_up": 4}
        ),
        # A coarse grid and few frames: start with a larger ripple, or almost nothing happens.
        "tiny": Preset((16, 48), 9, 1.2, (_set(0.32, 2, 1, 1),), {"perturbation": 0.3, "spin_up": 1}),
    },
    simulate=simulate,
    cost=4.0,
)
