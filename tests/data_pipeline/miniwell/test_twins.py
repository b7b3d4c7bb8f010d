"""Twins of real simulations: the first is the stored trajectory, the second stays as close as the physics lets it."""

from pathlib import Path

import numpy as np
import pytest
from small_cases import read_arrays

from data_pipeline.miniwell.generate import SYSTEMS, file_name, load_system
from data_pipeline.miniwell.twins import DisturbedGenerator, twin_distance, twin_states


@pytest.mark.parametrize("dataset", ["rayleigh_benard", "active_matter", "acoustic_scattering_maze"])
def test_the_first_twin_is_the_trajectory_in_the_files(dataset: str, tiny_well: Path) -> None:
    system = load_system(dataset)
    parameter_set = system.presets["tiny"].parameter_sets[0]
    counts = parameter_set.num_trajectories
    states = twin_states(dataset, "tiny", 0, counts["train"] + counts["valid"], seed=0)
    stored = read_arrays(tiny_well, dataset, "test")[file_name(dataset, parameter_set)]
    at = 0
    for name in system.tensor_orders:
        components = stored[name][0].reshape(*stored[name].shape[1:4], -1)  # (T, X, Y, components)
        for component in np.moveaxis(components, -1, 0):
            np.testing.assert_array_equal(states[0, :, at].astype(np.float32), component)
            at += 1
    assert at == states.shape[2]


@pytest.mark.parametrize("dataset", SYSTEMS)
def test_twins_are_the_same_case_a_small_step_apart(dataset: str) -> None:
    """The decisions of a start (layers, coins, mazes) are the same: any other one would move the twin by order 1."""
    states = twin_states(dataset, "tiny", 0, 0, seed=0, amplitude=1e-7)
    distance = twin_distance(states, states[0].std(axis=(0, 2, 3)))
    assert 1e-11 < distance[0] < 1e-5
    assert np.isfinite(distance).all()


def test_the_distance_is_proportional_to_the_amplitude() -> None:
    """Small enough to be linear: ten times the disturbance is ten times the distance in every frame."""
    small, large = (twin_states("shear_flow", "tiny", 0, 0, seed=0, amplitude=amplitude) for amplitude in (1e-6, 1e-5))
    std = small[0].std(axis=(0, 2, 3))
    np.testing.assert_allclose(twin_distance(large, std), 10 * twin_distance(small, std), rtol=1e-2)


def test_a_rotation_keeps_twins_apart_as_they_were() -> None:
    states = twin_states("helmholtz_staircase", "tiny", 0, 0, seed=0)
    distance = twin_distance(states, np.ones(2))
    np.testing.assert_allclose(distance, distance[0], rtol=1e-9)


def test_disturbed_starts_keep_their_constraints() -> None:
    """No divergence: the spectral derivative of a twin of shear_flow, which lives on [0, 1) x [-1, 1)."""
    velocity = twin_states("shear_flow", "tiny", 0, 0, seed=0)[1, 0, -2:]
    nx, ny = velocity.shape[1:]
    k_x = 2j * np.pi * np.fft.fftfreq(nx, 1 / nx)[:, None]
    k_y = 1j * np.pi * np.fft.fftfreq(ny, 1 / ny)[None, :]
    k_x[nx // 2], k_y[:, ny // 2] = 0, 0
    gradient = k_x * np.fft.fft2(velocity[0])
    divergence = gradient + k_y * np.fft.fft2(velocity[1])
    assert np.abs(divergence).max() < 1e-10 * np.abs(gradient).max()


def test_discrete_numbers_pass_unchanged_and_continuous_ones_move_a_little() -> None:
    plain, moved = np.random.default_rng(3), DisturbedGenerator(np.random.default_rng(3), 1e-3, 0)
    assert plain.random() == moved.random()
    assert plain.integers(10**9) == moved.integers(10**9)
    for draw in (
        lambda rng: rng.standard_normal(100),
        lambda rng: rng.normal(2.0, 3.0, size=100),
        lambda rng: rng.uniform([1.0, 2.0], [3.0, 4.0], size=(50, 2)),
        lambda rng: np.array([rng.uniform()]),
    ):
        expected, got = draw(plain), draw(moved)
        relative = got / expected - 1
        assert (relative != 0).all()
        assert np.abs(relative).max() < 6e-3
    np.testing.assert_array_equal(plain.permutation(9), moved.permutation(9))
    assert plain.choice([2, 4]) == moved.choice([2, 4])
