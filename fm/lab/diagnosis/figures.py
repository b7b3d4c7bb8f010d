"""The figures of a diagnosis, drawn with matplotlib's objects alone (no pyplot, no global state)."""

from collections.abc import Callable, Mapping
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from fm.evaluation.plots import BLUE, GREEN, INK, LIGHT_GRAY, ORANGE, TEXT_SIZE, TRUTH, log_ticks, style_panel
from fm.lab.diagnosis.growth import GROWING, UNRELATED
from fm.lab.diagnosis.quantities import Diagnosis

DPI = 200
WIDTH = 7.2  # inches
LEAST_SHARE = 1e-9  # of the strongest ring of a spectrum: weaker power is rounding
LINE = 1.3
MODEL, ERROR = BLUE, ORANGE
LEVELS = (BLUE, GREEN, ORANGE)  # of wavelet details, coarse to fine
LEGEND = {"ncols": 4, "fontsize": TEXT_SIZE - 0.5, "frameon": False, "handlelength": 1.5}
NARROW = {"handlelength": 1.1, "columnspacing": 0.9}


def figure_names(diagnosis: Diagnosis) -> list[str]:
    """Return the names of the figures that this diagnosis has, in the order of the page."""
    return [name for name in FIGURES if name != "conservation" or diagnosis.drifts]


def draw(name: str, diagnosis: Diagnosis) -> Figure:
    """Draw one figure by its name."""
    height, draw_into = FIGURES[name]
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    draw_into(diagnosis, figure)
    return figure


def draw_sheet(diagnosis: Diagnosis) -> Figure:
    """Draw all figures on one sheet."""
    names = figure_names(diagnosis)
    heights = [FIGURES[name][0] for name in names]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(f"{diagnosis.dataset}: rollouts diagnosed", fontsize=TEXT_SIZE + 2)
    parts: Any = figure.subfigures(len(names), 1, height_ratios=heights)
    for part, name in zip(parts, names, strict=True):
        FIGURES[name][1](diagnosis, part)
    return figure


