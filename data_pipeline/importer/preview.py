"""The picture of an imported dataset: first, middle and last frame of each channel, axes, and a histogram.

It is drawn from the files that were written. A transposed axis, a wrong boundary or a wrong scale can be seen there.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_whole
from data_pipeline.importer.plan import Plan
from data_pipeline.registry import Card
from data_pipeline.well.hdf5 import SPLITS, WellFile

PREVIEW = "preview.png"
MAX_CHANNELS = 12
WIDTH, HEIGHT = 2.5, 2.5  # inches of one frame at most, its labels not counted
QUANTILE = 0.999  # of the values shown; the colors end there, so that one sharp peak does not dim the rest


def draw_preview(folder: Path, plan: Plan, file: Path) -> None:
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
    width, height = (WIDTH, WIDTH * ratio) if ratio < 1 else (HEIGHT / ratio, HEIGHT)
    width, height = max(width, 0.9), max(height, 0.7)
    figure = Figure(
        figsize=(3 * (width + 0.25) + 4.6, len(channels) * (height + 0.75) + 0.9),
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    table = figure.subplots(
        len(channels), 4, squeeze=False, gridspec_kw={"width_ratios": [width, width, width, 1.9], "wspace": 0.02}
    )
    units = {channel: one.attributes.get("units", "") for one in plan.fields for channel in one.field.channels}
    for row, channel in zip(table, channels, strict=False):
        number = card.state_channels.index(channel)
        _draw_channel(figure, row, frames[:, number], times, extent, _named(channel, units[channel]))
    for axes, label in zip(table[0], ("first", "middle", "last"), strict=False):
        axes.set_title(f"{label}: {axes.get_title()}", size=9)
    kinds = ", ".join(
        f"{axis} {'-'.join(dict.fromkeys(ends)).lower()}" for axis, ends in zip("xy", plan.boundary, strict=True)
    )
    parameters = "".join(f", {name} = {value:.4g}" for name, value in scalars.items())
    more = len(card.state_channels) - len(channels)
    figure.suptitle(
        f"{plan.options.name}: {grid[0]} x {grid[1]} points, {kinds}{parameters}\n"
        f"first trajectory of {path.parent.name}" + (f"; {more} more channels" if more else ""),
        size=10,
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
        image = axes.imshow(frame.T, origin="lower", extent=extent, aspect="equal", interpolation="nearest", **colors)
        axes.set_title(f"t = {times[number]:.4g}", size=9)
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=4)
        axes.set_xlabel("x →", size=8, labelpad=1)
        if number == 0:
            axes.set_ylabel(f"{label}\n\ny →", size=8, labelpad=1)
        else:
            axes.set_yticklabels([])
    bar = figure.colorbar(image, ax=row[2], fraction=0.06, pad=0.02, extend="both")
    bar.ax.tick_params(labelsize=7)
    chart = row[3]
    chart.hist(
        [frame.reshape(-1) for frame in frames],
        bins=48,
        histtype="step",
        label=["first", "middle", "last"],
        color=["#9ecae1", "#4292c6", "#08306b"],
        linewidth=1.2,
    )
    chart.set_yscale("log")
    chart.set_xlabel(label, size=8, labelpad=1)
    chart.set_ylabel("grid points", size=8)
    chart.yaxis.set_label_position("right")
    chart.yaxis.tick_right()
    chart.tick_params(labelsize=7)
    chart.legend(fontsize=6, frameon=False)
    for side in ("top", "left"):
        chart.spines[side].set_visible(False)
