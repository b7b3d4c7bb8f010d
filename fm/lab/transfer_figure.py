"""Learning curves of a joint run beside those of runs of one dataset, one panel a dataset."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from fm.lab.learning_curves import LearningCurve, TrainedRun
from fm.lab.transfer import Comparison

# Distinct to colour-blind readers (Okabe and Ito 2008).
JOINT, BESPOKE, MARK = "#0072B2", "#D55E00", "#595959"


def transfer_figure(joint: TrainedRun, comparisons: Sequence[Comparison]) -> Figure:
    """VRMSE against windows of the dataset seen, four panels a row; a line marks where the two were compared."""
    names = sorted({one.dataset for one in comparisons})
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(2.45 * columns, 3.4), 1.95 * rows + 0.55), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(grid, names, strict=False):
        _panel(axes, joint.curves.get(name), [one for one in comparisons if one.dataset == name])
        axes.set_title(name, fontsize=8)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("VRMSE", fontsize=8)
    for axes in grid[len(names) - columns : len(names)]:
        axes.set_xlabel("windows of it seen", fontsize=8)
    handles, labels = [], []
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, joint: LearningCurve | None, comparisons: Sequence[Comparison]) -> None:
    dataset = comparisons[0].dataset
    if joint is not None:
        _draw(axes, joint, JOINT, "together")
    for one in comparisons:
        if one.windows is not None:
            axes.axvline(one.windows, color=MARK, linewidth=0.8, linestyle=(0, (1, 1.5)), label="compared here")
        if dataset in one.bespoke.curves:
            _draw(axes, one.bespoke.curves[dataset], BESPOKE, "alone")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", linewidth=0.3, color="#D0D0D0")
    axes.tick_params(labelsize=7, width=0.5, length=2.5)


def _draw(axes: Axes, curve: LearningCurve, colour: str, label: str) -> None:
    shown = np.where(np.isfinite(curve.vrmse), curve.vrmse, np.nan)
    axes.plot(curve.windows, shown, "o-", color=colour, markersize=2.5, linewidth=1.2, label=label)
