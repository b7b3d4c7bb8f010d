"""Pictures of rollouts: strips of truth, prediction and error, and one overview of all datasets.

Drawn through matplotlib's objects alone (no pyplot, no global state). x runs to the right and y upwards. A panel has
the shape of the domain, or square cells where the domain is not known. Colour limits are the same in all panels of a
field. Maps are perceptually uniform: viridis for a field of one sign, a diverging map of even lightness steps for a
field of both signs and for errors. What is not finite is grey.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from fm.report.sample import Domain, Sample, spread_over

DIVERGING = "blue_red_uniform"
ROWS = ("truth", "prediction", "error")
SHOWN_STEPS = 6
NOT_FINITE = "#B0B0B0"
TEXT_SIZE = 7.5  # points
_GAP = 0.06  # inches between panels, as are all lengths below


@dataclass(frozen=True)
class Scale:
    """Colours of one field: map and limits."""

    cmap: Colormap
    norm: Normalize


class Sheet:
    """A figure measured in inches from its lower left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        FigureCanvasAgg(self.figure)
        self.size = (width, height)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        across, up = self.size
        return self.figure.add_axes((x / across, y / up, width / across, height / up))

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self.size[0], y / self.size[1], text, **{"fontsize": TEXT_SIZE, **style})

    def title(self, x: float, sample: Sample) -> None:
        """What is shown, and what the panels cover, in the upper left corner."""
        name = f"{sample.dataset}, {sample.channel}, trajectory {sample.trajectory}"
        self.text(x, self.size[1] - 0.06, name, va="top", fontsize=TEXT_SIZE + 1.5)
        self.text(x, self.size[1] - 0.23, sample.extent_text, va="top", color="#595959")

    def compass(self) -> None:
        """Arrows of x and y in the lower left corner."""
        for name, x, y in (("x", 0.32, 0.08), ("y", 0.12, 0.28)):
            note = Annotation(
                name,
                xy=(0.12 / self.size[0], 0.08 / self.size[1]),
                xytext=(x / self.size[0], y / self.size[1]),
                xycoords="figure fraction",
                arrowprops={"arrowstyle": "<-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 5},
                horizontalalignment="center",
                verticalalignment="center",
                fontsize=TEXT_SIZE - 1,
            )
            self.figure.add_artist(note)

    def colour_bar(self, image: AxesImage, box: tuple[float, float, float, float]) -> None:
        axes = self.axes(*box)
        bar = self.figure.colorbar(
            image,
            cax=axes,
            orientation="horizontal" if box[2] > box[3] else "vertical",
            extend="both",
            extendfrac=0.1 / max(box[2:]),
            ticks=MaxNLocator(5, symmetric=image.get_cmap().name == DIVERGING),
            format=_TickFormat(),
        )
        bar.outline.set_linewidth(0.4)
        axes.tick_params(labelsize=TEXT_SIZE - 1, width=0.4, length=2)
        for label in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
            label.set_fontsize(TEXT_SIZE - 1)


class _TickFormat(ScalarFormatter):
    """Plain numbers, with a common power of ten where they are very small or large."""

    def __init__(self) -> None:
        super().__init__(useMathText=True)
        self.set_powerlimits((-3, 4))


def diverging_map() -> Colormap:
    """Blue, near-white, red; OKLab lightness falls in equal steps to both sides (Ottosson 2020), inside sRGB."""
    t = np.linspace(-1, 1, 257)
    hue, chroma = np.radians(np.where(t < 0, 260, 29)), 0.145 * np.abs(t)
    lab = np.stack([0.97 - 0.56 * np.abs(t), chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    cone = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
    )
    red = [4.0767416621, -3.3077115913, 0.2309699292]
    green = [-1.2684380046, 2.6097574011, -0.3413193965]
    blue = [-0.0041960863, -0.7034186147, 1.707614701]
    linear = np.clip((lab @ cone.T) ** 3 @ np.array([red, green, blue]).T, 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return ListedColormap(rgb, name=DIVERGING)


def field_scale(truth: np.ndarray) -> Scale:
    """Limits at the truth's 0.2 and 99.8 percentiles; symmetric and diverging where both signs weigh."""
    low, high = (float(quantile) for quantile in np.percentile(truth, [0.2, 99.8]))
    if low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
        bound = max(-low, high)
        return Scale(diverging_map(), Normalize(-bound, bound))
    span = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-30)
    return Scale(colormaps["viridis"], Normalize(low, low + span))


def error_scale(error: np.ndarray, truth: np.ndarray) -> Scale:
    """Symmetric limits at the 99.5th percentile of the error's size, at most the truth's own range."""
    size = np.abs(error[np.isfinite(error)])
    bound = min(float(np.percentile(size, 99.5)) if size.size else np.inf, float(np.ptp(truth)))
    return Scale(diverging_map(), Normalize(-max(bound, 1e-30), max(bound, 1e-30)))


def strip(sample: Sample) -> Figure:
    """Truth, prediction and error (prediction - truth) at SHOWN_STEPS; wide domains stack the steps downwards."""
    shown = sample.at(spread_over(len(sample.steps), SHOWN_STEPS))
    return _strip_down(shown) if is_wide(shown) else _strip_across(shown)


def is_wide(sample: Sample) -> bool:
    """Whether the domain is so wide that its pictures look better below each other than side by side."""
    across, up = sample.lengths
    return across >= 2 * up


def _strip_across(sample: Sample) -> Figure:
    """Rows truth, prediction, error; one column a step; colour bars on the right."""
    count, (across, up) = len(sample.steps), sample.lengths
    width = min(1.2, 2.0 * across / up)
    height = width * up / across
    left, bottom = 0.45, 0.42
    right = left + count * (width + _GAP)
    sheet = Sheet(right + 0.75, bottom + 3 * (height + _GAP) + 0.66)
    axes = [
        [
            sheet.axes(left + column * (width + _GAP), bottom + (2 - row) * (height + _GAP), width, height)
            for column in range(count)
        ]
        for row in range(3)
    ]
    field, error = _draw(axes, sample, range(count))
    for column, step in enumerate(sample.steps):
        axes[0][column].set_title(f"step {step}\nt + {step * sample.dt:.3g}", fontsize=TEXT_SIZE, pad=3)
        note = f"VRMSE{' ' if width > 0.9 else chr(10)}{short(sample.vrmse[column])}"
        axes[2][column].set_xlabel(note, fontsize=TEXT_SIZE, labelpad=3)
    for row, name in enumerate(ROWS):
        axes[row][0].set_ylabel(name, fontsize=TEXT_SIZE + 1, labelpad=4)
    sheet.colour_bar(field, (right + 0.04, bottom + height + _GAP, 0.09, 2 * height + _GAP))
    sheet.colour_bar(error, (right + 0.04, bottom, 0.09, height))
    sheet.title(left, sample)
    sheet.compass()
    return sheet.figure


def _strip_down(sample: Sample) -> Figure:
    """Columns truth, prediction, error; one row a step; colour bars below."""
    count, (across, up) = len(sample.steps), sample.lengths
    width = 2.35
    height = width * up / across
    left, bottom = 0.62, 0.36
    sheet = Sheet(left + 3 * (width + _GAP) + 0.5, bottom + count * (height + _GAP) + 0.52)
    axes = [
        [
            sheet.axes(left + row * (width + _GAP), bottom + (count - 1 - n) * (height + _GAP), width, height)
            for n in range(count)
        ]
        for row in range(3)
    ]
    field, error = _draw(axes, sample, range(count))
    for n, step in enumerate(sample.steps):
        label = f"step {step}\nt + {step * sample.dt:.3g}"
        axes[0][n].set_ylabel(label, fontsize=TEXT_SIZE, rotation=0, ha="right", va="center", labelpad=5)
        note = f"VRMSE\n{short(sample.vrmse[n])}"
        axes[2][n].text(1.03, 0.5, note, fontsize=TEXT_SIZE, va="center", transform=axes[2][n].transAxes)
    for row, name in enumerate(ROWS):
        axes[row][0].set_title(name, fontsize=TEXT_SIZE + 1, pad=3)
    sheet.colour_bar(field, (left + 0.25 * width, bottom - 0.13, 1.5 * width + _GAP, 0.08))
    sheet.colour_bar(error, (left + 2 * (width + _GAP) + 0.1 * width, bottom - 0.13, 0.8 * width, 0.08))
    sheet.title(left, sample)
    sheet.compass()
    return sheet.figure


def overview(samples: Sequence[Sample]) -> Figure:
    """Truth, prediction and error of every dataset at the middle of its shown steps; one column a dataset."""
    cell, left, bottom = 1.25, 0.28, 0.26
    sheet = Sheet(left + len(samples) * (cell + _GAP), bottom + 3 * (cell + _GAP) + 0.5)
    for column, sample in enumerate(samples):
        x, index = left + column * (cell + _GAP), (len(sample.steps) - 1) // 2
        axes = [[sheet.axes(x, bottom + (2 - row) * (cell + _GAP), cell, cell)] for row in range(3)]
        _draw(axes, sample, [index])
        head = f"{_wrapped(sample.dataset)}\n{sample.channel}, step {sample.steps[index]}"
        sheet.text(x + cell / 2, bottom + 3 * (cell + _GAP) + 0.02, head, ha="center", va="bottom")
        sheet.text(x + cell / 2, 0.08, f"VRMSE {short(sample.vrmse[index])}", ha="center", va="bottom")
    for row, name in enumerate(ROWS):
        y = bottom + (2 - row) * (cell + _GAP) + cell / 2
        sheet.text(0.13, y, name, rotation=90, ha="center", va="center", fontsize=TEXT_SIZE + 1)
    return sheet.figure


def _draw(axes: Sequence[Sequence[Axes]], sample: Sample, indices: Sequence[int]) -> tuple[AxesImage, AxesImage]:
    """Fill axes [row][n] with the fields at `indices`; the images that carry the two colour scales."""
    error = sample.prediction - sample.truth
    scales = (field_scale(sample.truth), field_scale(sample.truth), error_scale(error, sample.truth))
    for panels, fields, scale in zip(axes, (sample.truth, sample.prediction, error), scales, strict=True):
        for panel, index in zip(panels, indices, strict=True):
            _panel(panel, fields[index], scale, sample.extent)
    return axes[0][0].images[0], axes[2][0].images[0]


def _panel(axes: Axes, field: np.ndarray, scale: Scale, extent: Domain) -> None:
    """One field (H, W), axis 0 = x to the right, axis 1 = y upwards."""
    shown = np.ma.masked_invalid(field.T)
    # One kernel for all panels, enlarged or reduced: the default changes with the size in pixels.
    axes.imshow(
        shown,
        origin="lower",
        cmap=scale.cmap,
        norm=scale.norm,
        interpolation="hanning",
        extent=(*extent[0], *extent[1]),
    )
    axes.set_facecolor(NOT_FINITE)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
    if not np.isfinite(field).all():
        axes.text(0.5, 0.5, "not finite", ha="center", va="center", fontsize=TEXT_SIZE, transform=axes.transAxes)


def _wrapped(name: str) -> str:
    """A long name on two lines, broken at the underscore nearest its middle."""
    breaks = [index + 1 for index, letter in enumerate(name) if letter == "_"]
    if len(name) < 20 or not breaks:
        return name
    middle = min(breaks, key=lambda index: abs(index - len(name) / 2))
    return f"{name[:middle]}\n{name[middle:]}"


def short(value: float) -> str:
    """A VRMSE in a picture."""
    return f"{value:.3g}" if np.isfinite(value) else "not finite"
