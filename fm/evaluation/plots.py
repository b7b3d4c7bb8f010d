"""How the error grows along a rollout: one panel a dataset, the model beside persistence and the mean field.

Power spectra of fields: which scales a prediction has, and which it gets wrong.

The wavenumber k = 2 pi / wavelength is in radians per unit of length. Modes of all directions within one ring of k are
added up, so that the power of a field without finer scales sums to its variance. No window is applied: where a field is
not periodic, the jump between its two ends adds a floor that falls as k^-2, to truth and prediction alike.

Cosines between the gradients of datasets: what is kept of them, and their picture.

Near +1 a step for one dataset is a step for the other, near 0 they do not meet, below 0 one undoes what the other does
(Yu et al. 2020, "Gradient Surgery for Multi-Task Learning"). A gradient of a few windows is noisy, which draws the
cosines towards 0; means over a run are steadier than one measurement.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from fm.evaluation.errors import DatasetErrors, Errors
from fm.evaluation.pictures import TEXT_SIZE, Sample, diverging_map
from fm.evaluation.protocol import Protocol

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


# Distinct to colour-blind readers (Okabe and Ito 2008); a step's shade goes from light (first) to full (last).
COLOURS = {"truth": (0.25, 0.25, 0.25), "prediction": (0.0, 0.447, 0.698), "error": (0.835, 0.369, 0.0)}
SHADES = (0.3, 0.6, 1.0)
DECADES = 9  # below the strongest ring; what is weaker is rounding


def radial_spectrum(values: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Wavenumbers (n,) and power (n,) of a field (H, W) whose points lie `spacing` apart along H and W.

    Rings are as wide as the coarser of the two grids of wavenumbers and end at the smaller Nyquist wavenumber.
    """
    power = np.abs(np.fft.fft2(values - values.mean()) / values.size) ** 2
    along = [2 * np.pi * np.fft.fftfreq(count, step) for count, step in zip(values.shape, spacing, strict=True)]
    width = max(2 * np.pi / (count * step) for count, step in zip(values.shape, spacing, strict=True))
    number = np.rint(np.hypot(along[0][:, None], along[1][None, :]) / width).astype(int)
    last = int(min(np.abs(k).max() for k in along) / width + 1e-9)
    rings = np.arange(1, last + 1)
    # The mean was taken out; modes of a long axis below the first ring belong to it.
    sums = np.bincount(np.maximum(number, 1).ravel(), weights=power.ravel(), minlength=last + 1)
    return rings * width, sums[rings]


