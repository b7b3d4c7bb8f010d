"""Error growth and Jacobians: recurrences are recovered, and products with J agree with known matrices."""

import numpy as np
import pytest
import torch

from fm.lab.diagnosis.growth import (
    GROWING,
    Recurrence,
    Step,
    derivative,
    first_step,
    fit_recurrence,
    largest_singular_value,
    mean_factor,
    tangent_growth,
    transposed_derivative,
    why_unfitted,
)


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
    one_step = 10 * one_step
    errors = errors_of(1.5, one_step)
    last = int((errors[0] < GROWING).sum())  # the step after it passes the limit, and is the last in the fit
    errors[:, last + 1 :] = 1.4
    fit = fit_recurrence(errors[:1], one_step[:1])
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


SHAPE = (2, 4, 4)
SIZE = 32


def linear(matrix: np.ndarray) -> Step:
    """A step whose Jacobian is `matrix`, on states (B, 2, 4, 4), with an offset that is not."""
    weight = torch.from_numpy(matrix).float()
    return lambda state: (state.flatten(1) @ weight.T).view(-1, *SHAPE) + 0.5


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((SIZE, SIZE))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def test_derivatives_of_a_linear_map_are_products_with_its_matrix(matrix: np.ndarray) -> None:
    step, state, vector = linear(matrix), noise(3, *SHAPE), noise(3, *SHAPE)
    flat = vector.flatten(1).numpy()
    np.testing.assert_allclose(derivative(step, state, vector).flatten(1), flat @ matrix.T, atol=0.02)
    np.testing.assert_allclose(transposed_derivative(step, state, vector).flatten(1), flat @ matrix, atol=1e-4)


def test_the_derivative_of_a_nonlinear_map_is_taken_at_the_state() -> None:
    state, vector = noise(1, *SHAPE), 1e3 * noise(1, *SHAPE)  # the length of the direction does not matter
    found = derivative(lambda x: (2 * x).sin(), state, vector)
    np.testing.assert_allclose(found, 2 * (2 * state).cos() * vector, atol=1.0)


def test_the_largest_singular_value_and_its_vector(matrix: np.ndarray) -> None:
    values, vectors = np.linalg.svd(matrix)[1:]
    value, vector = largest_singular_value(linear(matrix), noise(1, *SHAPE), noise(1, *SHAPE))
    assert value == pytest.approx(values[0], rel=0.01)
    assert value <= values[0] * 1.001
    assert abs(float(vector.flatten().numpy() @ vectors[0])) > 0.9
    again, _ = largest_singular_value(linear(matrix), noise(1, *SHAPE), vector)
    assert again == pytest.approx(values[0], rel=0.003)


@pytest.mark.parametrize("factor", [0.0, 1.0, 7.0])
def test_a_multiple_of_the_identity_is_found_at_once(factor: float) -> None:
    value, _ = largest_singular_value(lambda state: factor * state, noise(1, *SHAPE), noise(1, *SHAPE))
    assert value == pytest.approx(factor, rel=1e-3)


def test_a_step_that_is_not_finite_has_no_singular_value() -> None:
    value, _ = largest_singular_value(lambda state: state / 0, noise(1, *SHAPE), noise(1, *SHAPE))
    assert np.isnan(value)


def test_small_differences_grow_at_last_by_the_largest_eigenvalue() -> None:
    """A shear: its largest singular value is far above its eigenvalues 1.5, 1.2, 0.5, ..."""
    matrix = np.diag([1.5, 1.2, *([0.5] * (SIZE - 2))])
    matrix[0, 1] = 5.0
    assert np.linalg.svd(matrix)[1][0] > 3
    growth = tangent_growth(linear(matrix), [noise(2, *SHAPE)] * 60, noise(2, *SHAPE))
    assert growth.shape == (2, 60)
    np.testing.assert_allclose(growth[:, -5:], 1.5, rtol=1e-3)


def test_the_growth_of_a_product_of_jacobians_is_the_product_of_growths() -> None:
    step: Step = torch.tanh
    path, start = [noise(1, *SHAPE) / k for k in (1, 2, 4)], noise(1, *SHAPE)
    carried = start
    for state in path:
        carried = (1 - state.tanh() ** 2) * carried
    product = tangent_growth(step, path, start).prod()
    assert product == pytest.approx(float(carried.norm() / start.norm()), rel=1e-3)
