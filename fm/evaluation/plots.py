"""Plots of curves: how errors grow along a rollout, power spectra of fields, cosines between gradients.

The palette and the figure helpers at the top are those of all plots of fm. Figures are matplotlib objects: nothing
imports pyplot, so there is no global state and no display.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from PIL import Image

from fm.evaluation.cosines import Cosines
from fm.evaluation.errors import DatasetErrors, Errors
from fm.evaluation.protocol import Protocol
from fm.evaluation.samples import Sample

# Curves take these three colors in turn: color-blind readers can tell them apart (Okabe and Ito 2008). In plots of one
# model the model is blue, its error or persistence orange.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
INK = "#222222"  # text and reference lines
TRUTH = "#404040"
GRAY = "#595959"  # secondary lines and remarks
LIGHT_GRAY = "#D0D0D0"  # grids
SHADE = "#F0F0F0"  # areas behind curves
NOT_FINITE = "#B0B0B0"
FAILURE = "#CC0000"
DIVERGING = "blue_red_uniform"
TEXT_SIZE = 7.5  # points
TITLE_LETTERS = 34  # of a panel's title in one line
DOTTED = (0, (1, 1.2))

LINES: dict[str, dict[str, Any]] = {
    "model": {"color": BLUE, "linewidth": 1.5},
    "persistence": {"color": ORANGE, "linewidth": 1.1, "linestyle": (0, (4, 1.5))},
    "mean_field": {"color": GRAY, "linewidth": 0.9, "linestyle": DOTTED},
    "linear_stencil": {"color": GREEN, "linewidth": 1.0, "linestyle": (0, (3, 1, 1, 1))},
}


def diverging_map() -> Colormap:
    """Return a map from blue over near-white to red.

    The OKLab lightness falls in equal steps to both sides (Ottosson 2020, "A perceptual color space for image
    processing"); all colors are inside sRGB.
    """
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


def panel_figure(
    count: int, panel_height: float, labels: tuple[str, str], least_width: float = 3.4, h_pad: float | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, at most four in a row, and their axes.

    `labels` are those of the x axis, below the lowest panels, and of the y axis, left of the first ones. The size is in
    inches and leaves room for titles; `legend_above` adds its own.
    """
    columns = max(1, min(4, count))
    rows = max(1, math.ceil(count / columns))
    size = (max(2.45 * columns, least_width), panel_height * rows + 0.15)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=h_pad))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count:columns]:
        axes.set_ylabel(labels[1], fontsize=8)
    for axes in grid[max(count - columns, 0) : count]:
        axes.set_xlabel(labels[0], fontsize=8)
    return figure, grid[:count]


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend above the panels, in as few rows as the figure's width allows, and make the figure higher by it.

    A figure that is too narrow for one column is made wider, so no label is cut and no panel becomes lower.
    """
    if not handles:
        return
    width, height = figure.get_size_inches()
    for rows in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / rows)
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        box = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        if box.width <= width * figure.dpi or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(max(width, box.width / figure.dpi), height + box.height / figure.dpi)


def wrapped(name: str, most: int) -> str:
    """Return a name that is longer than `most` letters in two lines, broken at the underscore nearest to its middle."""
    breaks = [index + 1 for index, letter in enumerate(name) if letter == "_"]
    if len(name) <= most or not breaks:
        return name
    middle = min(breaks, key=lambda index: abs(index - len(name) / 2))
    return f"{name[:middle]}\n{name[middle:]}"


def style_panel(axes: Axes) -> None:
    """Draw thin grid lines and small tick labels."""
    axes.grid(True, which="major", linewidth=0.3, color=LIGHT_GRAY)
    axes.tick_params(labelsize=7, width=0.5, length=2.5)


def log_ticks(axis: Any, subs: Sequence[float] = (1, 3)) -> None:
    """Label an axis of log scale with plain numbers at the multiples `subs` of the powers of ten."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def without_formulas(figure: Figure) -> None:
    """Have the figure draw names as they are: a dollar sign in one begins no formula."""
    for text in figure.findobj(Text):
        if text.get_text():  # those of ticks come later, and may be formulas
            text.set_parse_math(False)


def rasterize(figure: Figure, dpi: int) -> Image.Image:
    """Return the figure as an RGB image, with names as they are."""
    without_formulas(figure)
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return the image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


QUANTILES = (0.1, 0.9)


