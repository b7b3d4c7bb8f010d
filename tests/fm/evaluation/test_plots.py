"""The palette, error growth with trajectories that diverged, and power spectra on grids that are not square."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from samples import ramp_sample

from fm.evaluation.errors import DatasetErrors, Errors
from fm.evaluation.plots import (
    TRUTH,
    diverging_map,
    draw_spectra,
    growth_curve,
    growth_figure,
    radial_spectrum,
    rasterize,
    spectra_figure,
)
from fm.evaluation.protocol import PROTOCOLS


def test_the_diverging_map_has_even_lightness_and_a_light_middle() -> None:
    rgb = np.array(diverging_map()(np.arange(257)))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert luminance.argmax() == 128
    # CIE L*, independent of the OKLab in which the map is made.
    lightness = 116 * np.cbrt(np.maximum(luminance, 0.008856)) - 16
    for half in (lightness[:129], lightness[128:][::-1]):
        steps = np.diff(half)
        assert (steps > 0).all()
        assert steps.max() < 1.6 * steps.mean()
    assert lightness[0] == pytest.approx(lightness[-1], abs=6)


def test_growth_curves_keep_diverged_trajectories_as_infinity() -> None:
    model = np.full((3, 4, 2), 0.25)
    model[2, 2:] = np.nan
    ones = np.ones_like(model)
    median, low, high = growth_curve(Errors(ones, model, ones, ones, ones), "model", 0.0)
    assert median.tolist() == low.tolist() == [0.5] * 4
    assert high.tolist() == [0.5, 0.5, math.inf, math.inf]


def test_the_growth_figure_marks_failures() -> None:
    model = np.full((3, 9, 2), 0.25)
    model[2, 4:] = np.nan
    ones = np.ones_like(model)
    errors = Errors(ones, model, ones, ones, ones)
    part = DatasetErrors(("a", "b"), np.arange(3), errors, errors, "x", (16, 16))
    figure = growth_figure({"shear_flow": part}, PROTOCOLS["thirds"])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["1 of 3 diverged"]
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert cross.get_xdata().tolist() == [5]
    (axes,) = growth_figure({"shear_flow": part}, replace(PROTOCOLS["thirds"], max_steps=4)).axes
    assert (axes.get_xlim(), list(axes.texts)) == ((1, 4), [])  # what comes later is none of this protocol's


def flat_errors(names: list[str]) -> dict[str, DatasetErrors]:
    model, ones = np.full((2, 9, 1), 0.25), np.ones((2, 9, 1))
    errors = Errors(ones, model, ones, ones, ones)
    return {name: DatasetErrors(("a",), np.arange(2), errors, errors, "x", (16, 16)) for name in names}


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("name", ["thirds", "a_protocol_of_a_user_with_quite_a_long_name"])
def test_no_legend_is_cut_and_panels_keep_their_height(count: int, name: str) -> None:
    datasets = [f"a_dataset_of_a_user_with_a_long_name_{number}" for number in range(count)]
    figure = growth_figure(flat_errors(datasets), replace(PROTOCOLS["thirds"], name=name))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    panels = [axes.get_window_extent() for axes in figure.axes if axes.get_visible()]
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_visible()]
    assert all(panel.height > 1.1 * figure.dpi for panel in panels)
    assert all(title.y1 <= box.y0 + 1 for title in titles)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))


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
    assert {line.get_label(): line.get_color() for line in axes.lines}["truth"] == to_rgb(TRUTH)


@pytest.mark.parametrize("name", ["$\\frac{1$", "$x$ and $", r"\$a_b$", "$\\bad$"])
def test_names_are_drawn_and_never_read_as_formulas(name: str) -> None:
    sample = replace(ramp_sample(), dataset=name, channel=name)
    figure = spectra_figure([sample])
    figure.axes[0].set_ylabel(name)
    image = np.asarray(rasterize(figure, 60))
    assert (image < 128).any()
    assert name in figure.axes[0].get_title()
    assert not figure.axes[0].title.get_parse_math()
    assert any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())  # of the log axis
