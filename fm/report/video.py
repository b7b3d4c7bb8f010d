"""A rollout as a moving picture: truth, prediction and error, an animated GIF.

Fields become indices of one palette of 256 colours, which is made of the strips' colour maps. No colours are sought
frame by frame: nothing flickers, and all frames of a field have the same limits.
"""

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, Normalize, to_rgb
from PIL import Image, ImageDraw, ImageFont

from fm.report.sample import Sample
from fm.report.strips import NOT_FINITE, ROWS, Scale, error_scale, field_scale, is_wide, short

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
            frame.paste(_panel(fields[index], scales[kind].norm, (FIELD, ERROR)[kind], layout.panel), corner)
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


def _panel(field: np.ndarray, norm: Normalize, start: int, size: tuple[int, int]) -> Image.Image:
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
