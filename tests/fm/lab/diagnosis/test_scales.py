"""Energies by subband against PyWavelets, plane waves where they belong."""

import numpy as np
import pytest
import pywt

from fm.lab.diagnosis.quantities import band_energy, measure_bands, measure_spectra


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
