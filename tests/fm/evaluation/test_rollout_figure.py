"""The figure of a rollout: axes, units, parameters, the time until prediction and truth part."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from samples import ramp_sample

from fm.evaluation.rollout_figure import number_text, rollout_figure
from fm.evaluation.samples import Sample

DOMAIN = ((0.0, 2.0), (-1.0, 1.0))


def decaying(correlations: list[float], shape: tuple[int, int] = (16, 16)) -> Sample:
    """A wave whose prediction is the truth mixed with a wave of another wavenumber: these are its correlations."""
    x = 2 * np.pi * np.arange(shape[0])[:, None] / shape[0] + np.zeros(shape)
    truth, other = np.cos(x), np.cos(2 * x)
    prediction = np.stack([c * truth + np.sqrt(1 - c**2) * other for c in correlations])
    steps = tuple(range(1, len(correlations) + 1))
    return Sample(
        "shear_flow", "tracer", 3, 0.5, steps, np.stack([truth] * len(steps)), prediction, np.ones(len(steps))
    )


def test_correlations_and_the_step_at_which_they_are_lost() -> None:
    sample = decaying([0.95, 0.9, 0.7, 0.85])
    np.testing.assert_allclose(sample.correlations, [0.95, 0.9, 0.7, 0.85], rtol=1e-12)
    assert sample.correlated_steps() == pytest.approx(2.5)  # half way from 0.9 to 0.7; what comes later does not count
    assert decaying([0.6]).correlated_steps() == pytest.approx(0.5)  # from 1 at the given frame
    assert decaying([0.95, 0.81]).correlated_steps() is None
    assert sample.at([0, 2]).correlated_steps() == pytest.approx(1 + 2 * 0.15 / 0.25)


def test_what_is_not_finite_is_not_correlated_and_large_values_are() -> None:
    assert ramp_sample(num_steps=3).correlations.tolist() == pytest.approx([1, 1, 0])
    sample = decaying([0.9])
    huge = replace(sample, truth=sample.truth * 1e200, prediction=sample.prediction * 1e-200)
    assert huge.correlations.tolist() == pytest.approx([0.9])
    assert np.isnan(replace(sample, truth=np.ones_like(sample.truth)).correlations).all()
    assert replace(sample, truth=np.ones_like(sample.truth)).correlated_steps() is None


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])  # also stacked, and with narrow panels
def test_axes_scales_and_parameters_are_labeled(shape: tuple[int, int]) -> None:
    sample = replace(decaying([0.95, 0.9, 0.7], shape), unit="m/s; as measured", scalars={"Re": 1e5, "Sc": 0.25})
    domain = (
        DOMAIN if shape == (16, 16) else ((0.0, 8.0), (0.0, 1.0)) if shape == (64, 16) else ((0.0, 1.0), (0.0, 4.0))
    )
    figure = rollout_figure(replace(sample, domain=domain), [0, 2])
    figure.draw_without_rendering()
    fields = [axes for axes in figure.axes if axes.images and axes.get_images()[0].get_array().shape == shape[::-1]]
    assert len(fields) == 6
    for axis, name, (low, high) in zip("xy", "xy", domain, strict=True):
        labeled = [axes for axes in fields if getattr(axes, f"get_{axis}label")() == name]
        assert labeled
        for axes in labeled:
            places = getattr(axes, f"get_{axis}ticks")()
            assert (places[0], places[-1]) == (low, high)
    words = [text.get_text() for text in figure.texts]
    assert "shear_flow, tracer" in words
    assert "Re = 10\N{SUPERSCRIPT FIVE}, Sc = 0.25, trajectory 3" in " ".join(words)
    labels = {axes.get_ylabel() for axes in figure.axes} | {axes.get_xlabel() for axes in figure.axes}
    assert {"tracer (m/s)", "error", "correlation", "time after t\N{SUBSCRIPT ZERO}"} <= labels
    titles = {axes.get_title(loc="right") for axes in figure.axes}
    assert "correlation time 1.25" in titles
    everything = " ".join([*words, *(axes.get_title() for axes in fields)]).replace("\n", " ")
    assert everything.count("VRMSE 1.00") == 2
    assert everything.count("step 3") == 1


@pytest.mark.parametrize("shape", [(16, 16), (64, 16)])
def test_no_text_is_cut_or_lies_on_another(shape: tuple[int, int]) -> None:
    sample = replace(decaying([0.95] * 8, shape), unit="drop between the plates", scalars={"Rayleigh": 1e6})
    figure = rollout_figure(sample, range(8) if shape == (16, 16) else range(5))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()  # inches; of all that is drawn
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    titles = sorted((axes.title.get_window_extent() for axes in figure.axes if axes.get_title()), key=lambda b: b.x0)
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(titles))


def test_without_domain_and_time_step_axes_are_cells_and_steps() -> None:
    figure = rollout_figure(replace(decaying([0.95, 0.5]), dt=None), [1])
    labels = {axes.get_xlabel() for axes in figure.axes}
    assert {"x, cells", "step"} <= labels
    (title,) = {axes.get_title(loc="right") for axes in figure.axes} - {""}
    assert title == "correlation below 0.8 after step 1.33"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (1, "1"), (12345.6, "1.235×10⁴"), (1e10, "10¹⁰"), (-2e-7, "-2×10⁻⁷"), (0, "0")],
)
def test_numbers_are_as_they_are_printed(value: float, text: str) -> None:
    assert number_text(value) == text
