"""Error growth: what diverged stays in the picture."""

import math
from dataclasses import replace

import numpy as np

from fm.evaluation.errors import DatasetErrors, Errors
from fm.evaluation.plots import growth_curve, growth_figure
from fm.evaluation.protocol import PROTOCOLS


def test_growth_curves_keep_diverged_trajectories_as_infinity() -> None:
    model = np.full((3, 4, 2), 0.25)
    model[2, 2:] = np.nan
    ones = np.ones_like(model)
    median, low, high = growth_curve(Errors(ones, model, ones, ones), "model", 0.0)
    assert median.tolist() == low.tolist() == [0.5] * 4
    assert high.tolist() == [0.5, 0.5, math.inf, math.inf]


def test_the_growth_figure_marks_failures() -> None:
    model = np.full((3, 9, 2), 0.25)
    model[2, 4:] = np.nan
    ones = np.ones_like(model)
    errors = Errors(ones, model, ones, ones)
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
