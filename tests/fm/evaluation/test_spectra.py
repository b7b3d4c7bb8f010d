"""Power spectra: plane waves and Parseval, on grids that are not square."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from samples import ramp_sample

from fm.evaluation.plots import draw_spectra, radial_spectrum, spectra_figure


@pytest.mark.parametrize("cycles", [(3, 0), (0, 2), (4, 3)])
def test_a_plane_wave_lies_at_its_wavenumber_with_half_its_squared_amplitude(cycles: tuple[int, int]) -> None:
    shape, lengths = (64, 48), (2.0, 1.0)
    x, y = (np.arange(n) / n for n in shape)
    wave = 5 + 0.8 * np.cos(2 * np.pi * (cycles[0] * x[:, None] + cycles[1] * y) + 0.3)
    wavenumber, power = radial_spectrum(wave, (2.0 / 64, 1.0 / 48))
    exact = 2 * np.pi * np.hypot(cycles[0] / lengths[0], cycles[1] / lengths[1])
    assert wavenumber[power.argmax()] == pytest.approx(exact, abs=np.pi)  # rings are 2 pi / 1 wide
    assert power.max() == pytest.approx(0.8**2 / 2, rel=1e-12)
    assert power.sum() == pytest.approx(power.max(), rel=1e-12)


def test_parseval() -> None:
    shape = (64, 32)
    noise = np.fft.rfft2(np.random.default_rng(0).standard_normal(shape))
    kx, ky = np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(32)
    noise[np.hypot(kx, ky) > 0.4] = 0  # nothing beyond the last ring
    field = 7 + np.fft.irfft2(noise, shape)
    _, power = radial_spectrum(field)
    assert power.sum() == pytest.approx(field.var(), rel=1e-12)


def test_wavenumbers_end_at_the_smaller_nyquist() -> None:
    wavenumber, power = radial_spectrum(np.zeros((64, 16)), (1.0, 0.5))
    assert wavenumber[0] == pytest.approx(2 * np.pi / 8)  # the y axis is 8 long, x is 64
    assert wavenumber[-1] == pytest.approx(np.pi)
    assert len(wavenumber) == len(power) == 4


def test_the_figure_has_a_panel_for_each_dataset_and_leaves_out_what_is_not_finite() -> None:
    known = ramp_sample((16, 32), num_steps=9, domain=((0.0, 1.0), (0.0, 2.0)))
    figure = spectra_figure([known, ramp_sample((64, 16))])
    figure.draw_without_rendering()
    first, second = figure.axes
    assert len(first.lines) == len(second.lines) == 3 + 3 + 1  # of the last step there is the truth alone
    assert "steps 1, 5, 9" in first.get_title()
    assert "per unit length" in first.get_xlabel()
    assert "per cell" in second.get_xlabel()


def test_a_single_step_has_the_full_shade() -> None:
    axes = Figure().subplots()
    draw_spectra(axes, ramp_sample().at([0]))
    assert {line.get_label(): line.get_color() for line in axes.lines}["truth"] == (0.25, 0.25, 0.25)
