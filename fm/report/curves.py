"""How the error grows along a rollout: one panel a dataset, the model beside persistence and the mean field."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from fm.scores.errors import DatasetErrors, Errors
from fm.scores.protocol import Protocol

# Distinct to colour-blind readers (Okabe and Ito 2008).
LINES: dict[str, dict[str, Any]] = {
    "model": {"color": "#0072B2", "linewidth": 1.5},
    "persistence": {"color": "#D55E00", "linewidth": 1.1, "linestyle": (0, (4, 1.5))},
    "mean_field": {"color": "#595959", "linewidth": 0.9, "linestyle": (0, (1, 1.2))},
}
QUANTILES = (0.1, 0.9)
SHADE = "#F0F0F0"


def growth_curve(errors: Errors, predictor: str, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """VRMSE, mean over channels, against step: median and the two QUANTILES over trajectories, each (S,).

    Over the trajectories that have the step. A trajectory that is not finite counts as +inf, so it moves the quantiles.
    """
    frames = errors.vrmse(predictor, eps).mean(axis=-1)  # (R, S)
    columns = [frames[errors.present[:, step], step] for step in range(frames.shape[1])]
    # Without interpolation an infinite value stays a rank and never turns into a NaN.
    low, high = ([np.quantile(c, q, method="nearest") for c in columns] for q in QUANTILES)
    return np.array([np.median(c) for c in columns]), np.array(low), np.array(high)


def growth_figure(datasets: Mapping[str, DatasetErrors], protocol: Protocol) -> Figure:
    """Error growth of every dataset, log scale, four panels a row; the protocol's windows are shaded in turn."""
    columns = min(4, len(datasets))
    rows = math.ceil(len(datasets) / columns)
    figure = Figure(figsize=(max(2.45 * columns, 3.4), 1.95 * rows + 0.55), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, errors) in zip(grid, datasets.items(), strict=False):
        _growth_panel(axes, errors, protocol)
        axes.set_title(name, fontsize=8)
    for axes in grid[len(datasets) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("VRMSE", fontsize=8)
    for axes in grid[len(datasets) - columns : len(datasets)]:
        axes.set_xlabel("rollout step", fontsize=8)
    handles, _ = grid[0].get_legend_handles_labels()
    handles.append(Patch(color=SHADE, linewidth=0))
    labels = ["model, median", "10% to 90% of trajectories", "persistence, median", "mean field"]
    labels.append(f"{', '.join(list(protocol.windows)[::2])} ({protocol.name} v{protocol.version})")
    figure.legend(handles, labels, loc="outside upper center", ncols=5 if columns > 2 else 1, fontsize=8, frameon=False)
    return figure


def _growth_panel(axes: Axes, errors: DatasetErrors, protocol: Protocol) -> None:
    rollout = errors.rollout.until(protocol.max_steps)  # the file may reach further than the protocol looks
    steps = np.arange(1, rollout.variance.shape[1] + 1)
    curves = {name: growth_curve(rollout, name, protocol.eps) for name in LINES}
    bottom, top = _limits(curves)
    for name, (median, low, high) in curves.items():
        axes.plot(steps, np.where(np.isfinite(median), median, np.nan), label=name, **LINES[name])
        if name == "model":
            colour = LINES[name]["color"]
            axes.fill_between(
                steps, np.minimum(low, top), np.minimum(high, top), color=colour, alpha=0.2, linewidth=0, label="spread"
            )
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(1, max(len(steps), 2))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", linewidth=0.3, color="#D0D0D0")
    axes.tick_params(labelsize=7, width=0.5, length=2.5)
    _mark_windows(axes, protocol, len(steps))
    _mark_failures(axes, rollout)


def _limits(curves: Mapping[str, tuple[np.ndarray, ...]]) -> tuple[float, float]:
    """Limits of the log axis. Persistence counts from below by its first step alone: a periodic flow brings it to 0."""
    values = np.concatenate([*curves["model"], curves["persistence"][0][:1]])
    lower = values[np.isfinite(values) & (values > 0)]
    values = np.concatenate([curve for three in curves.values() for curve in three])
    return lower.min(initial=0.5) / 1.3, values[np.isfinite(values)].max(initial=1.0) * 1.3


def _mark_windows(axes: Axes, protocol: Protocol, horizon: int) -> None:
    """Shade every other window, so that where a score was taken can be seen."""
    for index, window in enumerate(protocol.windows.values()):
        steps = window.steps(horizon)
        if steps and index % 2 == 0:
            axes.axvspan(steps[0] - 0.5, steps[1] + 0.5, color=SHADE, linewidth=0, zorder=0)


def _mark_failures(axes: Axes, rollout: Errors) -> None:
    """A cross where a trajectory stopped being finite."""
    failures = rollout.first_failures()
    failures = failures[failures > 0]
    if failures.size:
        axes.plot(
            failures,
            np.full(failures.shape, 0.94),
            "x",
            color="#CC0000",
            markersize=5,
            transform=axes.get_xaxis_transform(),
        )
        axes.text(
            0.97,
            0.05,
            f"{failures.size} of {len(rollout.steps)} diverged",
            fontsize=7,
            color="#CC0000",
            ha="right",
            transform=axes.transAxes,
        )
