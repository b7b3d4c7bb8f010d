"""Scales against PyWavelets and plane waves, conserved quantities of known flows, and the pointwise map."""

from dataclasses import replace

import numpy as np
import pytest
import pywt
import torch

from data_pipeline.registry import Card, Conserved, load_registry
from fm.datasets import grid_spacing
from fm.lab.diagnosis.quantities import (
    PointwiseMap,
    band_energy,
    centered_difference,
    measure_bands,
    measure_drifts,
    measure_spectra,
    relative_divergence,
)
from fm.model.wavelets import analysis


def test_energies_are_those_of_pywavelets() -> None:
    """On periodic axes, where both transforms are of the endless field; they may begin at other samples."""
    field = np.random.default_rng(0).standard_normal((128, 96)).astype(np.float32)
    names, energy = band_energy(field[None], (True, True))
    assert names == ("LL3", "LH3", "HL3", "HH3", "LH2", "HL2", "HH2", "LH1", "HL1", "HH1")
    coarse, *details = pywt.wavedec2(field, "bior4.4", mode="periodization", level=3)
    expected = [coarse]
    for horizontal, vertical, diagonal in details:
        expected += [vertical, horizontal, diagonal]
    np.testing.assert_allclose(energy, [np.square(part).sum() / field.size for part in expected], rtol=1e-3)


@pytest.mark.parametrize("periodic", [(False, False), (True, False)])
def test_energies_beside_walls_are_those_of_the_models_transform(periodic: tuple[bool, bool]) -> None:
    """On the smallest grid, whose coarsest level is shorter than the filters."""
    fields = np.random.default_rng(2).standard_normal((3, 2, 16, 24)).astype(np.float32)
    _, energy = band_energy(fields, periodic)
    coarse, expected = torch.from_numpy(fields), []
    for _ in range(3):
        coarse, *details = analysis(coarse, "bior4.4", 1, periodic).unbind(-3)
        expected[:0] = [detail.square().sum((1, 2, 3)) / (16 * 24) for detail in details]
    expected.insert(0, coarse.square().sum((1, 2, 3)) / (16 * 24))
    np.testing.assert_allclose(energy, torch.stack(expected, dim=-1), rtol=1e-4)


def test_a_wave_lies_in_its_own_band() -> None:
    x = np.arange(64)
    finest = np.broadcast_to(np.cos(np.pi * x)[:, None], (64, 64)).astype(np.float32)[None]
    coarse = np.broadcast_to(np.cos(2 * np.pi * x / 64)[:, None], (64, 64)).astype(np.float32)[None]
    names, energy = band_energy(finest, (True, True))
    assert names[int(energy.argmax())] == "HL1"
    assert energy.max() > 0.99 * energy.sum()
    names, energy = band_energy(coarse, (True, True))
    assert names[int(energy.argmax())] == "LL3"
    assert energy.max() > 0.98 * energy.sum()


def test_a_grid_that_cannot_be_halved_three_times_has_fewer_levels() -> None:
    names, energy = band_energy(np.ones((1, 20, 36), np.float32), (False, True))
    assert names == ("LL2", "LH2", "HL2", "HH2", "LH1", "HL1", "HH1")
    assert energy[0] == pytest.approx(1, rel=0.02)
    assert energy[1:].max() < 1e-6


def test_levels_sum_their_details_over_steps() -> None:
    truth = np.random.default_rng(1).standard_normal((2, 3, 2, 32, 32)).astype(np.float32)
    bands = measure_bands(truth, 2 * truth, (True, False))
    assert bands.levels == (0, 3, 2, 1)
    total = 0.0
    for level in bands.levels:
        of_truth, of_prediction, of_error = bands.level(level)
        assert of_truth.shape == (2, 3)
        np.testing.assert_allclose(of_prediction, 4 * of_truth, rtol=1e-3)
        np.testing.assert_allclose(of_error, of_truth, rtol=1e-3)
        total = total + of_truth
    np.testing.assert_allclose(total, bands.truth.sum(-1))


def test_the_spectrum_of_a_wave_is_one_peak_at_its_wavenumber() -> None:
    x = 4.0 * np.arange(32) / 32
    wave = np.broadcast_to(np.sin(2 * np.pi * 3 * x / 4)[:, None], (1, 5, 1, 32, 16))
    spectra = measure_spectra(wave, 0 * wave, (1, 5), (4 / 32, 2 / 16))
    assert spectra.steps == (1, 5)
    assert spectra.truth.shape == (2, len(spectra.wavenumber))
    peak = int(spectra.truth[0].argmax())
    ring = spectra.wavenumber[1] - spectra.wavenumber[0]
    assert abs(spectra.wavenumber[peak] - 2 * np.pi * 3 / 4) <= ring / 2
    np.testing.assert_allclose(spectra.error, spectra.truth)
    assert spectra.prediction.max() == 0


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
    np.testing.assert_allclose(
        centered_difference(field, 1, y[1] - y[0], periodic=False), 2 * y + 0 * field, atol=1e-12
    )
    wrapped = np.broadcast_to(np.sin(np.pi * np.arange(16) / 8)[:, None], (16, 8))
    expected = np.cos(np.pi * np.arange(16) / 8) * np.sin(np.pi / 8) / (np.pi / 8)
    found = centered_difference(wrapped, 0, np.pi / 8, periodic=True)
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
