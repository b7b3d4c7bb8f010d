"""Which scales fail: energy of fields by wavelet subband, and by wavenumber."""

from dataclasses import dataclass

import numpy as np
import torch

from fm.nn.dwt import Periodic, analysis
from fm.report.spectra import radial_spectrum

WAVELET = "bior4.4"  # nearly orthonormal, and smooth enough to tell neighbouring scales apart
LEVELS = 3
DETAILS = ("LH", "HL", "HH")


@dataclass(frozen=True)
class Spectra:
    """Radially averaged power spectra at some steps, averaged over normalised channels; each (n, wavenumbers)."""

    steps: tuple[int, ...]
    wavenumber: np.ndarray  # 2 pi / wavelength, in physical units where the card says what the grid covers
    truth: np.ndarray
    prediction: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Bands:
    """By wavelet subband and step, over trajectories (R, K, S)."""

    names: tuple[str, ...]  # LL3, LH3, HL3, HH3, LH2, ..., HH1: coarse to fine
    truth: np.ndarray  # energy, the mean square of the coefficients' field
    prediction: np.ndarray
    error: np.ndarray

    def level(self, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Truth, prediction and error energy (R, K) of the details of one level, or of what is left (0)."""
        wanted = [index for index, name in enumerate(self.names) if _belongs(name, level)]
        truth, prediction, error = (part[..., wanted].sum(-1) for part in (self.truth, self.prediction, self.error))
        return truth, prediction, error

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels from coarse to fine: 0 is what is left, then the coarsest details."""
        return (0, *sorted({int(name[2:]) for name in self.names}, reverse=True))


def band_energy(fields: np.ndarray, periodic: Periodic) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the subbands, and their energy (..., S): fields (..., C, H, W), summed over channels, a grid point.

    As many levels as the grid can be halved, up to LEVELS.
    """
    points = fields.shape[-1] * fields.shape[-2]
    coarse = torch.from_numpy(fields)
    names: list[str] = []
    energies: list[np.ndarray] = []
    for level in range(1, LEVELS + 1):
        if coarse.shape[-1] % 2 or coarse.shape[-2] % 2 or min(coarse.shape[-2:]) < 4:
            break
        coarse, *details = analysis(coarse, WAVELET, 1, periodic).unbind(-3)
        names[:0] = [f"{kind}{level}" for kind in DETAILS]
        energies[:0] = [_energy(detail, points) for detail in details]
    names.insert(0, f"LL{len(names) // len(DETAILS)}")
    energies.insert(0, _energy(coarse, points))
    return tuple(names), np.stack(energies, axis=-1)


def measure_bands(truth: np.ndarray, prediction: np.ndarray, periodic: Periodic) -> Bands:
    """Subbands of normalised states (R, K, C, H, W)."""
    names, of_truth = band_energy(truth, periodic)
    return Bands(names, of_truth, band_energy(prediction, periodic)[1], band_energy(prediction - truth, periodic)[1])


def measure_spectra(
    truth: np.ndarray, prediction: np.ndarray, steps: tuple[int, ...], spacing: tuple[float, float]
) -> Spectra:
    """Spectra of normalised states (R, K, C, H, W) at these steps, averaged over trajectories and channels."""
    places = [step - 1 for step in steps]
    chosen = truth[:, places], prediction[:, places], prediction[:, places] - truth[:, places]
    wavenumber, _ = radial_spectrum(truth[0, 0, 0], spacing)
    curves = [np.stack([_mean_spectrum(part[:, index], spacing) for index in range(len(steps))]) for part in chosen]
    return Spectra(steps, wavenumber, *curves)


def _mean_spectrum(states: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """(R, C, H, W) to the mean spectrum."""
    fields = states.reshape(-1, *states.shape[-2:]).astype(np.float64)
    return np.mean([radial_spectrum(field, spacing)[1] for field in fields], axis=0)


def _energy(coefficients: torch.Tensor, points: int) -> np.ndarray:
    """(..., C, h, w) to (...)."""
    return coefficients.double().square().sum((-3, -2, -1)).numpy() / points


def _belongs(name: str, level: int) -> bool:
    return name.startswith("LL") if level == 0 else name[2:] == str(level) and not name.startswith("LL")
