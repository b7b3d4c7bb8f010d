"""How errors grow along a rollout, and what one step does to a small difference.

Array legend: R trajectories, K rollout steps, C channels, H W grid. States are normalized. The Jacobian J of one step
is needed only in the products J v and J^T w. Its largest singular value is the local Lipschitz constant, the most that
one step can amplify. The growth of a small difference that is carried from step to step gives the finite-time Lyapunov
exponent (Benettin et al. 1980, Meccanica 15).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

Step = Callable[[Tensor], Tensor]  # normalized states (B, C, H, W) to the next ones, row by row

UNRELATED = math.sqrt(2.0)  # distance of two unrelated states of unit variance
GROWING = UNRELATED / 2  # errors below it follow the recurrence, larger ones saturate
MIN_PAIRS = 3  # pairs of successive errors that a fit of the recurrence needs
WIDTH = 1e-3  # rms of the displacement on either side of a state in J v; the state's values are of order 1
TOLERANCE = 0.003  # relative change of the largest singular value at which the iteration stops
MAX_ITERATIONS = 50


@dataclass(frozen=True)
class Recurrence:
    """The recurrence e_{k+1} <= L e_k + eps_k of the error (paper, Appendix H), fitted where rollouts' errors grow.

    e_k is the error after k steps, eps_k the error of one step from the true state, and L the factor by which a step
    amplifies an existing error. The sum is the worst case: the new error points along the old one. Independent errors
    add up as squares, e_{k+1}^2 = L^2 e_k^2 + eps_k^2, which fits the same errors with a larger L. The two values of L
    bracket the truth.
    """

    epsilon: float  # root mean square of the one-step errors in the fit
    factor: float  # L, by least squares
    independent_factor: float  # L, by least squares of the squares, for new errors that are independent of old ones
    bound: float  # the smallest L for which the inequality holds at every step of the fit
    last_steps: tuple[int, ...]  # of each trajectory: steps 1 to this one are in the fit

    @property
    def doubling_steps(self) -> float | None:
        """Number of steps in which an error doubles; None if errors do not grow."""
        return math.log(2) / math.log(self.factor) if self.factor > 1 else None

    def curve(self, one_step: np.ndarray) -> np.ndarray:
        """Return the errors (..., K) that the recurrence gives for one-step errors (..., K), starting without error."""
        error, curve = np.zeros(one_step.shape[:-1]), np.empty(one_step.shape)
        with np.errstate(over="ignore"):
            for step in range(one_step.shape[-1]):
                error = self.factor * error + one_step[..., step]
                curve[..., step] = error
        return curve


@dataclass(frozen=True)
class Growth:
    """Errors along the rollouts, (R, K) each."""

    rollout: np.ndarray  # root mean square error after k steps
    one_step: np.ndarray  # root mean square error of one step from the true state
    vrmse: np.ndarray  # as in the scores: physical units, mean over channels
    recurrence: Recurrence | None
    failed: tuple[int | None, ...]  # first step with VRMSE above 1, worse than the mean field
    not_finite: tuple[int | None, ...]  # first step whose error is not finite

    @classmethod
    def of(cls, rollout: np.ndarray, one_step: np.ndarray, vrmse: np.ndarray) -> "Growth":
        """Derive the recurrence and the failures from the errors."""
        failed, not_finite = first_step(~(vrmse <= 1)), first_step(~np.isfinite(rollout))
        return cls(rollout, one_step, vrmse, fit_recurrence(rollout, one_step), failed, not_finite)


@dataclass(frozen=True)
class Stability:
    """Growth factors (R, K) of one small difference, and largest singular values (n,) of the first trajectory."""

    along_truth: np.ndarray
    along_rollout: np.ndarray
    true_flow: np.ndarray | None  # growth of the distance of twins; None if the flow cannot be simulated again
    frames: tuple[int, ...]  # where the singular values were taken
    largest_along_truth: np.ndarray
    largest_along_rollout: np.ndarray


def fit_recurrence(errors: np.ndarray, one_step: np.ndarray) -> Recurrence | None:
    """Fit L by least squares over the steps until the error first exceeds GROWING; errors and one_step (R, K).

    Steps from the first that is not finite on are left out. Returns None if there is nothing to fit; `why_unfitted`
    gives the reason.
    """
    last = np.minimum(*_usable_steps(errors, one_step))
    x, following, new, epsilon = (
        np.concatenate([part[row, first : max(0, end + until)] for row, end in enumerate(last)])
        for part, first, until in ((errors, 0, -1), (errors, 1, 0), (one_step, 1, 0), (one_step, 0, 0))
    )
    y, squares = following - new, following**2 - new**2
    if len(x) < MIN_PAIRS or not x.all():
        return None
    return Recurrence(
        epsilon=float(np.sqrt(np.square(epsilon).mean())),
        factor=float(x @ y / (x @ x)),
        independent_factor=math.sqrt(max(0.0, float(x**2 @ squares / (x**2 @ x**2)))),
        bound=float((y / x).max()),
        last_steps=tuple(last.tolist()),
    )


def why_unfitted(errors: np.ndarray, one_step: np.ndarray) -> str:
    """Return the reason why `fit_recurrence` returns None for these errors, as the end of a sentence."""
    if errors.size - len(errors) < MIN_PAIRS:
        return f"it takes {MIN_PAIRS} pairs of steps, and the rollouts have {errors.size - len(errors)}"
    below, finite = _usable_steps(errors, one_step)
    if np.maximum(np.minimum(below, finite) - 1, 0).sum() >= MIN_PAIRS:
        return "a rollout without any error has nothing that could grow"
    return (
        "the errors stop being finite too soon" if (finite < below).any() else "the error is too large from the start"
    )


def _usable_steps(errors: np.ndarray, one_step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, (R,) each, the step at which the error exceeds GROWING, and the number of leading finite steps."""
    below, finite = (
        np.cumprod(condition, axis=1).sum(axis=1)
        for condition in (errors < GROWING, np.isfinite(errors) & np.isfinite(one_step))
    )
    return np.minimum(below + 1, errors.shape[1]), finite


