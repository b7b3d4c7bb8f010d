"""Pictures of rollouts: strips of truth, prediction and error, an overview of all datasets, and animated GIFs.

x runs to the right and y upwards. A panel has the shape of the domain, or square cells if the domain is not known. The
color limits are the same in all panels of a field. Color maps are perceptually uniform: viridis for a field of one
sign, a diverging map for a field of both signs and for errors. Values that are not finite are gray. The frames of a GIF
share one palette of 256 colors, made of the color maps of the strips, so nothing flickers.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.registry import Domain
from fm.evaluation.plots import DIVERGING, GRAY, NOT_FINITE, TEXT_SIZE, diverging_map, encode, wrapped
from fm.evaluation.samples import Sample, evenly_spaced

ROWS = ("truth", "prediction", "error")
SHOWN_STEPS = 6
PANEL_GAP = 0.06  # inches, as are all lengths of the still pictures


@dataclass(frozen=True)
class ColorScale:
    """Colors of one field: map and limits."""

    cmap: Colormap
    norm: Normalize


def field_scale(truth: np.ndarray) -> ColorScale:
    """Return limits at the 0.2 and 99.8 percentiles; they are symmetric if both signs have a fifth of the range."""
    low, high = (float(quantile) for quantile in np.percentile(truth, [0.2, 99.8]))
    if low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
        bound = max(-low, high)
        return ColorScale(diverging_map(), Normalize(-bound, bound))
    span = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-30)
    return ColorScale(colormaps["viridis"], Normalize(low, low + span))


def error_scale(error: np.ndarray, truth: np.ndarray) -> ColorScale:
    """Return symmetric limits at the 99.5th percentile of the error's size, at most the truth's own range."""
    size = np.abs(error[np.isfinite(error)])
    bound = min(float(np.percentile(size, 99.5)) if size.size else np.inf, float(np.ptp(truth)))
    return ColorScale(diverging_map(), Normalize(-max(bound, 1e-30), max(bound, 1e-30)))


class Sheet:
    """A figure whose parts are placed in inches from its lower left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        self.size = (width, height)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Add a panel."""
        return self.figure.add_axes((x / self.size[0], y / self.size[1], width / self.size[0], height / self.size[1]))

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Add a text."""
        self.figure.text(x / self.size[0], y / self.size[1], text, **{"fontsize": TEXT_SIZE, **style})

    def annotate(self, x: float, sample: Sample) -> None:
        """Add the sample's name and extent in the upper left corner, and the axes' directions in the lower left."""
        name = f"{sample.dataset}, {sample.channel}, trajectory {sample.trajectory}"
        self.text(x, self.size[1] - 0.06, name, va="top", fontsize=TEXT_SIZE + 1.5)
        self.text(x, self.size[1] - 0.23, sample.extent_text, va="top", color=GRAY)
        self.text(0.07, 0.05, "y \N{UPWARDS ARROW}\nx \N{RIGHTWARDS ARROW}", va="bottom", fontsize=TEXT_SIZE - 1)

    def color_bar(self, image: AxesImage, box: tuple[float, float, float, float]) -> Axes:
        """Add the color bar of an image, and return its axes."""
        axes = self.axes(*box)
        numbers = ScalarFormatter(useMathText=True)
        numbers.set_powerlimits((-3, 4))  # a common power of ten for very small and large numbers
        bar = self.figure.colorbar(
            image,
            cax=axes,
            orientation="horizontal" if box[2] > box[3] else "vertical",
            extend="both",
            extendfrac=0.1 / max(box[2:]),
            ticks=MaxNLocator(5, symmetric=image.get_cmap().name == DIVERGING),
            format=numbers,
        )
        bar.outline.set_linewidth(0.4)
        axes.tick_params(labelsize=TEXT_SIZE - 1, width=0.4, length=2)
        for label in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
            label.set_fontsize(TEXT_SIZE - 1)
        return axes


def strip(sample: Sample) -> Figure:
    """Return truth, prediction and error (prediction - truth) at SHOWN_STEPS steps; wide domains stack the steps."""
    shown = sample.at(evenly_spaced(len(sample.steps), SHOWN_STEPS))
    return _vertical_strip(shown) if is_wide(shown) else _horizontal_strip(shown)


def is_wide(sample: Sample) -> bool:
    """Return whether the domain is at least twice as wide as high; its pictures are then stacked downwards."""
    width, height = sample.lengths
    return width >= 2 * height


