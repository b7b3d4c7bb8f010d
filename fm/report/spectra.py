"""Power spectra of fields: which scales a prediction has, and which it gets wrong.

The wavenumber k = 2 pi / wavelength is in radians per unit of length. Modes of all directions within one ring of k are
added up, so that the power of a field without finer scales sums to its variance. No window is applied: where a field is
not periodic, the jump between its two ends adds a floor that falls as k^-2, to truth and prediction alike.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from fm.report.sample import Sample

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