def first_step(condition: np.ndarray) -> tuple[int | None, ...]:
    """Return the first step, counted from 1, at which each row of `condition` (R, K) is true, or None."""
    return tuple(int(row.argmax()) + 1 if row.any() else None for row in condition)


def mean_factor(factors: np.ndarray, first: int = 0) -> float | None:
    """Return the geometric mean of growth factors (R, K) over the steps after `first`; None if one is not finite."""
    late = factors[:, first:]
    if not late.size or not np.isfinite(late).all():
        return None
    with np.errstate(divide="ignore"):  # a factor of 0 makes the mean 0
        return float(np.exp(np.log(late).mean()))


def derivative(step: Step, state: Tensor, direction: Tensor) -> Tensor:
    """Return J v by a central difference of two steps; state and direction (B, ...).

    With WIDTH it agrees with backpropagated J^T w to 1e-6 on our models in float32. A forward derivative would need
    support in every layer, and some layers have a custom backward pass only.
    """
    width = WIDTH / _rms(direction)
    with torch.no_grad():
        return (step(state + width * direction) - step(state - width * direction)) / (2 * width)


def transposed_derivative(step: Step, state: Tensor, weight: Tensor) -> Tensor:
    """Return J^T w by backpropagation; state and weight (B, ...)."""
    with torch.enable_grad():
        state = state.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(step(state), state, weight)
    return gradient


def largest_singular_value(step: Step, state: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """Return the largest singular value of J at one state (1, ...), from below, and its right singular vector.

    The Lanczos iteration on J^T J, which stops when an iteration raises the value by less than TOLERANCE. `start`
    (1, ...) is the first direction; the vector of a nearby state is a good one. Returns NaN and `start` if the step is
    not finite.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    value, weights = 0.0, np.ones(1)
    while len(diagonal) < MAX_ITERATIONS:
        image = transposed_derivative(step, state, derivative(step, state, basis[-1]))
        diagonal.append(float((basis[-1] * image).sum()))
        for vector in basis:
            image = image - (vector * image).sum() * vector
        off_diagonal.append(float(image.norm()))
        if not np.isfinite([diagonal[-1], off_diagonal[-1]]).all():
            return float("nan"), start
        squares, vectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
        before, value, weights = value, float(np.sqrt(max(squares[-1], 0.0))), vectors[:, -1]
        if value - before <= TOLERANCE * value or off_diagonal[-1] == 0:
            break
        basis.append(image / image.norm())
    found = sum((float(w) * vector for w, vector in zip(weights, basis, strict=False)), torch.zeros_like(start))
    return value, found


def tangent_growth(step: Step, states: Iterable[Tensor], start: Tensor) -> np.ndarray:
    """Return the growth factors (B, K) of a small difference along a path of `states`, one (B, ...) a step.

    The difference is `start` (B, ...) at first; the Jacobian of each state in turn carries it on.
    """
    direction, factors = start / _rms(start), []
    for state in states:
        carried = derivative(step, state, direction)
        growth = _rms(carried)
        factors.append(growth.flatten().double().cpu().numpy())
        direction = carried / growth
    return np.stack(factors, axis=1)


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square of each row, (B, 1, ...)."""
    return values.square().mean(dim=tuple(range(1, values.ndim)), keepdim=True).sqrt()