def _horizontal_strip(sample: Sample) -> Figure:
    """Rows truth, prediction, error; one column a step; color bars on the right."""
    count, aspect = len(sample.steps), sample.lengths[1] / sample.lengths[0]
    width = min(1.2, 2.0 / aspect)
    height = width * aspect
    x_step, y_step = width + PANEL_GAP, height + PANEL_GAP
    left, bottom = 0.45, 0.42
    right = left + count * x_step
    sheet = Sheet(right + 0.75, bottom + 3 * y_step + 0.66)
    axes = [
        [sheet.axes(left + n * x_step, bottom + (2 - row) * y_step, width, height) for n in range(count)]
        for row in range(3)
    ]
    field, error = draw_fields(axes, sample, range(count))
    for n, step in enumerate(sample.steps):
        axes[0][n].set_title(f"step {step}\n{sample.time_text(step)}", fontsize=TEXT_SIZE, pad=3)
        note = f"VRMSE{' ' if width > 0.9 else chr(10)}{format_vrmse(sample.vrmse[n])}"
        axes[2][n].set_xlabel(note, fontsize=TEXT_SIZE, labelpad=3)
    for row, name in enumerate(ROWS):
        axes[row][0].set_ylabel(name, fontsize=TEXT_SIZE + 1, labelpad=4)
    sheet.color_bar(field, (right + 0.04, bottom + y_step, 0.09, 2 * height + PANEL_GAP))
    sheet.color_bar(error, (right + 0.04, bottom, 0.09, height))
    sheet.annotate(left, sample)
    return sheet.figure


def _vertical_strip(sample: Sample) -> Figure:
    """Columns truth, prediction, error; one row a step; color bars below."""
    count, width = len(sample.steps), 2.35
    height = width * sample.lengths[1] / sample.lengths[0]
    x_step, y_step = width + PANEL_GAP, height + PANEL_GAP
    left, bottom = 0.62, 0.36
    sheet = Sheet(left + 3 * x_step + 0.5, bottom + count * y_step + 0.52)
    axes = [
        [sheet.axes(left + column * x_step, bottom + (count - 1 - n) * y_step, width, height) for n in range(count)]
        for column in range(3)
    ]
    field, error = draw_fields(axes, sample, range(count))
    for n, step in enumerate(sample.steps):
        label = f"step {step}\n{sample.time_text(step)}"
        axes[0][n].set_ylabel(label, fontsize=TEXT_SIZE, rotation=0, ha="right", va="center", labelpad=5)
        note = f"VRMSE\n{format_vrmse(sample.vrmse[n])}"
        axes[2][n].text(1.03, 0.5, note, fontsize=TEXT_SIZE, va="center", transform=axes[2][n].transAxes)
    for column, name in enumerate(ROWS):
        axes[column][0].set_title(name, fontsize=TEXT_SIZE + 1, pad=3)
    sheet.color_bar(field, (left + 0.25 * width, bottom - 0.13, 1.5 * width + PANEL_GAP, 0.08))
    sheet.color_bar(error, (left + 2 * x_step + 0.1 * width, bottom - 0.13, 0.8 * width, 0.08))
    sheet.annotate(left, sample)
    return sheet.figure


def overview(samples: Sequence[Sample]) -> Figure:
    """Return truth, prediction and error of every dataset at the middle of its shown steps; one column a dataset."""
    cell, left, bottom = 1.25, 0.28, 0.26
    pitch = cell + PANEL_GAP
    top = bottom + 3 * pitch
    sheet = Sheet(left + len(samples) * pitch, top + 0.5)
    for column, sample in enumerate(samples):
        x, index = left + column * pitch, (len(sample.steps) - 1) // 2
        axes = [[sheet.axes(x, bottom + (2 - row) * pitch, cell, cell)] for row in range(3)]
        draw_fields(axes, sample, [index])
        head = f"{wrapped(sample.dataset, 19)}\n{sample.channel}, step {sample.steps[index]}"
        sheet.text(x + cell / 2, top + 0.02, head, ha="center", va="bottom")
        sheet.text(x + cell / 2, 0.08, f"VRMSE {format_vrmse(sample.vrmse[index])}", ha="center", va="bottom")
    for row, name in enumerate(ROWS):
        y = bottom + (2 - row) * pitch + cell / 2
        sheet.text(0.13, y, name, rotation=90, ha="center", va="center", fontsize=TEXT_SIZE + 1)
    return sheet.figure


def draw_fields(axes: Sequence[Sequence[Axes]], sample: Sample, indices: Sequence[int]) -> tuple[AxesImage, AxesImage]:
    """Fill the axes [row][n] with the fields at `indices`; return an image of the field's scale and of the error's."""
    error = sample.prediction - sample.truth
    field_colors = field_scale(sample.truth)
    rows = (
        (sample.truth, field_colors),
        (sample.prediction, field_colors),
        (error, error_scale(error, sample.truth)),
    )
    for panels, (fields, scale) in zip(axes, rows, strict=True):
        for panel, index in zip(panels, indices, strict=True):
            _draw_field(panel, fields[index], scale, sample.extent)
    return axes[0][0].images[0], axes[2][0].images[0]


