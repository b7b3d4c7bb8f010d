"""Does a rollout keep what the equations keep? The quantities that the card declares, along truth and rollout.

The truth is drawn beside the prediction, because its own values are the floor: stored frames are rounded, and a
divergence by centred differences is not the one that a solver on a staggered grid keeps at zero.

What a much simpler predictor reaches: the best linear map of a grid point's own channels, alike at every point.

A model that does not beat it learnt less than pointwise algebra; a dataset where it is exact (helmholtz_staircase turns
the phase of every point by one angle) shows how far a model is from a map that is easy to write down.

How the error of a rollout grows: e_{k+1} <= L e_k + eps_k (paper, Appendix H).

e_k is the error after k steps, eps_k the error of one step from the true state, L what a step makes of an error that is
already there. An L above 1 amplifies: the error doubles every ln 2 / ln L steps until it saturates. The sum is the
worst case, a new error that points along the old one. Independent errors add up as squares,
e_{k+1}^2 = L^2 e_k^2 + eps_k^2, and the same curve then speaks of a larger L: the two fits bracket it.

What one step of a map does to small differences: its Jacobian J, met only in products J v and J^T w.

The largest singular value is the local Lipschitz constant: the most that one step can amplify. How a difference grows
when it is carried from step to step is the finite-time Lyapunov exponent (Benettin et al. 1980, Meccanica 15).

J v is a central difference of two steps. With the width below it agrees with backpropagated J^T w to 1e-6 on our
models, in float32, and it asks nothing of a layer: some have a backward of their own and no forward derivative.

Which scales fail: energy of fields by wavelet subband, and by wavenumber.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from data_pipeline.registry import Boundary, Card
from fm.evaluation.plots import radial_spectrum
from fm.model.wavelets import Periodic, analysis

Spacing = tuple[float, float]


@dataclass(frozen=True)
class Drift:
    """One conserved quantity over the frames 0..K of the rollouts, frame 0 being the initial state.

    Means and mean squares are changes since frame 0; a divergence, which is to be 0, is given as it is.
    """

    kind: str  # of the card's Conserved
    label: str
    unit: str
    truth: np.ndarray  # (R, K + 1)
    prediction: np.ndarray


def grid_spacing(card: Card, grid: tuple[int, int]) -> Spacing | None:
    """Distance of grid points along x and y; None where the card does not say what the grid covers."""
    if card.domain is None:
        return None
    x, y = ((upper - lower) / points for (lower, upper), points in zip(card.domain, grid, strict=True))
    return x, y


def measure_drifts(
    card: Card, channels: Sequence[str], truth: np.ndarray, prediction: np.ndarray, std: np.ndarray
) -> tuple[Drift, ...]:
    """The card's conserved quantities, of states in physical units (R, K + 1, C, H, W); std (C,) is the channels'.

    A divergence is left out where the card does not say what the grid covers.
    """
    drifts = []
    spacing = grid_spacing(card, (truth.shape[-2], truth.shape[-1]))
    for conserved in card.conserved:
        places = [channels.index(name) for name in conserved.channels]
        fields = truth[:, :, places].astype(np.float64), prediction[:, :, places].astype(np.float64)
        if conserved.kind == "mean":
            for index, name in enumerate(conserved.channels):
                values = [_mean_drift(part[:, :, index]) / std[places[index]] for part in fields]
                drifts.append(Drift("mean", f"mean of {name}", "std", *values))
        elif conserved.kind == "mean_square":
            values = [_square_drift(part) for part in fields]
            label = f"mean square of {', '.join(conserved.channels)}"
            drifts.append(Drift("mean_square", label, "of its first value", *values))
        elif spacing is not None:
            values = [relative_divergence(part, spacing, card.boundary) for part in fields]
            label = f"divergence of {', '.join(conserved.channels)}"
            drifts.append(Drift("divergence", label, "of the rms gradient", *values))
    return tuple(drifts)


def relative_divergence(velocity: np.ndarray, spacing: Spacing, boundary: Boundary) -> np.ndarray:
    """rms of the divergence over rms of the gradient, by centred differences: velocity (..., 2, H, W) to (...)."""
    along_x, along_y = (
        centred_difference(velocity, axis, spacing[axis], boundary[axis][0] == "PERIODIC") for axis in (0, 1)
    )
    divergence = along_x[..., 0, :, :] + along_y[..., 1, :, :]
    gradient = np.square(along_x) + np.square(along_y)
    scale = np.sqrt(gradient.sum(axis=-3).mean(axis=(-2, -1)))
    return np.sqrt(np.square(divergence).mean(axis=(-2, -1))) / np.where(scale > 0, scale, 1.0)


def centred_difference(fields: np.ndarray, axis: int, spacing: float, periodic: bool) -> np.ndarray:
    """Second-order derivative of fields (..., H, W) along x (0) or y (1): it wraps, or is one-sided at the ends."""
    along = axis - 2
    if periodic:
        return (np.roll(fields, -1, along) - np.roll(fields, 1, along)) / (2 * spacing)
    return np.gradient(fields, spacing, axis=along, edge_order=2)


def _mean_drift(field: np.ndarray) -> np.ndarray:
    """(R, K + 1, H, W) to the change of the mean since frame 0."""
    mean = field.mean(axis=(-2, -1))
    return mean - mean[:, :1]


def _square_drift(fields: np.ndarray) -> np.ndarray:
    """(R, K + 1, C, H, W) to the relative change of the mean square since frame 0."""
    energy = np.square(fields).sum(axis=2).mean(axis=(-2, -1))
    return energy / energy[:, :1] - 1


@dataclass(frozen=True)
class PointwiseMap:
    """next = matrix @ (channels, 1) at each grid point; matrix (C, C + 1)."""

    matrix: np.ndarray

    @classmethod
    def fit(cls, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> "PointwiseMap":
        """Least squares over pairs of states and next states (B, C, H, W), by normal equations in float64.

        Channels that are copies of each other (a symmetric tensor's) share their weight.
        """
        gram: np.ndarray | float = 0.0
        moment: np.ndarray | float = 0.0
        for source, target in pairs:
            columns = _with_one(source)
            gram = gram + columns.T @ columns
            moment = moment + columns.T @ _columns(target)
        solution, *_ = np.linalg.lstsq(gram, moment, rcond=1e-12)
        return cls(solution.T)

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """The next states (B, C, H, W), float64."""
        batch, channels, height, width = states.shape
        return (_with_one(states) @ self.matrix.T).reshape(batch, height, width, channels).transpose(0, 3, 1, 2)


def _columns(states: np.ndarray) -> np.ndarray:
    """(B, C, H, W) to float64 (B H W, C)."""
    return states.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, states.shape[1])


def _with_one(states: np.ndarray) -> np.ndarray:
    columns = _columns(states)
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)


UNRELATED = sqrt(2.0)  # distance of two unrelated states of unit variance
GROWING = UNRELATED / 2  # up to here errors grow as the recurrence says; beyond they saturate
MIN_PAIRS = 3


@dataclass(frozen=True)
class Recurrence:
    """The recurrence, fitted to the growing part of some rollouts."""

    epsilon: float  # root mean square of the one-step errors in the fit
    factor: float  # L, by least squares
    independent_factor: float  # L, by least squares of the squares: where new errors are independent of old ones
    bound: float  # the smallest L for which the inequality holds at every step of the fit
    last_steps: tuple[int, ...]  # of each trajectory: steps 1 to this one are in the fit

    @property
    def doubling_steps(self) -> float | None:
        """Steps in which an error doubles; None where none grows."""
        return log(2) / log(self.factor) if self.factor > 1 else None

    def curve(self, one_step: np.ndarray) -> np.ndarray:
        """Errors (..., K) that the recurrence gives for one-step errors (..., K), from no error at all."""
        error, curve = np.zeros(one_step.shape[:-1]), np.empty(one_step.shape)
        with np.errstate(over="ignore"):
            for step in range(one_step.shape[-1]):
                error = self.factor * error + one_step[..., step]
                curve[..., step] = error
        return curve


def fit_recurrence(errors: np.ndarray, one_step: np.ndarray, limit: float = GROWING) -> Recurrence | None:
    """Least squares for L over the steps until the error first passes `limit`; errors and one_step (R, K).

    Steps from the first that is not finite on are left out. None where nothing can be said of growth: `why_unfitted`.
    """
    last = _last_steps(errors, one_step, limit)
    rows = range(len(last))
    x, following, new, epsilon = (
        np.concatenate([part[row, first : max(0, last[row] + until)] for row in rows])
        for part, first, until in ((errors, 0, -1), (errors, 1, 0), (one_step, 1, 0), (one_step, 0, 0))
    )
    y, squares = following - new, following**2 - new**2
    if len(x) < MIN_PAIRS or not x.all():
        return None
    return Recurrence(
        epsilon=float(np.sqrt(np.square(epsilon).mean())),
        factor=float(x @ y / (x @ x)),
        independent_factor=sqrt(max(0.0, float(x**2 @ squares / (x**2 @ x**2)))),
        bound=float((y / x).max()),
        last_steps=tuple(last.tolist()),
    )


def why_unfitted(errors: np.ndarray, one_step: np.ndarray, limit: float = GROWING) -> str:
    """Why `fit_recurrence` finds no law in these errors, as the end of a sentence."""
    if errors.size - len(errors) < MIN_PAIRS:
        return f"it takes {MIN_PAIRS} pairs of steps, and the rollouts have {errors.size - len(errors)}"
    if np.maximum(_last_steps(errors, one_step, limit) - 1, 0).sum() >= MIN_PAIRS:
        return "a rollout without any error has nothing that could grow"
    if (_finite_steps(errors, one_step) < _steps_to(errors, limit)).any():
        return "the errors stop being finite too soon"
    return "the error is too large from the start"


def _last_steps(errors: np.ndarray, one_step: np.ndarray, limit: float) -> np.ndarray:
    """(R,): how many steps of each trajectory a fit can use."""
    return np.minimum(_steps_to(errors, limit), _finite_steps(errors, one_step))


def _steps_to(errors: np.ndarray, limit: float) -> np.ndarray:
    """(R,): the step at which each error passes the limit, which is what the last one below it became."""
    return np.minimum(_leading(errors < limit) + 1, errors.shape[1])


def _finite_steps(errors: np.ndarray, one_step: np.ndarray) -> np.ndarray:
    """(R,): how many steps go by until something is not finite."""
    return _leading(np.isfinite(errors) & np.isfinite(one_step))


def _leading(condition: np.ndarray) -> np.ndarray:
    """(R, K) to (R,): for how many steps from the first on it holds."""
    return np.cumprod(condition, axis=1).sum(axis=1)


def first_step(condition: np.ndarray) -> tuple[int | None, ...]:
    """The first step, from 1, at which each trajectory of `condition` (R, K) is true; None where it never is."""
    return tuple(int(row.argmax()) + 1 if row.any() else None for row in condition)


def mean_factor(factors: np.ndarray, first: int = 0) -> float | None:
    """Geometric mean of growth factors (R, K) over the steps after `first`; None where any of them is not finite."""
    late = factors[:, first:]
    if not late.size or not np.isfinite(late).all():
        return None
    with np.errstate(divide="ignore"):  # a step that leaves nothing of an error leaves nothing of the mean
        return float(np.exp(np.log(late).mean()))


Step = Callable[[Tensor], Tensor]  # normalised states (B, C, H, W) to the next ones, row by row
WIDTH = 1e-3  # root mean square of the displacement on either side of a state whose values are of order 1
TOLERANCE = 0.003
MAX_ITERATIONS = 50


def derivative(step: Step, state: Tensor, direction: Tensor) -> Tensor:
    """J v: the step's derivative at states along directions, (B, ...) each, without gradients."""
    width = WIDTH / _rms(direction)
    with torch.no_grad():
        return (step(state + width * direction) - step(state - width * direction)) / (2 * width)


def transposed_derivative(step: Step, state: Tensor, weight: Tensor) -> Tensor:
    """J^T w, by backpropagation; (B, ...) each."""
    with torch.enable_grad():
        state = state.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(step(state), state, weight)
    return gradient


def largest_singular_value(step: Step, state: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """The largest singular value of J at one state (1, ...), from below, and its right singular vector.

    The Lanczos process on J^T J: power iteration that keeps the space it has searched, until the value rises by less
    than TOLERANCE an iteration. `start` (1, ...) is the first direction; the vector found at a state nearby is a good
    one. NaN, and `start` again, where the step is not finite.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    value, weights = 0.0, np.ones(1)
    while len(diagonal) < MAX_ITERATIONS:
        image = transposed_derivative(step, state, derivative(step, state, basis[-1]))
        diagonal.append(float((basis[-1] * image).sum()))
        for vector in basis:
            image = image - (vector * image).sum() * vector
        beside.append(float(image.norm()))
        if not np.isfinite([diagonal[-1], beside[-1]]).all():
            return float("nan"), start
        squares, vectors = eigh_tridiagonal(diagonal, beside[:-1])
        before, value, weights = value, float(np.sqrt(max(squares[-1], 0.0))), vectors[:, -1]
        if value - before <= TOLERANCE * value or beside[-1] == 0:
            break
        basis.append(image / image.norm())
    found = sum((float(w) * vector for w, vector in zip(weights, basis, strict=False)), torch.zeros_like(start))
    return value, found


def tangent_growth(step: Step, states: Iterable[Tensor], start: Tensor) -> np.ndarray:
    """By what factor a small difference grows in each step along a path of `states`, one (B, ...) a step: (B, K).

    The difference starts as `start` (B, ...) and is carried on by the Jacobian of each state in turn.
    """
    direction, factors = start / _rms(start), []
    for state in states:
        carried = derivative(step, state, direction)
        growth = _rms(carried)
        factors.append(growth.flatten().double().cpu().numpy())
        direction = carried / growth
    return np.stack(factors, axis=1)


def _rms(values: Tensor) -> Tensor:
    """Root mean square of each row, (B, 1, ...)."""
    return values.square().mean(dim=tuple(range(1, values.ndim)), keepdim=True).sqrt()


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
