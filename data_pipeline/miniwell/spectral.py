"""Fourier tools for periodic rectangles: wavenumbers, the 2/3 rule, batched transforms, exponential time stepping.

Fields are (..., X, Y) arrays, coefficients their real-input transforms (..., X, Y // 2 + 1) over the last two axes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import fft


@dataclass(frozen=True)
class FourierGrid:
    """A periodic rectangle of `shape` points and side `lengths`; both axes need an even number of points."""

    shape: tuple[int, int]  # (X, Y)
    lengths: tuple[float, float]

    @property
    def kx(self) -> np.ndarray:
        """Angular wavenumbers along x, (X, 1)."""
        return 2 * np.pi / self.lengths[0] * np.fft.fftfreq(self.shape[0], 1 / self.shape[0])[:, None]

    @property
    def ky(self) -> np.ndarray:
        """Angular wavenumbers along y, (1, Y // 2 + 1)."""
        return 2 * np.pi / self.lengths[1] * np.arange(self.shape[1] // 2 + 1)[None, :]

    @property
    def k_squared(self) -> np.ndarray:
        """Squared wavenumbers, (X, Y // 2 + 1)."""
        return self.kx**2 + self.ky**2

    @property
    def inverse_k_squared(self) -> np.ndarray:
        """The inverse of k^2, with 0 for the mean, so that solutions of Poisson's equation come out with zero mean."""
        k_squared = self.k_squared
        k_squared[0, 0] = np.inf
        return 1 / k_squared

    @property
    def dealias(self) -> np.ndarray:
        """A mask of the 2/3 rule, 1.0 where both indices are below n / 3: quadratic products do not alias."""
        index_x = np.abs(np.fft.fftfreq(self.shape[0], 1 / self.shape[0]))[:, None]
        index_y = np.arange(self.shape[1] // 2 + 1)[None, :]
        return ((3 * index_x < self.shape[0]) & (3 * index_y < self.shape[1])).astype(float)

    def points(self, origin: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Return grid points along x (X,) and along y (Y,), the first at `origin`."""
        x, y = (
            start + length * np.arange(size) / size
            for start, length, size in zip(origin, self.lengths, self.shape, strict=True)
        )
        return x, y

    def forward(self, fields: np.ndarray) -> np.ndarray:
        """Transform (..., X, Y) to (..., X, Y // 2 + 1)."""
        return fft.rfft2(fields)

    def inverse(self, coefficients: np.ndarray) -> np.ndarray:
        """Transform (..., X, Y // 2 + 1) to (..., X, Y)."""
        return fft.irfft2(coefficients, s=self.shape)


@dataclass(frozen=True)
class Etdrk4:
    """Fourth-order exponential time differencing Runge-Kutta for y' = linear * y + N(y), one step.

    Cox & Matthews 2002, J. Comput. Phys. 176, eqs (26)-(29); the coefficients as means over a unit circle around each
    value, which do not cancel near 0 (Kassam & Trefethen 2005, SIAM J. Sci. Comput. 26, section 3).
    """

    half: np.ndarray  # exp(h linear / 2)
    full: np.ndarray  # exp(h linear)
    stage: np.ndarray  # weight of N in the two middle stages
    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, linear: np.ndarray, step: float, points: int = 32) -> "Etdrk4":
        """Return the coefficients for a real diagonal `linear`, of any shape, and a time step."""
        z = step * linear
        # The circle is symmetric about the real axis: the upper half and the real part are the whole mean.
        circle = z[..., None] + np.exp(1j * np.pi * (np.arange(points) + 0.5) / points)
        exp = np.exp(circle)

        def mean(values: np.ndarray) -> np.ndarray:
            return step * values.mean(axis=-1).real

        return cls(
            half=np.exp(z / 2),
            full=np.exp(z),
            stage=mean((np.exp(circle / 2) - 1) / circle),
            first=mean((-4 - circle + exp * (4 - 3 * circle + circle**2)) / circle**3),
            middle=mean((2 + circle + exp * (circle - 2)) / circle**3),
            last=mean((-4 - 3 * circle - circle**2 + exp * (4 - circle)) / circle**3),
        )

    def advance(self, state: np.ndarray, nonlinear: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Take one step; `state` broadcasts against the coefficients, `nonlinear` maps a state to N(state)."""
        n_start = nonlinear(state)
        halfway = self.half * state
        a = halfway + self.stage * n_start
        n_a = nonlinear(a)
        n_b = nonlinear(halfway + self.stage * n_a)
        n_c = nonlinear(self.half * a + self.stage * (2 * n_b - n_start))
        return self.full * state + self.first * n_start + 2 * self.middle * (n_a + n_b) + self.last * n_c