def _draw_growth(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    growth, steps = diagnosis.growth, np.arange(1, diagnosis.num_steps + 1)
    left, right = figure.subplots(1, 2)
    _plot(left, steps, growth.rollout, "rollout", MODEL)
    left.plot(steps, growth.one_step.T, ".", color=ERROR, markersize=3)
    left.plot([], [], ".", color=ERROR, markersize=3, label="one step")
    if growth.recurrence is not None:
        fit, dashes = growth.recurrence, (0, (3, 2))
        for curve, last in zip(fit.curve(growth.one_step), fit.last_steps, strict=True):
            left.plot(steps[:last], curve[:last], color=INK, linewidth=1, linestyle=dashes)
        left.plot([], [], color=INK, linewidth=1, linestyle=dashes, label=f"fit, L = {fit.factor:.2f}")
    left.axhline(UNRELATED, color=INK, linewidth=0.6)
    left.axhspan(GROWING, UNRELATED, color=LIGHT_GRAY, alpha=0.4, linewidth=0)
    _annotate(left, steps[-1], UNRELATED / 1.05, "two unrelated states", ha="right", va="top")
    _finish(left, "rms error, std", log=True, steps=diagnosis.num_steps)
    _plot(right, steps, growth.vrmse, "rollout", MODEL)
    failures = [(step, growth.vrmse[row, step - 1]) for row, step in enumerate(growth.failed) if step is not None]
    if failures:
        right.plot(*zip(*failures, strict=True), "o", color=ERROR, markersize=4, label="first failure")
    right.axhline(1, color=INK, linewidth=0.6)
    _annotate(right, 1, 1.04, "mean field", ha="left", va="bottom")
    _finish(right, "VRMSE, mean over channels", log=True, steps=diagnosis.num_steps)
    for axes in (left, right):
        _legend(axes)


def _draw_stability(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    stability, steps = diagnosis.stability, np.arange(diagnosis.num_steps + 1)
    left, right = figure.subplots(1, 2)
    for label, factors, color in (
        ("model on its rollout", stability.along_rollout, ERROR),
        ("model on the truth", stability.along_truth, MODEL),
        ("true flow", stability.true_flow, TRUTH),
    ):
        if factors is not None:
            start = np.ones((len(factors), 1))
            _plot(left, steps, np.cumprod(np.concatenate([start, factors], axis=1), axis=1), label, color)
    _finish(left, "size of a small difference", log=True, steps=diagnosis.num_steps)
    _legend(left, **NARROW)
    for label, values, color in (
        ("along its rollout", stability.largest_along_rollout, ERROR),
        ("along the truth", stability.largest_along_truth, MODEL),
    ):
        right.plot(stability.frames, values, "o-", color=color, markersize=3.5, linewidth=LINE, label=label)
    right.axhline(1, color=INK, linewidth=0.6)
    _finish(right, "largest amplification by a step", log=False, steps=diagnosis.num_steps)
    right.set_ylim(bottom=0)
    _legend(right)


def _draw_spectra(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    spectra = diagnosis.spectra
    panels = figure.subplots(1, len(spectra.steps), sharey=True, squeeze=False)[0]
    for index, (axes, step) in enumerate(zip(panels, spectra.steps, strict=True)):
        for label, values, color in (
            ("truth", spectra.truth, TRUTH),
            ("prediction", spectra.prediction, MODEL),
            ("error", spectra.error, ERROR),
        ):
            axes.plot(spectra.wavenumber, values[index], color=color, linewidth=LINE, label=label)
        axes.set_xscale("log")
        log_ticks(axes.xaxis, (1, 2, 5))
        axes.text(0.97, 0.97, f"step {step}", fontsize=TEXT_SIZE, ha="right", va="top", transform=axes.transAxes)
        _finish(axes, "power" if index == 0 else "", log=True, across="wavenumber")
    highest = max(float(part[np.isfinite(part)].max(initial=0.0)) for part in (spectra.truth, spectra.prediction))
    lowest = min(float(part[part > 0].min(initial=1.0)) for part in (spectra.truth, spectra.error))
    panels[0].set_ylim(max(lowest / 2, highest * LEAST_SHARE), highest * 2)
    _legend(panels[0], **NARROW)


def _draw_scales(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    bands, steps = diagnosis.bands, np.arange(1, diagnosis.num_steps + 1)
    left, right = figure.subplots(1, 2)
    for level in bands.levels:
        truth, prediction, error = (np.where(part > 0, part, np.nan) for part in bands.level(level))
        color = TRUTH if level == 0 else LEVELS[-level]
        label = "coarse part" if level == 0 else f"level {level}"
        left.plot(steps, np.median(np.sqrt(error / truth), axis=0), color=color, linewidth=LINE, label=label)
        right.plot(steps, np.median(prediction / truth, axis=0), color=color, linewidth=LINE, label=label)
    for axes, name in ((left, "rms error over rms truth"), (right, "energy over the truth's")):
        axes.axhline(1, color=INK, linewidth=0.6)
        _finish(axes, name, log=True, steps=diagnosis.num_steps)
        _legend(axes, **NARROW)


def _draw_conservation(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    panels = figure.subplots(1, len(diagnosis.drifts), squeeze=False)[0]
    for axes, drift in zip(panels, diagnosis.drifts, strict=True):
        frames = np.arange(drift.truth.shape[1])
        _plot(axes, frames, drift.prediction, "prediction", MODEL)
        _plot(axes, frames, drift.truth, "truth", TRUTH)
        axes.set_title("\n".join(wrap(drift.label, 80 // len(panels))), fontsize=TEXT_SIZE)
        _finish(axes, drift.unit, log=False, steps=diagnosis.num_steps)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", **LEGEND)


def _draw_floors(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    floors = diagnosis.floors
    rows = {
        "mean field": (1.0, TRUTH),
        "persistence": (floors.persistence, TRUTH),
        "best pointwise linear map": (floors.pointwise, GREEN),
        "model": (floors.model, MODEL),
    }
    axes = figure.subplots()
    style: dict[str, Any] = {"va": "center", "fontsize": TEXT_SIZE}
    for place, (value, color) in enumerate(rows.values()):
        axes.plot(value, place, "o", color=color, markersize=5.5)
        axes.annotate(f"{value:.2g}", (value, place), xytext=(7, 0), textcoords="offset points", **style)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xscale("log")
    axes.set_xlim(min(value for value, _ in rows.values()) / 2, 3)
    _finish(axes, "", log=False, across="one-step VRMSE")


FIGURES: Mapping[str, tuple[float, Callable[[Diagnosis, Figure | SubFigure], None]]] = {  # name -> height in inches
    "growth": (2.6, _draw_growth),
    "stability": (2.6, _draw_stability),
    "spectra": (2.5, _draw_spectra),
    "scales": (2.6, _draw_scales),
    "conservation": (2.6, _draw_conservation),
    "floors": (1.6, _draw_floors),
}


def _plot(axes: Axes, steps: np.ndarray, rows: np.ndarray, label: str, color: str) -> None:
    """Plot one line per trajectory, rows (R, n), under one label. A line ends where a value is not finite."""
    for row, values in enumerate(rows):
        finite = np.where(np.isfinite(values), values, np.nan)
        axes.plot(steps, finite, color=color, linewidth=LINE, label=label if row == 0 else None)


def _finish(axes: Axes, label: str, *, log: bool, steps: int = 0, across: str = "step") -> None:
    """Set the labels, the scale of y, the ticks and the frame; the x axis counts `steps`, if given."""
    style_panel(axes)
    axes.set_xlabel(across, fontsize=TEXT_SIZE)
    axes.set_ylabel(label, fontsize=TEXT_SIZE)
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        log_ticks(axes.yaxis, (1, 3) if high / low < 300 else (1,))
        if high / low <= 10:  # too few powers of ten for ticks at their multiples
            axes.yaxis.set_major_locator(MaxNLocator(5))
    if steps:
        axes.set_xlim(0, max(steps, 2) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _annotate(axes: Axes, x: float, y: float, text: str, ha: str, va: str) -> None:
    halo = withStroke(linewidth=2.5, foreground="white")  # a line may run behind the text
    axes.text(x, y, text, ha=ha, va=va, fontsize=TEXT_SIZE - 0.5, path_effects=[halo])


def _legend(axes: Axes, **style: float) -> None:
    """Place the legend in a row above the panel, where no line runs."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.99), **{**LEGEND, **style})