def growth_curve(errors: Errors, predictor: str, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the median and the two QUANTILES over trajectories of the VRMSE (mean over channels), each (S,).

    A step is averaged over the trajectories that have it. A trajectory that is not finite counts as +inf, so it moves
    the quantiles.
    """
    frames = errors.vrmse(predictor, eps).mean(axis=-1)  # (R, S)
    columns = [frames[errors.present[:, step], step] for step in range(frames.shape[1])]
    # Without interpolation an infinite value stays a rank and never turns into a NaN.
    low, high = ([np.quantile(c, q, method="nearest") for c in columns] for q in QUANTILES)
    return np.array([np.median(c) for c in columns]), np.array(low), np.array(high)


def growth_figure(datasets: Mapping[str, DatasetErrors], protocol: Protocol) -> Figure:
    """Return the error growth of every dataset, a panel each; every other window of the protocol is shaded."""
    figure, panels = panel_figure(len(datasets), 1.95, ("rollout step", "VRMSE"))
    for axes, (name, errors) in zip(panels, datasets.items(), strict=True):
        _draw_growth(axes, errors, protocol)
        axes.set_title(wrapped(name, TITLE_LETTERS), fontsize=8)
    panel = next((axes for axes, errors in zip(panels, datasets.values(), strict=True) if errors.stencil), panels[0])
    handles, _ = panel.get_legend_handles_labels()
    labels = ["model, median", "10% to 90% of trajectories", "persistence, median", "mean field"]
    labels += ["linear stencil, median"] if len(handles) > len(labels) else []
    handles.append(Patch(color=SHADE, linewidth=0))
    labels.append(f"{', '.join(list(protocol.windows)[::2])} ({protocol.name} v{protocol.version})")
    legend_above(figure, handles, labels)
    return figure


def _draw_growth(axes: Axes, errors: DatasetErrors, protocol: Protocol) -> None:
    rollout = errors.rollout.until(protocol.max_steps)  # the file may hold more steps than the protocol scores
    horizon = rollout.variance.shape[1]
    steps = np.arange(1, horizon + 1)
    shown = [name for name in LINES if name != "linear_stencil" or errors.stencil is not None]
    curves = {name: growth_curve(rollout, name, protocol.eps) for name in shown}
    bottom, top = _limits(curves)
    for name, (median, low, high) in curves.items():
        axes.plot(steps, np.where(np.isfinite(median), median, np.nan), label=name, **LINES[name])
        if name == "model":
            edges = np.minimum(low, top), np.minimum(high, top)
            axes.fill_between(steps, *edges, color=LINES[name]["color"], alpha=0.2, linewidth=0, label="spread")
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(1, max(horizon, 2))
    log_ticks(axes.yaxis)
    style_panel(axes)
    for window in list(protocol.windows)[::2]:
        if covered := protocol.covered(window, rollout.steps.tolist()):
            axes.axvspan(covered[0] - 0.5, covered[1] + 0.5, color=SHADE, linewidth=0, zorder=0)
    failures = rollout.first_failures()
    failures = failures[failures > 0]
    if failures.size:  # a cross at the step where a trajectory stopped being finite
        heights, place = np.full(failures.shape, 0.94), axes.get_xaxis_transform()
        axes.plot(failures, heights, "x", color=FAILURE, markersize=5, transform=place)
        note = f"{failures.size} of {len(rollout.steps)} diverged"
        axes.text(0.97, 0.05, note, fontsize=7, color=FAILURE, ha="right", transform=axes.transAxes)


def _limits(curves: Mapping[str, tuple[np.ndarray, ...]]) -> tuple[float, float]:
    """Limits of the log axis. Persistence may return to 0 in a periodic flow: only its first step counts below."""
    values = np.concatenate([*curves["model"], curves["persistence"][0][:1]])
    lower = values[np.isfinite(values) & (values > 0)]
    values = np.concatenate([curve for three in curves.values() for curve in three])
    return lower.min(initial=0.5) / 1.3, values[np.isfinite(values)].max(initial=1.0) * 1.3


SPECTRA = {"truth": TRUTH, "prediction": BLUE, "error": ORANGE}
SHADES = (0.3, 0.6, 1.0)  # of the first, the middle and the last step: from light to the full color
DECADES = 9  # below the strongest ring; weaker power is rounding


def radial_spectrum(values: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Return wavenumbers (n,) and power (n,) of a field (H, W) whose points are `spacing` apart along H and W.

    The wavenumber k = 2 pi / wavelength is in radians per unit of length. The modes of all directions within one ring
    of k are added up, so the power of a field without finer scales sums to its variance. Rings are as wide as the
    coarser of the two grids of wavenumbers and end at the smaller Nyquist wavenumber. No window is applied: where a
    field is not periodic, the jump between its two ends adds a floor that falls as k^-2, to truth and prediction alike.
    """
    power = np.abs(np.fft.fft2(values - values.mean()) / values.size) ** 2
    axes = list(zip(values.shape, spacing, strict=True))
    along = [2 * np.pi * np.fft.fftfreq(count, step) for count, step in axes]
    width = max(2 * np.pi / (count * step) for count, step in axes)
    number = np.rint(np.hypot(along[0][:, None], along[1][None, :]) / width).astype(int)
    last = int(min(np.abs(k).max() for k in along) / width + 1e-9)
    rings = np.arange(1, last + 1)
    # The mean was subtracted. Modes of a long axis that are below the first ring are counted in it.
    sums = np.bincount(np.maximum(number, 1).ravel(), weights=power.ravel(), minlength=last + 1)
    return rings * width, sums[rings]


def spectra_figure(samples: Sequence[Sample]) -> Figure:
    """Return power against wavenumber at the first, middle and last step of every sample, a panel each."""
    figure, panels = panel_figure(len(samples), 2.05, ("", "power"), h_pad=0.08)
    for axes, sample in zip(panels, samples, strict=True):
        draw_spectra(axes, sample)
        steps = ", ".join(str(sample.steps[index]) for index in _first_middle_last(sample))
        axes.set_title(f"{wrapped(sample.dataset, TITLE_LETTERS)}\n{sample.channel}, steps {steps}", fontsize=8)
    handles = [Line2D([], [], color=color, linewidth=1.5) for color in SPECTRA.values()]
    handles += [Line2D([], [], color=_lightened(TRUTH, shade), linewidth=1.5) for shade in SHADES]
    legend_above(figure, handles, ["truth", "prediction", "error", "first step", "middle step", "last step"])
    return figure


def draw_spectra(axes: Axes, sample: Sample) -> None:
    """Draw the spectra of one sample; of a step whose prediction is not finite only the truth's."""
    weakest, strongest = np.inf, 0.0
    shown = _first_middle_last(sample)
    for index, shade in zip(shown, SHADES[-len(shown) :], strict=True):
        truth, prediction = sample.truth[index].astype(float), sample.prediction[index].astype(float)
        for name, field in {"truth": truth, "prediction": prediction, "error": prediction - truth}.items():
            if not np.isfinite(field).all():
                continue
            wavenumber, power = radial_spectrum(field, sample.spacing)
            style: dict[str, Any] = {"linewidth": 1.6, "zorder": 1} if name == "truth" else {"linewidth": 1.0}
            axes.plot(wavenumber, power, color=_lightened(SPECTRA[name], shade), label=name, **style)
            weakest, strongest = min(weakest, float(power.min())), max(strongest, float(power.max()))
    axes.set_xscale("log")
    axes.set_yscale("log")
    strongest = strongest or 1.0  # a constant field has no power
    axes.set_ylim(max(weakest / 2, strongest * 10.0**-DECADES), strongest * 2)
    axes.margins(x=0.02)
    unit = "per unit length" if sample.domain else "per cell"
    axes.set_xlabel(f"wavenumber, rad {unit}", fontsize=7.5, labelpad=1)
    log_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())
    style_panel(axes)
    axes.tick_params(which="minor", width=0.3, length=1.5)