def spectra_figure(samples: Sequence[Sample]) -> Figure:
    """Power against wavenumber at the first, middle and last step of every sample; four panels a row."""
    columns = min(4, len(samples))
    rows = math.ceil(len(samples) / columns)
    size = (max(2.45 * columns, 3.4), 2.05 * rows + 0.55)  # inches, as is h_pad
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.08))
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, sample in zip(grid, samples, strict=False):
        draw_spectra(axes, sample)
        steps = ", ".join(str(sample.steps[index]) for index in _shown(sample))
        axes.set_title(f"{sample.dataset}\n{sample.channel}, steps {steps}", fontsize=8)
    for axes in grid[len(samples) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("power", fontsize=8)
    handles = [Line2D([], [], color=colour, linewidth=1.5) for colour in COLOURS.values()]
    handles += [Line2D([], [], color=_shaded((0.25, 0.25, 0.25), shade), linewidth=1.5) for shade in SHADES]
    labels = ["truth", "prediction", "error", "first step", "middle", "last, full shade"]
    figure.legend(handles, labels, loc="outside upper center", ncols=6 if columns > 2 else 2, fontsize=8, frameon=False)
    return figure


def draw_spectra(axes: Axes, sample: Sample) -> None:
    """Fill one panel; steps whose prediction is not finite show the truth alone."""
    weakest, strongest = np.inf, 0.0
    shown = _shown(sample)
    for index, shade in zip(shown, SHADES[-len(shown) :], strict=True):
        truth, prediction = sample.truth[index].astype(float), sample.prediction[index].astype(float)
        for name, field in {"truth": truth, "prediction": prediction, "error": prediction - truth}.items():
            if not np.isfinite(field).all():
                continue
            wavenumber, power = radial_spectrum(field, sample.spacing)
            style: dict[str, Any] = {"linewidth": 1.6, "zorder": 1} if name == "truth" else {"linewidth": 1.0}
            axes.plot(wavenumber, power, color=_shaded(COLOURS[name], shade), label=name, **style)
            weakest, strongest = min(weakest, float(power.min())), max(strongest, float(power.max()))
    axes.set_xscale("log")
    axes.set_yscale("log")
    strongest = strongest or 1.0  # a field that is constant has no power
    axes.set_ylim(max(weakest / 2, strongest * 10.0**-DECADES), strongest * 2)
    axes.margins(x=0.02)
    unit = "per unit length" if sample.domain else "per cell"
    axes.set_xlabel(f"wavenumber, rad {unit}", fontsize=7.5, labelpad=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", linewidth=0.3, color="#D0D0D0")
    axes.tick_params(labelsize=7, width=0.5, length=2.5)
    axes.tick_params(which="minor", width=0.3, length=1.5)


def _shown(sample: Sample) -> list[int]:
    """Indices of the first, middle and last step; fewer where there are fewer."""
    last = len(sample.steps) - 1
    return sorted({0, last // 2, last})


def _shaded(colour: tuple[float, float, float], shade: float) -> tuple[float, float, float]:
    """The colour mixed with white: 1 is the colour itself."""
    red, green, blue = (1 - shade * (1 - part) for part in colour)
    return red, green, blue


CELL = 0.52  # inches
LETTER = 0.062  # inches of a name's letter
NEUTRAL = "#DDDDDD"  # the diagonal, and what is not known


@dataclass(frozen=True, eq=False)
class Cosines:
    """Between the gradients of n datasets with respect to the parameters that all of them use."""

    datasets: tuple[str, ...]
    matrix: np.ndarray  # (n, n); NaN where one of the two gradients is zero or not finite
    norms: np.ndarray  # (n,) of the gradients

    def with_others(self) -> dict[str, float]:
        """Each dataset's mean cosine with the others, over those that are known; NaN where none is."""
        others = np.where(np.eye(len(self.datasets), dtype=bool), np.nan, self.matrix)
        return dict(zip(self.datasets, _known_mean(others, axis=1).tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """JSON types; null for what is not finite."""
        matrix = [[_finite(value) for value in row] for row in self.matrix.tolist()]
        return {"datasets": list(self.datasets), "matrix": matrix, "norms": [_finite(v) for v in self.norms.tolist()]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Cosines":
        """Inverse of `to_json`. ValueError, TypeError or KeyError where the document is another."""
        datasets = tuple(document["datasets"])
        matrix, norms = np.array(document["matrix"], np.float64), np.array(document["norms"], np.float64)
        if matrix.shape != (len(datasets), len(datasets)) or norms.shape != (len(datasets),):
            raise ValueError(f"{len(datasets)} datasets, but a matrix {matrix.shape} and norms {norms.shape}")
        return cls(datasets, matrix, norms)


def mean_cosines(measured: Sequence[Cosines]) -> Cosines:
    """The mean of measurements of the same datasets, of each cosine over those in which it is known."""
    (datasets,) = {cosines.datasets for cosines in measured}
    matrix = _known_mean(np.stack([cosines.matrix for cosines in measured]), axis=0)
    return Cosines(datasets, matrix, _known_mean(np.stack([cosines.norms for cosines in measured]), axis=0))


def cosine_figure(cosines: Cosines, title: str) -> Figure:
    """A heat map with the cosines in its cells and the gradients' norms on the diagonal; colours from -1 to 1."""
    count, names = len(cosines.datasets), LETTER * max(map(len, cosines.datasets)) + 0.15
    width, height = names + count * CELL + 0.75, names + count * CELL + 0.5
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    box = (names / width, names / height, count * CELL / width, count * CELL / height)
    axes = figure.add_axes(box)
    shown = np.ma.masked_invalid(np.where(np.eye(count, dtype=bool), np.nan, cosines.matrix))
    image = axes.imshow(shown, cmap=diverging_map(), norm=Normalize(-1, 1))
    axes.set_facecolor(NEUTRAL)
    _write_cells(axes, cosines)
    axes.set_xticks(range(count), cosines.datasets, rotation=90)
    axes.set_yticks(range(count), cosines.datasets)
    axes.tick_params(length=0, labelsize=TEXT_SIZE)
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
    figure.text(0.5, 1 - 0.08 / height, title, ha="center", va="top", fontsize=TEXT_SIZE + 1.5)
    note = "cosine of gradients; on the diagonal their norms"
    figure.text(0.5, 1 - 0.26 / height, note, ha="center", va="top", fontsize=TEXT_SIZE)
    bar = figure.add_axes((box[0] + box[2] + 0.1 / width, box[1], 0.1 / width, box[3]))
    figure.colorbar(image, cax=bar, ticks=[-1, -0.5, 0, 0.5, 1]).outline.set_linewidth(0.4)
    bar.tick_params(labelsize=TEXT_SIZE - 1, width=0.4, length=2)
    return figure


def _write_cells(axes: Axes, cosines: Cosines) -> None:
    for row, values in enumerate(cosines.matrix):
        for column, value in enumerate(values):
            own = row == column
            text = f"{cosines.norms[row]:.2g}" if own else f"{value:+z.2f}" if np.isfinite(value) else "none"
            colour = "white" if not own and abs(value) > 0.6 else "black"
            style = "italic" if own else "normal"
            axes.text(column, row, text, ha="center", va="center", fontsize=TEXT_SIZE, color=colour, style=style)


def _known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the finite values, NaN where there is none."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(axis), known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
