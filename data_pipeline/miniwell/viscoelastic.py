"""FENE-P channel flow (The Well's `viscoelastic_instability` at lower Weissenberg number and resolution).

    u_t + u . grad u = -grad p + (beta lap u + (1 - beta) div T) / Re + forcing,   div u = 0,   <u_x> = 1
    C_t + u . grad C = L C + C L^T - T + epsilon lap C,   L_ij = d_j u_i,   T = (f C - I) / Wi,
    f = 1 / (1 - (tr C - 3) / Lmax^2),  tr C = C_xx + C_yy + c_zz,   x in [0, 2 pi) periodic,  y in [-1, 1] no-slip

Velocity: MAC grid, SSP-RK3 with a projection at every stage, the polymer stress frozen over a step. Conformation: a
split step (half source, transport, half source) in which every part keeps C symmetric positive definite by
construction: C <- F C F^T with F = exp(h L); implicit relaxation, solved exactly; limited upwind transport whose face
values are positive definite. At this resolution elasto-inertial turbulence is not sustained: what is stored is the
transient that a strong random disturbance of the laminar flow goes through, polymer sheets and arrowheads included,
after a spin-up in which the conformation, laminar at first, becomes two-dimensional.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
from scipy.optimize import brentq

from data_pipeline.miniwell.mac import (
    Arrays,
    MacGrid,
    Stress,
    diff_x,
    half_slope,
    momentum_tendency,
    pad_x,
    ssp_rk3,
    upwind,
)
from data_pipeline.miniwell.system import ParameterSet, Preset, Simulation, System, counts, integrate
from data_pipeline.well.layout import edge

XX, XY, YY, ZZ = range(4)  # components of a conformation array (4, b, X, Y)
DISTURBANCE_MODES = 4  # in x and in y


@dataclass(frozen=True)
class Fluid:
    """The Well's constant scalars, under its names."""

    Re: float
    Wi: float
    beta: float  # solvent viscosity / total viscosity
    epsilon: float  # diffusivity of the conformation
    Lmax: float  # largest extension of the polymers

    def spring(self, trace: np.ndarray) -> np.ndarray:
        """Return the Peterlin factor f of tr C."""
        return 1 / (1 - (trace - 3) / self.Lmax**2)

    def steady_spring(self, shear: np.ndarray) -> np.ndarray:
        """Return f in steady simple shear, the root of (f - 1) f^2 = 2 (Wi shear)^2 / (Lmax^2 + 3)."""
        # With g^2 = f - 1 it reads g^3 + g = c, whose one real root is a hyperbolic sine.
        c = self.Wi * np.abs(shear) * np.sqrt(2 / (self.Lmax**2 + 3))
        return 1 + (2 / np.sqrt(3) * np.sinh(np.arcsinh(1.5 * np.sqrt(3) * c) / 3)) ** 2

    def steady_conformation(self, shear: np.ndarray) -> np.ndarray:
        """Return the conformation in steady simple shear du/dy = shear, (4, ...)."""
        f = self.steady_spring(shear)
        wi = self.Wi * shear
        return np.stack([(1 + 2 * (wi / f) ** 2) / f, wi / f**2, 1 / f, 1 / f])

    def steady_shear(self, stress: np.ndarray) -> np.ndarray:
        """Return the shear under a total stress, shear (beta + (1 - beta) / f) = stress, by bisection."""
        low, high = np.abs(stress), np.abs(stress) / self.beta
        for _ in range(60):
            middle = (low + high) / 2
            too_low = middle * (self.beta + (1 - self.beta) / self.steady_spring(middle)) < np.abs(stress)
            low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
        return np.copysign(low, stress)


