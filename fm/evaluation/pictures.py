"""What pictures of a rollout are drawn from, and the file that keeps it: pictures can be redrawn without the model.

Pictures of rollouts: strips of truth, prediction and error, and one overview of all datasets.

Drawn through matplotlib's objects alone (no pyplot, no global state). x runs to the right and y upwards. A panel has
the shape of the domain, or square cells where the domain is not known. Colour limits are the same in all panels of a
field. Maps are perceptually uniform: viridis for a field of one sign, a diverging map of even lightness steps for a
field of both signs and for errors. What is not finite is grey.

A rollout as a moving picture: truth, prediction and error, an animated GIF.

Fields become indices of one palette of 256 colours, which is made of the strips' colour maps. No colours are sought
frame by frame: nothing flickers, and all frames of a field have the same limits.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.files import UserError, atomic_file
from fm.evaluation.errors import DAMAGED, check_names

FORMAT = 1
Domain = tuple[tuple[float, float], tuple[float, float]]  # (lower, upper) of x, of y


@dataclass(frozen=True)
class Sample:
    """One channel of one rollout at some steps. Fields (n, H, W) in physical units, axis 0 of a field is x."""

    dataset: str
    channel: str
    trajectory: int
    dt: float  # physical time between frames
    steps: tuple[int, ...]  # rollout steps, 1-based and ascending
    truth: np.ndarray
    prediction: np.ndarray
    vrmse: np.ndarray  # (n,) of this channel
    domain: Domain | None = None  # physical extent of the grid; None where the card does not say

    @property
    def extent(self) -> Domain:
        """What the grid covers: the domain, or as many units as cells where there is none."""
        _, across, up = self.truth.shape
        return self.domain or ((0.0, float(across)), (0.0, float(up)))

    @property
    def lengths(self) -> tuple[float, float]:
        """Lengths of the extent along x and y."""
        (left, right), (bottom, top) = self.extent
        return right - left, top - bottom

    @property
    def spacing(self) -> tuple[float, float]:
        """Distances between grid points along x and y."""
        _, across, up = self.truth.shape
        return self.lengths[0] / across, self.lengths[1] / up

    @property
    def extent_text(self) -> str:
        """The extent in words, for captions."""
        if self.domain is None:
            return f"{self.truth.shape[1]} x {self.truth.shape[2]} cells, grid units"
        return ", ".join(f"{axis} {low:.3g}..{high:.3g}" for axis, (low, high) in zip("xy", self.domain, strict=True))

    def at(self, indices: Sequence[int]) -> "Sample":
        """The same rollout at fewer of its steps."""
        chosen = list(indices)
        return dataclasses.replace(
            self,
            steps=tuple(self.steps[index] for index in chosen),
            truth=self.truth[chosen],
            prediction=self.prediction[chosen],
            vrmse=self.vrmse[chosen],
        )


def spread_over(count: int, shown: int) -> list[int]:
    """Indices of `shown` of `count` things, or of all where there are fewer; evenly, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, shown)).round().astype(int)).tolist()


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write a plain .npz, without pickled objects; complete or not at all. UserError when the disk is full."""
    heads = [
        {
            "dataset": sample.dataset,
            "channel": sample.channel,
            "trajectory": sample.trajectory,
            "dt": sample.dt,
            "steps": sample.steps,
            "domain": sample.domain,
        }
        for sample in samples
    ]
    arrays: dict[str, Any] = {"head": np.array(json.dumps({"format": FORMAT, "samples": heads}))}
    for number, sample in enumerate(samples):
        for part in ("truth", "prediction", "vrmse"):
            arrays[f"{number}/{part}"] = getattr(sample, part)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def load_samples(path: Path) -> list[Sample]:
    """Read `save_samples`'s file. UserError where it is missing, damaged, or of another format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        head = json.loads(str(arrays["head"]))
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}, where {FORMAT} is known")
        return [_unpack(arrays, number, facts) for number, facts in enumerate(head["samples"])]
    except FileNotFoundError:
        raise UserError(f"{path}: expected the samples of an evaluation, found none: `fm evaluate` writes it") from None
    except DAMAGED as error:
        raise UserError(f"{path}: expected the samples.npz of an evaluation, got {error!r}; evaluate again") from None


