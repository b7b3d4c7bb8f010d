"""The Euler equations of a compressible gas on square cells, for the systems that are made of one.

    d_t (rho, rho v, E) + div (rho v, rho v v + p, (E + p) v) = 0,   E = p / (gamma - 1) + rho |v|^2 / 2

MUSCL-Hancock on primitive variables with van Leer's harmonic slopes and the HLLC Riemann solver (Toro, "Riemann Solvers
and Numerical Methods for Fluid Dynamics", sections 10.4 and 14.4), one dimension at a time: a system puts its steps
together from sweeps.

Arrays: `conserved` is (4, b, X, Y) with rows density, momentum_x, momentum_y, energy; `gamma` is the ratio of specific
heats.
"""

from collections.abc import Iterator

import numpy as np


def conserved_from_primitive(primitive: np.ndarray, gamma: float) -> np.ndarray:
    """Return density, momentum, energy from density, velocity, pressure; both (4, ...)."""
    density, velocity_x, velocity_y, pressure = primitive
    energy = pressure / (gamma - 1) + 0.5 * density * (velocity_x**2 + velocity_y**2)
    return np.stack([density, density * velocity_x, density * velocity_y, energy])


def primitive_from_conserved(conserved: np.ndarray, gamma: float) -> np.ndarray:
    """Return density, velocity, pressure from density, momentum, energy; both (4, ...)."""
    density, momentum_x, momentum_y, energy = conserved
    velocity_x, velocity_y = momentum_x / density, momentum_y / density
    pressure = (gamma - 1) * (energy - 0.5 * (momentum_x * velocity_x + momentum_y * velocity_y))
    return np.stack([density, velocity_x, velocity_y, pressure])


def hllc_flux(left: np.ndarray, right: np.ndarray, normal: int, gamma: float) -> np.ndarray:
    """Return the flux through faces between primitive states, (4, ...); row `normal` is the normal velocity.

    HLLC with Davis's wave speeds (Toro, sections 10.4 and 10.5).
    """
    rho_l, u_l, p_l = left[0], left[normal], left[3]
    rho_r, u_r, p_r = right[0], right[normal], right[3]
    sound_l, sound_r = np.sqrt(gamma * p_l / rho_l), np.sqrt(gamma * p_r / rho_r)
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
    energy = p / (gamma - 1) + 0.5 * rho * (u * u + v * v)
    energy_star = rho_star * (energy / rho + (contact - u) * (contact + p / (rho * outrun)))
    mass_flux = rho * u + reached * (rho_star - rho)
    flux = np.empty_like(state)
    flux[0] = mass_flux
    flux[normal] = rho * u * u + p + reached * (rho_star * contact - rho * u)
    flux[3 - normal] = mass_flux * v
    flux[3] = (energy + p) * u + reached * (energy_star - energy)
    return flux


def _harmonic_slopes(padded: np.ndarray) -> np.ndarray:
    """Return van Leer's limited difference 2 a b / (a + b) of each cell but the outermost two, along the last axis."""
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


def sweep(
    conserved: np.ndarray, ratio: np.ndarray, normal: int, periodic: bool, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Take one MUSCL-Hancock step along the last axis.

    conserved (4, b, M, N), row `normal` the momentum along the last axis; ratio (b, 1, 1) = time step / spacing.
    Returns the state after the step and the fluxes through the N + 1 faces (4, b, M, N + 1).
    """
    primitive = primitive_from_conserved(conserved, gamma)
    ghosts = ([-2, -1], [0, 1]) if periodic else ([0, 0], [-1, -1])
    padded = np.concatenate([primitive[..., ghosts[0]], primitive, primitive[..., ghosts[1]]], axis=-1)
    slopes = _harmonic_slopes(padded)
    center = padded[..., 1:-1]
    density, velocity, pressure = center[0], center[normal], center[3]
    change = velocity * slopes
    change[0] += density * slopes[normal]
    change[normal] += slopes[3] / density
    change[3] += gamma * pressure * slopes[normal]
    change *= 0.5 * ratio
    midway = np.subtract(center, change, out=change)
    slopes *= 0.5
    flux = hllc_flux((midway + slopes)[..., :-1], (midway - slopes)[..., 1:], normal, gamma)
    return conserved - ratio * np.diff(flux, axis=-1), flux


def stable_step(conserved: np.ndarray, spacing: float, gamma: float, courant: float) -> np.ndarray:
    """Return each trajectory's time step at a Courant number, (b,); raise FloatingPointError if the gas broke down."""
    density, velocity_x, velocity_y, pressure = primitive_from_conserved(conserved, gamma)
    if not (density.min() > 0 and pressure.min() > 0):  # also catches NaN
        raise FloatingPointError(f"the gas broke down: density {density.min():.3g}, pressure {pressure.min():.3g}")
    fastest = np.maximum(np.abs(velocity_x), np.abs(velocity_y)) + np.sqrt(gamma * pressure / density)
    return courant * spacing / fastest.max(axis=(-1, -2))


def double_steps(
    conserved: np.ndarray, duration: float, spacing: float, gamma: float, courant: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield time steps over `duration`, each trajectory with its own: (running, step), both (n,), until all arrived.

    The caller replaces conserved[:, running] by the state 2 * step later before it takes the next pair; step is at most
    the stable one. A trajectory leaves the loop when it arrives, so its steps do not depend on the others.
    """
    remaining = np.full(conserved.shape[1], duration)
    running = np.arange(conserved.shape[1])
    while running.size:
        num_steps = np.ceil(remaining[running] / (2 * stable_step(conserved[:, running], spacing, gamma, courant)))
        step = remaining[running] / (2 * num_steps)
        yield running, step
        remaining[running] -= 2 * step
        running = running[num_steps > 1]
