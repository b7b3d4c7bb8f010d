"""The pointwise map is found again where there is one, and is the least-squares one where there is none."""

import numpy as np
import pytest

from fm.lab.diagnosis.quantities import PointwiseMap


def apply(matrix: np.ndarray, states: np.ndarray) -> np.ndarray:
    return np.einsum("dc,bcxy->bdxy", matrix[:, :-1], states) + matrix[None, :, -1, None, None]


def test_an_affine_map_of_each_point_is_recovered() -> None:
    rng = np.random.default_rng(0)
    matrix, states = rng.standard_normal((3, 4)), rng.standard_normal((6, 3, 8, 10))
    fit = PointwiseMap.fit((part, apply(matrix, part)) for part in (states[:2], states[2:]))
    np.testing.assert_allclose(fit.matrix, matrix, atol=1e-9)
    np.testing.assert_allclose(fit(states), apply(matrix, states), atol=1e-9)


def test_a_rotation_is_exact_in_the_precision_of_the_data() -> None:
    """What helmholtz_staircase is: (re, im) turned by one angle."""
    angle = 2 * np.pi / 49
    matrix = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]])
    states = np.random.default_rng(1).standard_normal((4, 2, 16, 16)).astype(np.float32)
    target = apply(matrix, states).astype(np.float32)
    assert np.abs(PointwiseMap.fit([(states, target)])(states) - target).max() < 1e-6


def test_it_is_the_plain_least_squares_solution() -> None:
    rng = np.random.default_rng(2)
    source, target = rng.standard_normal((2, 3, 2, 8, 8))
    rows = np.concatenate([source.transpose(0, 2, 3, 1).reshape(-1, 2), np.ones((3 * 64, 1))], axis=1)
    expected = np.linalg.lstsq(rows, target.transpose(0, 2, 3, 1).reshape(-1, 2), rcond=None)[0].T
    np.testing.assert_allclose(PointwiseMap.fit([(source, target)]).matrix, expected, atol=1e-9)


def test_copies_of_a_channel_do_no_harm() -> None:
    channel = np.random.default_rng(3).standard_normal((4, 1, 8, 8))
    twice = np.concatenate([channel, channel], axis=1)
    fit = PointwiseMap.fit([(twice, 3 * twice)])
    np.testing.assert_allclose(fit(twice), 3 * twice, atol=1e-6)
    assert fit.matrix[0, 0] == pytest.approx(1.5)