def _unpack(arrays: Mapping[str, np.ndarray], number: int, facts: Mapping[str, Any]) -> Sample:
    truth, prediction, vrmse = (arrays[f"{number}/{part}"] for part in ("truth", "prediction", "vrmse"))
    steps = tuple(facts["steps"])
    if truth.ndim != 3 or prediction.shape != truth.shape or not len(truth) == len(vrmse) == len(steps) > 0:
        raise ValueError(
            f"sample {number}: truth {truth.shape}, prediction {prediction.shape}, vrmse {vrmse.shape} at "
            f"{len(steps)} steps"
        )
    check_names(facts["dataset"], [facts["channel"]])
    domain = facts["domain"]
    return Sample(
        dataset=facts["dataset"],
        channel=facts["channel"],
        trajectory=facts["trajectory"],
        dt=facts["dt"],
        steps=steps,
        truth=truth,
        prediction=prediction,
        vrmse=vrmse,
        domain=domain and ((domain[0][0], domain[0][1]), (domain[1][0], domain[1][1])),
    )


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


FRAME_MILLISECONDS = 120
LAST_MILLISECONDS = 1200  # the end is looked at before the rollout starts again
LEVELS = 51  # colours of a map; odd, so that a diverging map has a middle; more would cost bytes and show nothing
FIELD, ERROR, WHITE = 0, LEVELS, 2 * LEVELS  # where the palette's parts begin: two maps, then white to black
NUM_GREYS = 32
OUTLINE = WHITE + 20  # a grey
HOLE = WHITE + NUM_GREYS  # what is not finite
GAP = 8  # pixels, as are all lengths here
LABELS = 420  # width that two colour bars with their limits need


@dataclass(frozen=True)
class Layout:
    """Where things stand in a frame."""

    size: tuple[int, int]
    panel: tuple[int, int]
    corners: tuple[tuple[int, int], ...]  # upper left, of truth, prediction and error
    line: int  # height of a line of text


def gif(sample: Sample, side: int = 190, labelled: bool = True) -> bytes:
    """An animated GIF of all steps, 8 a second. A panel has the area of a square of `side` pixels.

    Without labels there are the panels and the number of the step alone: for small pictures.
    """
    error = sample.prediction - sample.truth
    scales = (field_scale(sample.truth), error_scale(error, sample.truth))
    layout = _layout(sample, side, labelled)
    still = Image.new("P", layout.size, WHITE)
    palette = _palette(scales[0].cmap, scales[1].cmap)
    still.putpalette(palette)
    if labelled:
        _label(still, layout, scales)
    frames = []
    for index, step in enumerate(sample.steps):
        frame = still.copy()
        shown = ((sample.truth, 0), (sample.prediction, 0), (error, 1))
        for (fields, kind), corner in zip(shown, layout.corners, strict=True):
            frame.paste(_video_panel(fields[index], scales[kind].norm, (FIELD, ERROR)[kind], layout.panel), corner)
        note = f"   t + {step * sample.dt:.3g}   VRMSE {short(sample.vrmse[index])}" if labelled else ""
        _write(frame, (GAP, 2), f"step {step}{note}", layout.line)
        frames.append(frame)
    file = io.BytesIO()
    pauses = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    first, *others = frames
    # With the palette given, Pillow writes it once; else every frame gets its own.
    first.save(file, "GIF", save_all=True, append_images=others, duration=pauses, loop=0, palette=palette)
    return file.getvalue()


