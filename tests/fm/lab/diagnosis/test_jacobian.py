"""Jacobians in products, against maps whose Jacobian is known: matrices, and a pointwise nonlinear map."""

import numpy as np
import pytest
import torch

from fm.lab.diagnosis.quantities import Step, derivative, largest_singular_value, tangent_growth, transposed_derivative

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