def _first_middle_last(sample: Sample) -> list[int]:
    last = len(sample.steps) - 1
    return sorted({0, last // 2, last})


def _lightened(color: str, shade: float) -> tuple[float, float, float]:
    """Mix a color with white; shade 1 is the color itself."""
    red, green, blue = (1 - shade * (1 - part) for part in to_rgb(color))
    return red, green, blue


CELL = 0.52  # inches
LETTER = 0.062  # inches of a name's letter


def cosine_figure(cosines: Cosines, title: str) -> Figure:
    """Return a heat map with the cosines in its cells and the gradients' norms on the diagonal; colors from -1 to 1."""
    count, names = len(cosines.datasets), LETTER * max(map(len, cosines.datasets)) + 0.15
    width, height = names + count * CELL + 0.75, names + count * CELL + 0.5
    figure = Figure(figsize=(width, height))
    box = (names / width, names / height, count * CELL / width, count * CELL / height)
    axes = figure.add_axes(box)
    shown = np.ma.masked_invalid(np.where(np.eye(count, dtype=bool), np.nan, cosines.matrix))
    image = axes.imshow(shown, cmap=diverging_map(), norm=Normalize(-1, 1))
    axes.set_facecolor("#DDDDDD")  # the diagonal, and cosines that are not known
    for (row, column), value in np.ndenumerate(cosines.matrix):
        own = row == column
        text = f"{cosines.norms[row]:.2g}" if own else f"{value:+z.2f}" if np.isfinite(value) else "none"
        color = "white" if not own and abs(value) > 0.6 else "black"
        style = "italic" if own else "normal"
        axes.text(column, row, text, ha="center", va="center", fontsize=TEXT_SIZE, color=color, style=style)
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