def _layout(sample: Sample, side: int, labelled: bool) -> Layout:
    """A line with the step; the panels side by side, below each other where the domain is wide; the colour bars."""
    across, up = sample.lengths
    width, height = round(side * (across / up) ** 0.5), round(side * (up / across) ** 0.5)
    line = 18 if labelled else 15
    head, name = line + 4, line if labelled else 0  # the step; a name above each panel
    columns, rows = (1, 3) if is_wide(sample) else (3, 1)
    corners = tuple(
        (GAP + column * (width + GAP), head + name + row * (name + height + GAP))
        for row in range(rows)
        for column in range(columns)
    )
    total_width = GAP + columns * (width + GAP)
    total_height = head + rows * (name + height + GAP)
    if labelled:
        total_width, total_height = max(total_width, LABELS), total_height + line + 4
    return Layout((total_width, total_height), (width, height), corners, line)


def _video_panel(field: np.ndarray, norm: Normalize, start: int, size: tuple[int, int]) -> Image.Image:
    """Palette indices of a field (H, W), enlarged smoothly: x to the right, y upwards."""
    upright = np.flip(field.T, axis=0)
    holes = ~np.isfinite(upright)
    unit = np.clip(norm(np.where(holes, 0, upright)), 0, 1).astype(np.float32)
    large = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BICUBIC))
    indices = start + np.clip(np.rint(large * (LEVELS - 1)), 0, LEVELS - 1).astype(np.uint8)
    torn = Image.fromarray(holes.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return Image.fromarray(np.where(np.asarray(torn) > 0, np.uint8(HOLE), indices), "P")


def _label(frame: Image.Image, layout: Layout, scales: tuple[Scale, Scale]) -> None:
    """The names and outlines of the panels, and the colour bars with their limits."""
    for name, (x, y) in zip(ROWS, layout.corners, strict=True):
        frame.paste(OUTLINE, (x - 1, y - 1, x + layout.panel[0] + 1, y + layout.panel[1] + 1))
        _write(frame, (x, y - layout.line - 1), name, layout.line)
    half = (layout.size[0] - GAP) // 2
    top = layout.size[1] - layout.line - 2
    for name, scale, start, x in (("field", scales[0], FIELD, GAP), ("error", scales[1], ERROR, GAP + half)):
        low, high = (f"{limit:.3g}" for limit in (scale.norm.vmin, scale.norm.vmax))
        left = x + _write(frame, (x, top), f"{name}  {low}", layout.line) + 6
        right = x + half - GAP - 6 - round(_font(layout.line).getlength(high))
        ramp = np.linspace(start, start + LEVELS - 1, right - left).round().astype(np.uint8)
        frame.paste(Image.fromarray(np.tile(ramp, (8, 1)), "P"), (left, top + 5))
        _write(frame, (right + 6, top), high, layout.line)


def _write(frame: Image.Image, corner: tuple[int, int], text: str, line: int) -> int:
    """Write a line of smooth text in the palette's shades of grey; returns its width."""
    font = _font(line)
    width = round(font.getlength(text))
    sheet = Image.new("L", (width, line))
    ImageDraw.Draw(sheet).text((0, line - 4), text, fill=255, font=font, anchor="ls")
    shades = np.rint(np.asarray(sheet) * ((NUM_GREYS - 1) / 255)).astype(np.uint8) + np.uint8(WHITE)
    frame.paste(Image.fromarray(shades, "P"), corner)
    return width


@functools.cache
def _font(line: int) -> ImageFont.FreeTypeFont:
    """The font of the other pictures; matplotlib brings it along."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", line - 6)


def _palette(field: Colormap, error: Colormap) -> bytes:
    """Red, green and blue of the 256 colours in turn."""
    t = np.linspace(0, 1, LEVELS)
    greys = np.repeat(np.linspace(1, 0, NUM_GREYS)[:, None], 3, axis=1)
    colours = np.concatenate([field(t)[:, :3], error(t)[:, :3], greys, [to_rgb(NOT_FINITE)]])
    return np.rint(colours * 255).astype(np.uint8).tobytes().ljust(768, b"\0")