def _draw_field(axes: Axes, field: np.ndarray, scale: ColorScale, extent: Domain) -> None:
    """One field (H, W): axis 0 is x, to the right, axis 1 is y, upwards."""
    # The same interpolation for all panels: matplotlib's default depends on the size in pixels.
    axes.imshow(
        np.ma.masked_invalid(field.T),
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


def format_vrmse(value: float) -> str:
    """Return a VRMSE as pictures print it."""
    return f"{value:#.3g}" if np.isfinite(value) else "not finite"


FRAME_MILLISECONDS = 120
LAST_MILLISECONDS = 1200  # a pause before the rollout starts again
LEVELS = 51  # colors of a map; odd, so that a diverging map has a middle; more cost bytes and show nothing
FIELD, ERROR, WHITE = 0, LEVELS, 2 * LEVELS  # first indices in the palette: two maps, then white to black
NUM_GRAYS = 32
OUTLINE = WHITE + 20  # a gray
NOT_FINITE_INDEX = WHITE + NUM_GRAYS
GAP = 8  # pixels, as are all lengths of the GIFs
LABELS = 420  # width of two color bars with their limits, in a GIF


@dataclass(frozen=True)
class FrameLayout:
    """Sizes and places in a frame."""

    size: tuple[int, int]
    panel: tuple[int, int]
    corners: tuple[tuple[int, int], ...]  # upper left, of truth, prediction and error
    line: int  # height of a line of text
    bars: tuple[tuple[int, int, int], ...] = ()  # left, upper and right end of the color bars of field and error


def gif(sample: Sample, side: int = 190, labeled: bool = True) -> bytes:
    """Return an animated GIF of all steps, 8 a second; a panel has the area of a square of `side` pixels.

    Without labels a frame has the panels and the number of the step only, for small pictures.
    """
    aspect = sample.lengths[0] / sample.lengths[1]
    panel = (round(side * aspect**0.5), round(side / aspect**0.5))
    if labeled:
        layout = _frame_layout(sample, panel, line=18, least_width=LABELS)
    else:
        layout = _frame_layout(sample, panel, line=15, labeled=False)
    frames, palette = _frames(sample, layout, labeled)
    pauses = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    # With the palette as an argument Pillow writes it once; otherwise every frame has its own.
    options = {"save_all": True, "append_images": frames[1:], "duration": pauses, "loop": 0, "palette": palette}
    return encode(frames[0], "GIF", **options)


def composite(sample: Sample, index: int, width: int) -> Image.Image:
    """Return an image of one step, `width` pixels wide: names, time and VRMSE, the three panels, the color scales.

    The panels lie side by side, or one below the other if the domain is wide. A domain that is much higher than wide
    has narrower panels, so that the image is at most about as high as wide.
    """
    columns = 1 if is_wide(sample) else 3
    wide, aspect = (width - GAP) // columns - GAP, sample.lengths[0] / sample.lengths[1]
    wide = max(8, min(wide, round(width * aspect)))
    panel = (wide, max(8, round(wide / aspect)))
    heading = f"{sample.dataset}, {sample.channel}"
    layout = _frame_layout(sample, panel, line=width // 20, least_width=width, heading=True)
    ((image,), _) = _frames(sample.at([index]), layout, True, heading)
    return image


def _frames(sample: Sample, layout: FrameLayout, labeled: bool, heading: str = "") -> tuple[list[Image.Image], bytes]:
    """Return an image of every step and their palette; the color scales are those of all steps together."""
    error = sample.prediction - sample.truth
    scales = (field_scale(sample.truth), error_scale(error, sample.truth))
    still = Image.new("P", layout.size, WHITE)
    palette = _palette(scales[0].cmap, scales[1].cmap)
    still.putpalette(palette)
    if labeled:
        _label(still, layout, scales)
    if heading:
        _write(still, (GAP, 2), heading, layout.line)
    panels = ((sample.truth, scales[0], FIELD), (sample.prediction, scales[0], FIELD), (error, scales[1], ERROR))
    frames = []
    for index, step in enumerate(sample.steps):
        frame = still.copy()
        for (fields, scale, start), corner in zip(panels, layout.corners, strict=True):
            unit, finite = enlarged(fields[index], scale.norm, layout.panel)
            colors = start + np.rint(unit * (LEVELS - 1)).astype(np.uint8)
            frame.paste(Image.fromarray(np.where(finite, colors, np.uint8(NOT_FINITE_INDEX)), "P"), corner)
        note = f"   {sample.time_text(step)}   VRMSE {format_vrmse(sample.vrmse[index])}" if labeled else ""
        _write(frame, (GAP, 2 + (layout.line if heading else 0)), f"step {step}{note}", layout.line)
        frames.append(frame)
    return frames, palette


def enlarged(field: np.ndarray, norm: Normalize, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a field (H, W) as an image of `size` (width, height): its values from 0 to 1, and where it is finite.

    x runs to the right and y upwards; both arrays are (height, width).
    """
    upright = np.flip(field.T, axis=0)
    finite = np.isfinite(upright)
    unit = np.clip(norm(np.where(finite, upright, 0)), 0, 1).astype(np.float32)
    values = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    mask = Image.fromarray(finite.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return values, np.asarray(mask) > 0


def _frame_layout(
    sample: Sample,
    panel: tuple[int, int],
    line: int,
    labeled: bool = True,
    least_width: int = 0,
    heading: bool = False,
) -> FrameLayout:
    """A heading; a line with the step; the panels side by side, or stacked if the domain is wide; the color bars."""
    head, name = line * (1 + heading) + 4, line if labeled else 0  # a name above each panel
    columns, rows = (1, 3) if is_wide(sample) else (3, 1)
    width, height = panel
    corners = tuple(
        (GAP + column * (width + GAP), head + name + row * (name + height + GAP))
        for row in range(rows)
        for column in range(columns)
    )
    total_width = GAP + columns * (width + GAP)
    total_height = head + rows * (name + height + GAP)
    bars: tuple[tuple[int, int, int], ...] = ()
    if labeled:
        total_width = max(total_width, least_width)
        half, top = (total_width - GAP) // 2, total_height + 2
        bars = ((GAP, top, half), (GAP + half, top, 2 * half))
        if heading:  # one below the other
            bars = tuple((GAP, top + number * line, total_width - GAP) for number in range(2))
        total_height = bars[1][1] + line + 2
    return FrameLayout((total_width, total_height), panel, corners, line, bars)


def _label(frame: Image.Image, layout: FrameLayout, scales: tuple[ColorScale, ColorScale]) -> None:
    for name, (x, y) in zip(ROWS, layout.corners, strict=True):
        frame.paste(OUTLINE, (x - 1, y - 1, x + layout.panel[0] + 1, y + layout.panel[1] + 1))
        _write(frame, (x, y - layout.line - 1), name, layout.line)
    names = ("field", "error")
    for name, scale, start, (x, top, end) in zip(names, scales, (FIELD, ERROR), layout.bars, strict=True):
        low, high = (f"{limit:.3g}" for limit in (scale.norm.vmin, scale.norm.vmax))
        left = x + _write(frame, (x, top), f"{name}  {low}", layout.line) + 6
        right = end - 6 - round(_font(layout.line).getlength(high))
        ramp = np.linspace(start, start + LEVELS - 1, max(0, right - left)).round().astype(np.uint8)
        frame.paste(Image.fromarray(np.tile(ramp, (layout.line // 2 - 1, 1)), "P"), (left, top + layout.line // 4))
        _write(frame, (right + 6, top), high, layout.line)


def _write(frame: Image.Image, corner: tuple[int, int], text: str, line: int) -> int:
    """Write a line of smooth text in the grays of the palette; return its width."""
    font = _font(line)
    width = round(font.getlength(text))
    sheet = Image.new("L", (width, line))
    ImageDraw.Draw(sheet).text((0, line - 4), text, fill=255, font=font, anchor="ls")
    shades = np.rint(np.asarray(sheet) * ((NUM_GRAYS - 1) / 255)).astype(np.uint8) + np.uint8(WHITE)
    frame.paste(Image.fromarray(shades, "P"), corner)
    return width


@functools.cache
def _font(line: int) -> ImageFont.FreeTypeFont:
    """The font of the other pictures, which is part of matplotlib."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", line - 6)


def _palette(field: Colormap, error: Colormap) -> bytes:
    """Red, green and blue of the 256 colors in turn."""
    t = np.linspace(0, 1, LEVELS)
    grays = np.repeat(np.linspace(1, 0, NUM_GRAYS)[:, None], 3, axis=1)
    colors = np.concatenate([field(t)[:, :3], error(t)[:, :3], grays, [to_rgb(NOT_FINITE)]])
    used = np.rint(colors * 255).astype(np.uint8).tobytes()
    # Colors that no pixel has, all different: Pillow takes 0.1 s a frame for a palette with many equal colors.
    return used + bytes(value for number in range(256 - len(colors)) for value in (0, 255, number))
