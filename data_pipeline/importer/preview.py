"""The picture of an imported dataset: first, middle and last frame of each channel, axes, and a histogram.

It is drawn from the files that were written. A transposed axis, a wrong boundary or a wrong scale can be seen there.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_whole
from data_pipeline.importer.plan import ImportPlan
from data_pipeline.registry import Card
from data_pipeline.well.hdf5 import SPLITS, WellFile

PREVIEW = "preview.png"
MAX_CHANNELS = 12
SIDE = 2.5  # inches: the longer side of a frame
LEFT, RIGHT, TOP, BELOW, GAP = 0.95, 0.6, 0.8, 0.7, 0.2  # inches around the frames
BAR, CHART = 0.75, 2.1  # inches of the color bar with its numbers, and of the histogram
QUANTILE = 0.999  # of the values shown; the colors end there, so that one sharp peak does not dim the rest


def draw_preview(folder: Path, plan: ImportPlan, file: Path) -> None:
    """Draw the first trajectory of the dataset in `folder` into `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = next(path for split in SPLITS for path in sorted((folder / "data" / split).glob("*.hdf5")))
    fields = [one.field for one in plan.fields]
    state = tuple(one for one in fields if one.role == "state")
    constant = tuple(one for one in fields if one.role == "constant")
    grid = len(plan.x.points), len(plan.y.points)
    card = Card(plan.options.name, "", state, plan.boundary, grid, dt=None, constant=constant)
    with WellFile(path, card) as well:
        numbers = [0, well.num_frames // 2, well.num_frames - 1]
        frames = np.stack([well.read(0, number, number + 1)[0] for number in numbers])  # (3, C, X, Y)
        times, (x, y), scalars = well.times(0)[numbers], well.axes(), well.scalars(0)
    channels = card.state_channels[:MAX_CHANNELS]
    extent = (*_ends(x), *_ends(y))
    ratio = (extent[3] - extent[2]) / (extent[1] - extent[0])
    width, height = max(min(SIDE, SIDE / ratio), 1.0), max(min(SIDE, SIDE * ratio), 1.0)
    size = (LEFT + 3 * (width + GAP) + BAR + CHART + RIGHT, TOP + len(channels) * (height + BELOW))
    figure = Figure(figsize=size, facecolor="white")
    FigureCanvasAgg(figure)
    units = {channel: one.attributes.get("units", "") for one in plan.fields for channel in one.field.channels}
    for line, channel in enumerate(channels):
        bottom = size[1] - TOP - line * (height + BELOW) - height
        lefts = [LEFT + place * (width + GAP) for place in range(3)]
        places = [(left, bottom, width, height) for left in lefts]
        places += [(lefts[2] + width + 0.1, bottom, 0.1, height), (size[0] - RIGHT - CHART, bottom, CHART, height)]
        row = [
            figure.add_axes((left / size[0], low / size[1], wide / size[0], high / size[1]))
            for left, low, wide, high in places
        ]
        number = card.state_channels.index(channel)
        _draw_channel(figure, row, frames[:, number], times, extent, _named(channel, units[channel]))
    kinds = ", ".join(
        f"{axis} {'-'.join(dict.fromkeys(ends)).lower()}" for axis, ends in zip("xy", plan.boundary, strict=True)
    )
    parameters = "".join(f", {name} = {value:.4g}" for name, value in scalars.items())
    more = len(card.state_channels) - len(channels)
    figure.suptitle(
        f"{plan.options.name}: {grid[0]} x {grid[1]} points, {kinds}{parameters}\n"
        f"first trajectory of {path.parent.name}" + (f"; {more} more channels" if more else ""),
        size=10,
        y=1 - 0.1 / size[1],
        va="top",
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(file, picture.getvalue())


def _ends(points: np.ndarray) -> tuple[float, float]:
    """Return the ends of the cells whose centers are `points`."""
    return float(points[0] - (points[1] - points[0]) / 2), float(points[-1] + (points[-1] - points[-2]) / 2)


def _named(channel: str, unit: str) -> str:
    return f"{channel} [{unit}]" if unit else channel


def _draw_channel(
    figure: Any, row: Any, frames: np.ndarray, times: np.ndarray, extent: tuple[float, ...], label: str
) -> None:
    """Draw three frames (3, X, Y) with one color scale and the histogram of their values."""
    low, high = (float(value) for value in np.quantile(frames, (1 - QUANTILE, QUANTILE)))
    signed = low < 0 < high and min(-low, high) > 0.2 * max(-low, high)
    if signed:
        high = max(-low, high)
        low = -high
    if low == high:
        low, high = low - 0.5, high + 0.5
    colors = {"cmap": "RdBu_r" if signed else "viridis", "vmin": low, "vmax": high}
    for number, (axes, frame) in enumerate(zip(row, frames, strict=False)):
        image = axes.imshow(frame.T, origin="lower", extent=extent, aspect="auto", interpolation="nearest", **colors)
        axes.set_title(f"{('first', 'middle', 'last')[number]}: t = {times[number]:.4g}", size=9)
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=4)
        axes.set_xlabel("x →", size=8, labelpad=1)
        if number == 0:
            axes.set_ylabel("y →", size=8, labelpad=1)
            figure.text(
                0.15 / figure.get_figwidth(), _middle(axes), label, size=10, weight="bold", va="center", rotation=90
            )
        else:
            axes.set_yticklabels([])
    figure.colorbar(image, cax=row[3], extend="both").ax.tick_params(labelsize=7)
    chart = row[4]
    bins = np.linspace(frames.min(), max(frames.max(), frames.min() + 1e-30), 41)
    for frame, name, color in zip(frames, ("first", "middle", "last"), ("#9ecae1", "#4292c6", "#08306b"), strict=True):
        chart.hist(frame.reshape(-1), bins=bins, histtype="step", label=name, color=color, linewidth=1.2)
    chart.margins(y=0.2)  # room for the legend
    chart.set_xlabel(label, size=8, labelpad=1)
    chart.set_ylabel("grid points", size=8)
    chart.yaxis.set_label_position("right")
    chart.yaxis.tick_right()
    chart.tick_params(labelsize=7)
    chart.legend(fontsize=7, frameon=False, ncols=3, loc="upper center", columnspacing=0.8, handlelength=1)
    for side in ("top", "left"):
        chart.spines[side].set_visible(False)


def _middle(axes: Any) -> float:
    bounds = axes.get_position()
    return float(bounds.y0 + bounds.y1) / 2
