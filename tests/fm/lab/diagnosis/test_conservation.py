"""Conserved quantities of flows whose divergence and means are known."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.registry import Card, Conserved, load_registry
from fm.lab.diagnosis.quantities import centred_difference, grid_spacing, measure_drifts, relative_divergence

PERIODIC = (("PERIODIC", "PERIODIC"), ("PERIODIC", "PERIODIC"))
CHANNELS = ("tracer", "pressure", "velocity_x", "velocity_y")


def card(*conserved: Conserved) -> Card:
    return replace(load_registry().card("shear_flow"), boundary=PERIODIC, domain=((0, 1), (-1, 1)), conserved=conserved)


def coordinates(nx: int = 32, ny: int = 64) -> tuple[np.ndarray, np.ndarray]:
    return 2 * np.pi * np.arange(nx)[:, None] / nx, 2 * np.pi * np.arange(ny)[None, :] / ny


def test_a_vortex_has_no_divergence_and_a_source_has_nothing_else() -> None:
    x, y = coordinates(32, 32)
    spacing = (2 * np.pi / 32, 2 * np.pi / 32)
    vortex = np.stack([np.cos(x) * np.sin(y), -np.sin(x) * np.cos(y)])
    assert relative_divergence(vortex, spacing, PERIODIC) < 1e-12
    source = np.stack([np.sin(x) + 0 * y, 0 * x * y])
    assert relative_divergence(source, spacing, PERIODIC) == pytest.approx(1)
    assert relative_divergence(np.ones((2, 8, 8)), spacing, PERIODIC) == 0


def test_differences_are_second_order_up_to_the_walls() -> None:
    y = np.linspace(-1, 1, 16)
    field = np.broadcast_to(y**2, (8, 16))
    np.testing.assert_allclose(centred_difference(field, 1, y[1] - y[0], periodic=False), 2 * y + 0 * field, atol=1e-12)
    wrapped = np.broadcast_to(np.sin(np.pi * np.arange(16) / 8)[:, None], (16, 8))
    expected = np.cos(np.pi * np.arange(16) / 8) * np.sin(np.pi / 8) / (np.pi / 8)
    found = centred_difference(wrapped, 0, np.pi / 8, periodic=True)
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None], (16, 8)), atol=1e-12)


def test_drifts_are_measured_beside_the_truths() -> None:
    truth = np.random.default_rng(0).standard_normal((2, 5, 4, 16, 32))
    truth = np.repeat(truth[:, :1], 5, axis=1)
    prediction = truth.copy()
    prediction[:, :, 0] += 0.3 * np.arange(5)[:, None, None]
    prediction[:, :, 2:] *= np.sqrt(1 + 0.1 * np.arange(5))[:, None, None, None]
    pair = ("velocity_x", "velocity_y")
    declared = card(Conserved("mean", ("tracer",)), Conserved("mean_square", pair), Conserved("divergence", pair))
    mean, square, divergence = measure_drifts(declared, CHANNELS, truth, prediction, np.array([2.0, 1, 1, 1]))
    assert [drift.label for drift in (mean, square, divergence)] == [
        "mean of tracer",
        "mean square of velocity_x, velocity_y",
        "divergence of velocity_x, velocity_y",
    ]
    np.testing.assert_allclose(mean.prediction, np.tile(0.15 * np.arange(5), (2, 1)), atol=1e-12)
    np.testing.assert_allclose(square.prediction, np.tile(0.1 * np.arange(5), (2, 1)), atol=1e-12)
    assert np.abs(mean.truth).max() == np.abs(square.truth).max() == 0
    np.testing.assert_allclose(divergence.truth, divergence.prediction)


def test_without_a_domain_there_is_no_divergence() -> None:
    pair = ("velocity_x", "velocity_y")
    declared = replace(card(Conserved("divergence", pair), Conserved("mean", ("tracer",))), domain=None)
    states = np.ones((1, 3, 4, 16, 32))
    (only,) = measure_drifts(declared, CHANNELS, states, states, np.ones(4))
    assert only.kind == "mean"
    assert grid_spacing(declared, (16, 32)) is None
    assert grid_spacing(card(), (16, 32)) == (1 / 16, 1 / 16)
