"""The recurrence is found again in errors that follow it, in either way of adding, and in their growing part only."""

import numpy as np
import pytest

from fm.lab.diagnosis.quantities import Recurrence, first_step, fit_recurrence, mean_factor, why_unfitted


def errors_of(factor: float, one_step: np.ndarray, power: int = 1) -> np.ndarray:
    """e_{k+1}^p = (L e_k)^p + eps_k^p from no error, in plain Python."""
    errors = np.zeros_like(one_step)
    for row in range(len(one_step)):
        error = 0.0
        for step in range(one_step.shape[1]):
            error = ((factor * error) ** power + one_step[row, step] ** power) ** (1 / power)
            errors[row, step] = error
    return errors


@pytest.fixture
def one_step() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.001, 0.003, size=(3, 12))


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
def test_a_recurrence_is_recovered(one_step: np.ndarray, factor: float) -> None:
    errors = errors_of(factor, one_step)
    fit = fit_recurrence(errors, one_step)
    assert fit is not None
    assert fit.factor == pytest.approx(factor)
    assert fit.bound == pytest.approx(factor)
    assert fit.last_steps == (12, 12, 12)
    assert fit.epsilon == pytest.approx(np.sqrt((one_step**2).mean()))
    np.testing.assert_allclose(fit.curve(one_step), errors)


def test_independent_errors_are_recovered_by_their_squares(one_step: np.ndarray) -> None:
    fit = fit_recurrence(errors_of(1.2, one_step, power=2), one_step)
    assert fit is not None
    assert fit.independent_factor == pytest.approx(1.2)
    assert fit.factor < 1.2


def test_only_the_growing_part_is_fitted(one_step: np.ndarray) -> None:
    errors = errors_of(1.5, one_step)
    last = int((errors[0] < 0.05).sum())  # the step after it passes the limit, and is the last in the fit
    errors[:, last + 1 :] = 1.4
    fit = fit_recurrence(errors[:1], one_step[:1], limit=0.05)
    assert fit is not None
    assert fit.factor == pytest.approx(1.5)
    assert fit.last_steps == (last + 1,)


def test_errors_that_stop_being_finite_are_left_out(one_step: np.ndarray) -> None:
    errors = errors_of(1.1, one_step)
    errors[0, 5:] = np.nan
    errors[1, 7:] = np.inf
    fit = fit_recurrence(errors, one_step)
    assert fit is not None
    assert fit.factor == pytest.approx(1.1)
    assert fit.last_steps == (5, 7, 12)


def test_rollouts_that_are_not_finite_at_their_first_step_are_left_out(one_step: np.ndarray) -> None:
    errors = errors_of(1.1, one_step)
    errors[0] = np.nan
    fit = fit_recurrence(errors, one_step)
    assert fit is not None
    assert fit.factor == pytest.approx(1.1)
    assert fit.last_steps == (0, 12, 12)
    single = one_step.copy()
    single[1, 6:] = np.inf
    assert fit_recurrence(errors, single) is not None
    errors[:] = np.nan
    assert fit_recurrence(errors, one_step) is None
    assert why_unfitted(errors, one_step) == "the errors stop being finite too soon"


def test_an_error_that_is_large_from_the_start_has_no_law(one_step: np.ndarray) -> None:
    assert fit_recurrence(np.full((3, 12), 2.0), one_step) is None
    assert why_unfitted(np.full((3, 12), 2.0), one_step) == "the error is too large from the start"
    assert fit_recurrence(one_step[:1, :3], one_step[:1, :3]) is None
    assert why_unfitted(one_step[:1, :3], one_step[:1, :3]) == "it takes 3 pairs of steps, and the rollouts have 2"
    exact = np.zeros((3, 12))
    assert fit_recurrence(exact, exact) is None
    assert why_unfitted(exact, exact) == "a rollout without any error has nothing that could grow"


def test_doubling_time() -> None:
    assert Recurrence(0.1, 2.0, 2.0, 2.0, (5,)).doubling_steps == pytest.approx(1)
    assert Recurrence(0.1, 2**0.25, 2.0, 2.0, (5,)).doubling_steps == pytest.approx(4)
    assert Recurrence(0.1, 0.9, 0.9, 0.9, (5,)).doubling_steps is None


def test_first_steps_and_mean_factors() -> None:
    assert first_step(np.array([[False, True, True], [False, False, False], [True, False, False]])) == (2, None, 1)
    factors = np.array([[np.inf, 2.0, 8.0], [100.0, 4.0, 4.0]])
    assert mean_factor(factors, 1) == pytest.approx(4)
    assert mean_factor(factors) is None
    assert mean_factor(np.array([[2.0, 0.0]])) == 0
    assert mean_factor(np.full((1, 3), np.nan)) is None
