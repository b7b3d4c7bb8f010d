"""Power spectra of fields."""

import numpy as np


def radial_spectrum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Power of a field (X, Y) in rings of the wavenumber, counted in cycles per grid length of the shorter axis."""
    nx, ny = values.shape
    power = np.abs(np.fft.fft2(values - values.mean()) / values.size) ** 2
    shorter = min(nx, ny)
    kx, ky = np.fft.fftfreq(nx) * shorter, np.fft.fftfreq(ny) * shorter
    ring = np.rint(np.hypot(kx[:, None], ky[None, :])).astype(int)
    rings = np.arange(1, shorter // 2 + 1)
    return rings, np.bincount(ring.ravel(), weights=power.ravel(), minlength=shorter)[rings]
