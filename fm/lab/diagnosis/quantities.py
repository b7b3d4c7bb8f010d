"""The quantities of a diagnosis beside error growth: scales, conservation, one step; and the `Diagnosis` with all.

Array legend: R trajectories, K rollout steps, C channels, H W grid, S wavelet subbands. States are normalized unless a
docstring states physical units.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ptwt
import torch
from pydantic_core import to_jsonable_python

from data_pipeline.registry import Boundary, Card
from fm.datasets import grid_spacing
from fm.evaluation.plots import radial_spectrum
from fm.lab.diagnosis.growth import Growth, Stability

Spacing = tuple[float, float]  # distance of grid points along x and y

WAVELET = "bior4.4"  # nearly orthonormal, and smooth enough to separate neighboring scales
REACH = 4  # points on either side that a coefficient of WAVELET depends on, and coefficients that ptwt adds for them
LEVELS = 3


@dataclass(frozen=True)
class Spectra:
    """Radially averaged power spectra at some steps, averaged over channels and trajectories; (n, wavenumbers) each."""

    steps: tuple[int, ...]
    wavenumber: np.ndarray  # 2 pi / wavelength, in physical units if the card names the extent of the grid
    truth: np.ndarray
    prediction: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Bands:
    """Energy by wavelet subband and step, (R, K, S) each."""

    names: tuple[str, ...]  # LL3, LH3, HL3, HH3, LH2, ..., HH1: coarse to fine
    truth: np.ndarray
    prediction: np.ndarray
    error: np.ndarray

    def level(self, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the energy (R, K) of truth, prediction and error in the details of a level, or in LL for level 0."""
        wanted = [
            name.startswith("LL") if level == 0 else name in (f"LH{level}", f"HL{level}", f"HH{level}")
            for name in self.names
        ]
        truth, prediction, error = (part[..., wanted].sum(-1) for part in (self.truth, self.prediction, self.error))
        return truth, prediction, error

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels from coarse to fine: 0 for LL, then the coarsest details."""
        return (0, *sorted({int(name[2:]) for name in self.names}, reverse=True))


def band_energy(fields: np.ndarray, periodic: tuple[bool, bool]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the subbands, and their energy (..., S) per grid point, summed over channels.

    `fields` (..., C, H, W) are decomposed as often as the grid can be halved, up to LEVELS times. `periodic` tells
    whether x and y are periodic.
    """
    approximation, points = fields, fields.shape[-1] * fields.shape[-2]
    names: list[str] = []
    energies: list[np.ndarray] = []

    def energy(coefficients: np.ndarray) -> np.ndarray:
        return np.square(coefficients, dtype=np.float64).sum((-3, -2, -1)) / points

    for level in range(1, LEVELS + 1):
        if approximation.shape[-1] % 2 or approximation.shape[-2] % 2 or min(approximation.shape[-2:]) < 4:
            break
        approximation, *details = _one_level(approximation, periodic)
        names[:0] = [f"{kind}{level}" for kind in ("LH", "HL", "HH")]
        energies[:0] = [energy(detail) for detail in details]
    return (f"LL{len(names) // 3}", *names), np.stack([energy(approximation), *energies], axis=-1)


