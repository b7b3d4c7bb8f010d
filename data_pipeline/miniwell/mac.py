"""Uniform marker-and-cell (MAC) grid: periodic in x, no-slip walls in y (Harlow & Welch, Phys. Fluids 8, 1965).

Arrays are (b, X, Y) for b trajectories, axis 1 = x, axis 2 = y, float64:
  centers  (b, X, Y)      cell (i, j): pressure, buoyancy, conformation
  u        (b, X, Y)      x-velocity on the face x = i dx, left of cell (i, j)
  v        (b, X, Y + 1)  y-velocity on the face y = y0 + j dy, below cell (i, j); zero on both walls
  corners  (b, X, Y + 1)  points (i dx, y0 + j dy)

Differences are second-order central, so that the discrete divergence of a projected velocity vanishes to rounding, and
van Leer's limiter in the transport of scalars. No operation mixes trajectories: what a trajectory does is independent
of the batch it is in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import fft

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class MacGrid:
    """X x Y cells of size dx x dy on [0, lx) x [y0, y0 + ly]."""

    nx: int
    ny: int
    lx: float
    ly: float
    y0: float = 0.0

    @property
    def dx(self) -> float:
        """Width of a cell."""
        return self.lx / self.nx

    @property
    def dy(self) -> float:
        """Height of a cell."""
        return self.ly / self.ny

    @cached_property
    def x(self) -> np.ndarray:
        """(X,) cell centers."""
        return (np.arange(self.nx) + 0.5) * self.dx

    @cached_property
    def y(self) -> np.ndarray:
        """(Y,) cell centers."""
        return self.y0 + (np.arange(self.ny) + 0.5) * self.dy

    @cached_property
    def _inverse_eigenvalues(self) -> np.ndarray:
        """(X // 2 + 1, Y): 1 / eigenvalue of the five-point Laplacian per (Fourier, cosine) mode, 0 for the mean."""
        kx = 2 * np.pi * np.arange(self.nx // 2 + 1) / self.nx
        ky = np.pi * np.arange(self.ny) / self.ny
        eigenvalues = -((2 - 2 * np.cos(kx)) / self.dx**2)[:, None] - ((2 - 2 * np.cos(ky)) / self.dy**2)[None, :]
        eigenvalues[0, 0] = np.inf
        return 1 / eigenvalues

    def poisson(self, source: np.ndarray) -> np.ndarray:
        """Return the zero-mean p of laplacian(p) = source - mean(source), no normal derivative at the walls; (b, X, Y).

        Exact for the five-point Laplacian: Fourier modes in x, cosine modes (DCT-II) in y diagonalize it.
        """
        modes = fft.rfft(fft.dct(source, type=2, axis=2), axis=1)
        modes *= self._inverse_eigenvalues
        return fft.idct(fft.irfft(modes, n=self.nx, axis=1), type=2, axis=2)

    def divergence(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the divergence at the centers, (b, X, Y)."""
        return diff_x(u, self.dx) + np.diff(v, axis=2) / self.dy

    def project(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the divergence-free part of (u, v); the means of u and the wall values of v stay as they are."""
        potential = self.poisson(self.divergence(u, v))
        u = u - diff_x(pad_x(potential, 1, 0), self.dx, padded=True)
        v = v.copy()
        v[:, :, 1:-1] -= np.diff(potential, axis=2) / self.dy
        return u, v

    def from_streamfunction(self, psi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (d psi/dy, -d psi/dx), without divergence, from psi at the corners, constant along each wall."""
        return np.diff(psi, axis=2) / self.dy, -diff_x(psi, self.dx)

    def to_centers(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the velocity averaged from the faces to the centers, (b, X, Y, 2)."""
        wrapped = pad_x(u, 0, 1)
        return np.stack([(wrapped[:, 1:] + wrapped[:, :-1]) / 2, (v[:, :, 1:] + v[:, :, :-1]) / 2], axis=-1)

    def shear(self, u: np.ndarray) -> np.ndarray:
        """Return du/dy at the corners, (b, X, Y + 1), from u on the faces; no-slip by odd ghost values."""
        shear = np.empty((*u.shape[:2], self.ny + 1))
        np.subtract(u[:, :, 1:], u[:, :, :-1], out=shear[:, :, 1:-1])
        shear[:, :, 0] = 2 * u[:, :, 0]
        shear[:, :, -1] = -2 * u[:, :, -1]
        shear /= self.dy
        return shear

    def gradient(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (du/dx, du/dy, dv/dx) at the centers, each (b, X, Y); dv/dy = -du/dx for a projected velocity."""
        corner = pad_x(self.shear(u), 0, 1)
        du_dy = (corner[:, 1:, 1:] + corner[:, 1:, :-1] + corner[:, :-1, 1:] + corner[:, :-1, :-1]) / 4
        center_v = pad_x(v[:, :, 1:] + v[:, :, :-1], 1, 1)
        return diff_x(u, self.dx), du_dy, (center_v[:, 2:] - center_v[:, :-2]) / (4 * self.dx)


@dataclass(frozen=True)
class Stress:
    """A symmetric stress that is added to the viscous one."""

    xx: np.ndarray  # (b, X, Y) at the centers
    xy: np.ndarray  # (b, X, Y + 1) at the corners
    yy: np.ndarray  # (b, X, Y) at the centers


def pad_x(field: np.ndarray, before: int, after: int) -> np.ndarray:
    """Pad periodically along x: (..., X, Y) -> (..., before + X + after, Y)."""
    nx = field.shape[-2]
    padded = np.empty((*field.shape[:-2], before + nx + after, field.shape[-1]))
    padded[..., before : before + nx, :] = field
    padded[..., :before, :] = field[..., nx - before :, :]
    padded[..., before + nx :, :] = field[..., :after, :]
    return padded


def diff_x(field: np.ndarray, dx: float, padded: bool = False) -> np.ndarray:
    """Return the forward difference along x over dx, periodic unless the field comes with its own padding."""
    if not padded:
        field = pad_x(field, 0, 1)
    difference = field[..., 1:, :] - field[..., :-1, :]
    difference /= dx
    return difference


def momentum_tendency(
    grid: MacGrid, u: np.ndarray, v: np.ndarray, viscosity: float, stress: Stress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return -div(u u) + viscosity lap u + div(stress), without the pressure; (b, X, Y), (b, X, Y + 1).

    The product of averages in the advective flux conserves kinetic energy (Harlow & Welch).
    """
    u_wrapped, v_wrapped = pad_x(u, 1, 1), pad_x(v, 1, 1)
    # Momentum fluxes: xx in the cells -1 .. X-1, xy at the corners 0 .. X, yy in the cells 0 .. X-1.
    flux_xx = (u_wrapped[:, :-1] + u_wrapped[:, 1:]) / 2
    flux_xx *= flux_xx
    flux_xx -= (u_wrapped[:, 1:] - u_wrapped[:, :-1]) * (viscosity / grid.dx)

    v_corner = (v_wrapped[:, :-1] + v_wrapped[:, 1:]) / 2  # zero at the walls
    u_faces = u_wrapped[:, 1:]
    product = v_corner
    product[:, :, 1:-1] *= (u_faces[:, :, :-1] + u_faces[:, :, 1:]) / 2
    flux_ux_y = product - viscosity * grid.shear(u_faces)
    flux_vy_x = product - (v_wrapped[:, 1:] - v_wrapped[:, :-1]) * (viscosity / grid.dx)

    flux_yy = (v[:, :, :-1] + v[:, :, 1:]) / 2
    flux_yy *= flux_yy
    flux_yy -= np.diff(v, axis=2) * (viscosity / grid.dy)
    if stress is not None:
        corner = pad_x(stress.xy, 0, 1)
        flux_xx -= pad_x(stress.xx, 1, 0)
        flux_ux_y -= corner
        flux_vy_x -= corner
        flux_yy -= stress.yy

    du = diff_x(flux_xx, -grid.dx, padded=True)
    du -= np.diff(flux_ux_y[:, :-1], axis=2) / grid.dy
    dv = np.zeros_like(v)
    dv[:, :, 1:-1] = diff_x(flux_vy_x[:, :, 1:-1], -grid.dx, padded=True)
    dv[:, :, 1:-1] -= np.diff(flux_yy, axis=2) / grid.dy
    return du, dv


def half_slope(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Return half of van Leer's harmonic slope from the two differences; zero at extrema (JCP 14, 1974)."""
    product = below * above
    np.maximum(product, 0, out=product)
    product /= below + above + 1e-300  # the product is zero wherever the sum can be
    return product


def upwind(velocity: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the flux through faces: velocity times the face value on the upstream side. All have one shape."""
    flux = left + right
    flux *= velocity
    right = right - left
    right *= np.abs(velocity)
    flux -= right
    flux *= 0.5
    return flux


def ssp_rk3(state: Arrays, euler: Callable[[Arrays], Arrays]) -> Arrays:
    """Take one step of the third-order strong-stability-preserving Runge-Kutta scheme (Shu & Osher, JCP 77, 1988).

    `euler` advances a state by one forward Euler step, projection included: each stage is divergence-free.
    """
    first = euler(state)
    second = tuple(0.75 * a + 0.25 * b for a, b in zip(state, euler(first), strict=True))
    return tuple(a / 3 + b * (2 / 3) for a, b in zip(state, euler(second), strict=True))