def laminar_flow(grid: MacGrid, fluid: Fluid) -> tuple[np.ndarray, np.ndarray]:
    """Return the parallel steady flow with <u_x> = 1 and its conformation without diffusion: (Y,), (4, Y)."""
    faces = grid.y0 + np.arange(grid.ny + 1) * grid.dy

    def velocity(wall_stress: float) -> np.ndarray:
        shear = fluid.steady_shear(-wall_stress * faces) * grid.dy
        shear[0] /= 2  # from the wall to the first center
        return np.cumsum(shear[:-1])

    wall_stress = brentq(lambda stress: velocity(stress).mean() - 1, 1.0, 6.0, xtol=1e-14)
    u = velocity(wall_stress)
    shear = grid.shear(u[None, None, :])[0, 0]
    return u, fluid.steady_conformation((shear[1:] + shear[:-1]) / 2)


def disturbance(grid: MacGrid, speed: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a divergence-free (u, v), (1, X, Y) and (1, X, Y + 1), of rms speed `speed`, at rest at the walls.

    Modes have independent phases in x: with phases in common the flow would keep a mirror symmetry for ever.
    """
    x = np.arange(grid.nx) * grid.dx
    y = grid.y0 + np.arange(grid.ny + 1) * grid.dy
    psi = np.zeros((grid.nx, grid.ny + 1))
    for k in range(1, DISTURBANCE_MODES + 1):
        for m in range(1, DISTURBANCE_MODES + 1):
            weight, phase_x, phase_y = rng.standard_normal(), *rng.uniform(0, 2 * np.pi, 2)
            psi += weight / (k + m) * np.cos(k * x + phase_x)[:, None] * np.cos(np.pi / 2 * m * y + phase_y)
    psi *= (1 - y**2) ** 2
    u, v = grid.from_streamfunction(psi[None])
    scale = speed / np.sqrt(np.mean(grid.to_centers(u, v) ** 2) * 2)
    return u * scale, v * scale


def stretch_and_relax(conformation: np.ndarray, gradient: Arrays, fluid: Fluid, h: float) -> np.ndarray:
    """Solve C_t = L C + C L^T for a time h at frozen L = (du/dx, du/dy, dv/dx), then C_t = -T implicitly."""
    u_x, u_y, v_x = gradient
    # L has no trace, so L^2 = q I and exp(h L) = cosh(h sqrt(q)) I + sinh(h sqrt(q)) / sqrt(q) L.
    q = (u_x * u_x + u_y * v_x) * h**2
    even = 1 + q * (1 / 2 + q / 24)
    odd = h * (1 + q * (1 / 6 + q / 120))
    f_xx, f_xy, f_yx, f_yy = even + odd * u_x, odd * u_y, odd * v_x, even - odd * u_x
    xx, xy, yy, zz = conformation
    result = np.empty_like(conformation)
    row_xx, row_xy = f_xx * xx + f_xy * xy, f_xx * xy + f_xy * yy
    result[XX] = row_xx * f_xx + row_xy * f_xy
    result[XY] = row_xx * f_yx + row_xy * f_yy
    result[YY] = (f_yx * xx + f_yy * xy) * f_yx + (f_yx * xy + f_yy * yy) * f_yy
    result[ZZ] = zz

    # C' = (C + r I) / (1 + r f(tr C')): the trace solves a quadratic, whose small root lies below Lmax^2 + 3.
    r, limit = h / fluid.Wi, fluid.Lmax**2 + 3
    total = result[XX] + result[YY] + result[ZZ] + 3 * r
    linear = total + (limit + r * fluid.Lmax**2)
    trace = 2 * limit * total / (linear + np.sqrt(linear * linear - 4 * limit * total))
    result[[XX, YY, ZZ]] += r
    result /= 1 + r * fluid.spring(trace)
    return result


def positive_half_slope(conformation: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Return van Leer's half slopes h, (4, b, X, Y), zero where C + h or C - h is not positive definite."""
    half = half_slope(below, above)
    xx, xy, yy, _ = conformation
    h_xx, h_xy, h_yy, _ = half
    # The limiter keeps the diagonal positive, so the sign of det(C +- h) = even +- odd decides.
    even = xx * yy - xy * xy + h_xx * h_yy - h_xy * h_xy
    odd = xx * h_yy + yy * h_xx - 2 * xy * h_xy
    half *= np.abs(odd) < even
    return half


def transport_tendency(
    grid: MacGrid, conformation: np.ndarray, u: np.ndarray, v: np.ndarray, epsilon: float
) -> np.ndarray:
    """Return -div(u C - epsilon grad C), (4, b, X, Y); no flux through the walls."""
    in_x = pad_x(conformation, 2, 1)
    steps = in_x[..., 1:, :] - in_x[..., :-1, :]
    half = positive_half_slope(in_x[..., 1:-1, :], steps[..., :-1, :], steps[..., 1:, :])  # cells -1 .. X-1
    flux = upwind(u, in_x[..., 1:-2, :] + half[..., :-1, :], conformation - half[..., 1:, :])
    flux -= steps[..., 1:-1, :] * (epsilon / grid.dx)
    tendency = diff_x(flux, -grid.dx)

    steps = conformation[..., 1:] - conformation[..., :-1]
    half = np.zeros_like(conformation)
    half[..., 1:-1] = positive_half_slope(conformation[..., 1:-1], steps[..., :-1], steps[..., 1:])
    flux = upwind(v[..., 1:-1], conformation[..., :-1] + half[..., :-1], conformation[..., 1:] - half[..., 1:])
    flux -= steps * (epsilon / grid.dy)
    flux /= grid.dy
    tendency[..., :-1] -= flux
    tendency[..., 1:] += flux
    return tendency


def transport(
    grid: MacGrid, conformation: np.ndarray, u: np.ndarray, v: np.ndarray, epsilon: float, dt: float
) -> np.ndarray:
    """Take one SSP-RK2 (Heun) step; positive definite while the two Courant numbers sum to less than about 1/2."""
    first = conformation + dt * transport_tendency(grid, conformation, u, v, epsilon)
    second = first + dt * transport_tendency(grid, first, u, v, epsilon)
    return (conformation + second) / 2


def polymer_stress(conformation: np.ndarray, fluid: Fluid) -> Stress:
    """Return (1 - beta) T / Re, its xy component averaged to the corners and extrapolated to the walls."""
    f = fluid.spring(conformation[XX] + conformation[YY] + conformation[ZZ])
    scale = (1 - fluid.beta) / (fluid.Re * fluid.Wi)
    in_x = pad_x(f * conformation[XY], 1, 0)
    at_faces = (in_x[:, 1:] + in_x[:, :-1]) * (scale / 2)
    corner = np.empty((*at_faces.shape[:2], at_faces.shape[2] + 1))
    corner[:, :, 1:-1] = (at_faces[:, :, 1:] + at_faces[:, :, :-1]) / 2
    corner[:, :, 0] = 1.5 * at_faces[:, :, 0] - 0.5 * at_faces[:, :, 1]
    corner[:, :, -1] = 1.5 * at_faces[:, :, -1] - 0.5 * at_faces[:, :, -2]
    return Stress(xx=scale * (f * conformation[XX] - 1), xy=corner, yy=scale * (f * conformation[YY] - 1))


def step(grid: MacGrid, fluid: Fluid, state: Arrays, dt: float) -> Arrays:
    """Take one time step of (u, v, conformation)."""
    u, v, conformation = state
    stress = polymer_stress(conformation, fluid)

    def euler(velocity: Arrays) -> Arrays:
        u, v = velocity
        du, dv = momentum_tendency(grid, u, v, fluid.beta / fluid.Re, stress)
        new_u, new_v = grid.project(u + dt * du, v + dt * dv)
        new_u += 1 - new_u.mean(axis=(1, 2), keepdims=True)  # the mean pressure gradient that keeps the flux
        return new_u, new_v

    new_u, new_v = ssp_rk3((u, v), euler)
    conformation = stretch_and_relax(conformation, grid.gradient(u, v), fluid, dt / 2)
    conformation = transport(grid, conformation, (u + new_u) / 2, (v + new_v) / 2, fluid.epsilon, dt)
    conformation = stretch_and_relax(conformation, grid.gradient(new_u, new_v), fluid, dt / 2)
    return new_u, new_v, conformation


def pressure(grid: MacGrid, fluid: Fluid, state: Arrays) -> np.ndarray:
    """Return the zero-mean periodic pressure (over the density) of this very state, (b, X, Y)."""
    u, v, conformation = state
    tendency = momentum_tendency(grid, u, v, fluid.beta / fluid.Re, polymer_stress(conformation, fluid))
    return grid.poisson(grid.divergence(*tendency))


def initial_state(grid: MacGrid, fluid: Fluid, speed: float, rngs: Sequence[np.random.Generator]) -> Arrays:
    """Return laminar flow and conformation, with each trajectory's disturbance added to the velocity."""
    u, conformation = laminar_flow(grid, fluid)
    disturbances = [disturbance(grid, speed, rng) for rng in rngs]
    shape = (4, len(rngs), grid.nx, grid.ny)
    return (
        np.concatenate([u + d[0] for d in disturbances]),
        np.concatenate([d[1] for d in disturbances]),
        np.broadcast_to(conformation[:, None, None, :], shape).copy(),
    )


def simulate(preset: Preset, parameters: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate one trajectory per generator; see System.simulate."""
    grid = MacGrid(*preset.grid, lx=2 * np.pi, ly=2.0, y0=-1.0)
    fluid = Fluid(**{f.name: parameters.scalars[f.name] for f in fields(Fluid)})
    spin_up = preset.options["spin_up"]
    state = initial_state(grid, fluid, preset.options["disturbance"], rngs)
    shape = (len(rngs), preset.num_frames, *preset.grid)
    stored = {
        "pressure": np.empty(shape),
        "c_zz": np.empty(shape),
        "velocity": np.empty((*shape, 2)),
        "C": np.empty((*shape, 2, 2)),
    }
    for frame in range(preset.num_frames):
        state = integrate(state, partial(step, grid, fluid), preset.dt if frame else spin_up, preset.options["dt"])
        u, v, conformation = state
        stored["pressure"][:, frame] = pressure(grid, fluid, state)
        stored["c_zz"][:, frame] = conformation[ZZ]
        stored["velocity"][:, frame] = grid.to_centers(u, v)
        full = np.moveaxis(conformation[[XX, XY, XY, YY]], 0, -1)  # (b, X, Y, 4)
        stored["C"][:, frame] = full.reshape(*full.shape[:3], 2, 2)
    boundaries = (edge("x_periodic", "PERIODIC", "x", grid.nx), edge("y_wall_noslip", "WALL", "y", grid.ny))
    return Simulation(spin_up + preset.times, grid.x, grid.y, stored, boundaries)


def _parameters(re: float, wi: float, epsilon: float, *trajectories: int) -> ParameterSet:
    scalars = {"Re": re, "Wi": wi, "beta": 0.9, "epsilon": epsilon, "Lmax": 70.0}
    return ParameterSet(f"Re_{re:g}_Wi_{wi:g}", scalars, counts(*trajectories))


SYSTEM = System(
    name="viscoelastic_instability",
    tensor_orders={"pressure": 0, "c_zz": 0, "velocity": 1, "C": 2},
    presets={
        "mini": Preset(
            grid=(64, 64),
            num_frames=28,
            dt=0.25,
            parameter_sets=(_parameters(1000.0, 20.0, 1e-3, 5, 1, 4), _parameters(2000.0, 10.0, 1e-3, 3, 1, 4)),
            options={"dt": 0.0125, "spin_up": 1.0, "disturbance": 0.15},
        ),
        "tiny": Preset(
            grid=(32, 32),
            num_frames=9,
            dt=0.25,
            parameter_sets=(_parameters(1000.0, 10.0, 4e-3, 2, 1, 1),),
            options={"dt": 0.03125, "spin_up": 0.75, "disturbance": 0.15},
        ),
    },
    simulate=simulate,
    cost=11.0,
)