def _one_level(fields: np.ndarray, periodic: tuple[bool, bool]) -> list[np.ndarray]:
    """Return the subbands LL, LH, HL, HH of fields (..., H, W), (..., H / 2, W / 2) each.

    ptwt extends both axes alike, and keeps the coefficients of the extension, so that points near the ends would count
    more than once. Therefore each level extends each axis here and drops what lies beyond the ends.
    """
    extended = fields
    for axis, wraps in zip((-2, -1), periodic, strict=True):
        widths = [(0, 0)] * fields.ndim
        widths[axis] = (REACH, REACH)
        extended = np.pad(extended, widths, mode="wrap" if wraps else "reflect")
    ll, (hl, lh, hh) = ptwt.wavedec2(torch.from_numpy(extended), WAVELET, mode="zero", level=1)
    rows, columns = (slice(REACH, REACH + size // 2) for size in fields.shape[-2:])
    return [subband[..., rows, columns].numpy() for subband in (ll, lh, hl, hh)]


def measure_bands(truth: np.ndarray, prediction: np.ndarray, periodic: tuple[bool, bool]) -> Bands:
    """Measure the subbands of states (R, K, C, H, W)."""
    names, of_truth = band_energy(truth, periodic)
    return Bands(names, of_truth, band_energy(prediction, periodic)[1], band_energy(prediction - truth, periodic)[1])


def measure_spectra(truth: np.ndarray, prediction: np.ndarray, steps: tuple[int, ...], spacing: Spacing) -> Spectra:
    """Measure the spectra of states (R, K, C, H, W) at these steps, averaged over trajectories and channels."""
    chosen = [step - 1 for step in steps]
    fields = truth[:, chosen], prediction[:, chosen], prediction[:, chosen] - truth[:, chosen]
    wavenumber, _ = radial_spectrum(truth[0, 0, 0], spacing)
    return Spectra(steps, wavenumber, *(_mean_spectra(part, spacing) for part in fields))


def _mean_spectra(states: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Average the spectra of states (R, n, C, H, W) over trajectories and channels: (n, wavenumbers)."""
    steps = states.astype(np.float64).swapaxes(0, 1).reshape(states.shape[1], -1, *states.shape[-2:])
    return np.stack([np.mean([radial_spectrum(field, spacing)[1] for field in step], axis=0) for step in steps])


@dataclass(frozen=True)
class Drift:
    """One conserved quantity over the frames 0..K of the rollouts, (R, K + 1) each; frame 0 is the initial state.

    Means and mean squares are changes since frame 0. A divergence is not a change, since its conserved value is 0. The
    truth's own drift is the floor: stored frames are rounded, and a solver on a staggered grid does not keep the
    divergence of centered differences at zero.
    """

    kind: str  # of the card's Conserved: mean, mean_square or divergence
    label: str
    unit: str
    truth: np.ndarray
    prediction: np.ndarray


def measure_drifts(
    card: Card,
    channels: Sequence[str],
    truth: np.ndarray,
    prediction: np.ndarray,
    std: np.ndarray,
    stored: Spacing | None = None,
) -> tuple[Drift, ...]:
    """Measure the card's conserved quantities of states (R, K + 1, C, H, W) in physical units; std (C,).

    A divergence is left out if neither the card's domain nor `stored`, of the shards, gives the spacing of the grid.
    """
    drifts = []
    spacing = grid_spacing(card, (truth.shape[-2], truth.shape[-1]), stored)
    for conserved in card.conserved:
        places, listed = [channels.index(name) for name in conserved.channels], ", ".join(conserved.channels)
        fields = truth[:, :, places].astype(np.float64), prediction[:, :, places].astype(np.float64)
        if conserved.kind == "mean":
            for index, name in enumerate(conserved.channels):
                means = [part[:, :, index].mean(axis=(-2, -1)) for part in fields]
                values = [(mean - mean[:, :1]) / std[places[index]] for mean in means]
                drifts.append(Drift("mean", f"mean of {name}", "std", *values))
        elif conserved.kind == "mean_square":
            energies = [np.square(part).sum(axis=2).mean(axis=(-2, -1)) for part in fields]
            values = [energy / energy[:, :1] - 1 for energy in energies]
            drifts.append(Drift("mean_square", f"mean square of {listed}", "of its first value", *values))
        elif spacing is not None:
            values = [relative_divergence(part, spacing, card.boundary) for part in fields]
            drifts.append(Drift("divergence", f"divergence of {listed}", "of the rms gradient", *values))
    return tuple(drifts)


def relative_divergence(velocity: np.ndarray, spacing: Spacing, boundary: Boundary) -> np.ndarray:
    """Return the rms divergence over the rms gradient, (...), of a velocity (..., 2, H, W)."""
    along_x, along_y = (
        centered_difference(velocity, axis, spacing[axis], boundary[axis][0] == "PERIODIC") for axis in (0, 1)
    )
    divergence = along_x[..., 0, :, :] + along_y[..., 1, :, :]
    scale = np.sqrt((np.square(along_x) + np.square(along_y)).sum(axis=-3).mean(axis=(-2, -1)))
    return np.sqrt(np.square(divergence).mean(axis=(-2, -1))) / np.where(scale > 0, scale, 1.0)


def centered_difference(fields: np.ndarray, axis: int, spacing: float, periodic: bool) -> np.ndarray:
    """Return the second-order derivative of fields (..., H, W) along x (0) or y (1): wrapped, or one-sided at ends."""
    along = axis - 2
    if periodic:
        return (np.roll(fields, -1, along) - np.roll(fields, 1, along)) / (2 * spacing)
    return np.gradient(fields, spacing, axis=along, edge_order=2)


@dataclass(frozen=True)
class Floors:
    """Median one-step VRMSE over the same windows of the test split."""

    windows: int
    model: float
    pointwise: float  # of the best linear map of a grid point's own channels
    persistence: float


@dataclass(frozen=True)
class PointwiseMap:
    """The map next = matrix @ (channels, 1) at each grid point; matrix (C, n C + 1) for a state of n frames.

    A model with a larger error has learned less than pointwise algebra. Where the map is exact (helmholtz_staircase
    turns the phase of every point by one angle), the error shows how far the model is from a map that is easy to write.
    """

    matrix: np.ndarray

    @classmethod
    def fit(cls, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> "PointwiseMap":
        """Fit by least squares over states (B, n C, H, W) and next frames (B, C, H, W), by float64 normal equations.

        Copies of a channel (in a symmetric tensor) share its weight.
        """
        gram: np.ndarray | float = 0.0
        moment: np.ndarray | float = 0.0
        for source, target in pairs:
            columns = _columns(source)
            gram = gram + columns.T @ columns
            moment = moment + columns.T @ _columns(target)[:, :-1]
        solution, *_ = np.linalg.lstsq(gram, moment, rcond=1e-12)
        return cls(solution.T)

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """Return the frames (B, C, H, W), float64, after states (B, n C, H, W)."""
        batch, _, height, width = states.shape
        return (_columns(states) @ self.matrix.T).reshape(batch, height, width, -1).transpose(0, 3, 1, 2)


def _columns(states: np.ndarray) -> np.ndarray:
    """(B, C, H, W) to float64 (B H W, C + 1), the last column 1."""
    columns = states.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, states.shape[1])
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)


@dataclass(frozen=True)
class Diagnosis:
    """All quantities of one model on one dataset."""

    dataset: str
    origin: dict[str, object]  # checkpoint, step, data digest
    trajectories: tuple[int, ...]
    dt: float | None  # physical time of a step; None if it differs
    growth: Growth
    stability: Stability
    spectra: Spectra
    bands: Bands
    drifts: tuple[Drift, ...]
    floors: Floors

    @property
    def num_steps(self) -> int:
        """Length K of the rollouts."""
        return self.growth.rollout.shape[1]

    def to_json(self) -> dict[str, Any]:
        """Return all quantities as JSON types, with null for what is not finite."""
        plain = to_jsonable_python(self, inf_nan_mode="null", fallback=lambda array: array.tolist())
        return {"num_steps": self.num_steps, **plain}
