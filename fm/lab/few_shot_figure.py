"""The few-shot curve: error against number of trajectories, one panel a kind of score."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullFormatter

# Distinct to colour-blind readers (Okabe and Ito 2008).
COLOURS, PERSISTENCE = ("#0072B2", "#D55E00"), "#595959"


def few_shot_figure(
    counts: Sequence[int],
    curves: Mapping[str, Mapping[str, Sequence[float | None]]],
    persistence: Mapping[str, float | None],
    subtitle: str,
) -> Figure:
    """VRMSE by arm and block at each number of trajectories in `counts`; `persistence` by block is a line."""
    shown = [block for block, value in persistence.items() if value is not None]
    figure = Figure(figsize=(max(2.45 * len(shown), 4.6), 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(len(shown), 1), squeeze=False)[0]
    for axes, block in zip(panels, shown, strict=False):
        value = persistence[block]
        assert value is not None
        axes.axhline(value, color=PERSISTENCE, linewidth=0.9, linestyle=(0, (1, 1.5)), label="persistence")
        for colour, (arm, blocks) in zip(COLOURS, curves.items(), strict=True):
            values = np.array([np.nan if one is None else one for one in blocks[block]], np.float64)
            axes.plot(counts, values, "o-", color=colour, markersize=3.5, linewidth=1.3, label=arm)
        _style(axes, counts)
        axes.set_title(block.replace("_", " "), fontsize=8)
    panels[0].set_ylabel("VRMSE, test split", fontsize=8)
    figure.supxlabel(f"training trajectories\n{subtitle}", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _style(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(counts)))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", linewidth=0.3, color="#D0D0D0")
    axes.tick_params(labelsize=7, width=0.5, length=2.5)
