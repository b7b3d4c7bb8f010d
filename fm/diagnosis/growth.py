"""How the error of a rollout grows: e_{k+1} <= L e_k + eps_k (paper, Appendix H).

e_k is the error after k steps, eps_k the error of one step from the true state, L what a step makes of an error that is
already there. An L above 1 amplifies: the error doubles every ln 2 / ln L steps until it saturates. The sum is the
worst case, a new error that points along the old one. Independent errors add up as squares,
e_{k+1}^2 = L^2 e_k^2 + eps_k^2, and the same curve then speaks of a larger L: the two fits bracket it.
"""

from dataclasses import dataclass
from math import log, sqrt

import numpy as np

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
