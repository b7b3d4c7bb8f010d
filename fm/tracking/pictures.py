"""TensorBoard's pictures: small enough that those of a run of any length stay below 120 MB, and thinned out evenly.

A panel has the area of a square of 224 pixels, one byte each before compression: at most 50 kB, if it is nothing but
noise. A moving rollout, 16 steps of three panels of 64 x 64 pixels, is 205 kB at most. With their spectra, eight
datasets make 3 MB, and the 40 occasions of `tracking.pictures` 120 MB.
"""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from fm.report.sample import Sample
from fm.report.spectra import draw_spectra
from fm.report.strips import NOT_FINITE, ROWS, Scale, error_scale, field_scale
from fm.report.video import gif

SIDE = 224  # pixels; a panel has the area of a square of this side
LEVELS = 255  # colours of a map; the last of a palette is for what is not finite


def is_shown(number: int, count: int, most: int) -> bool:
    """Whether the `number`-th of `count` occasions, from 1, is one of `most`: evenly spread, the last included."""
    return number * most // count > (number - 1) * most // count


def rollout_pictures(sample: Sample) -> dict[str, bytes]:
    """Encoded pictures by name: three fields and their spectra a third of the way into a rollout; all of it, moving."""
    still = sample.at([len(sample.steps) // 3])
    truth, prediction = still.truth[0], still.prediction[0]
    error = prediction - truth
    scales = (field_scale(truth), field_scale(truth), error_scale(error, truth))
    fields = zip(ROWS, (truth, prediction, error), scales, strict=True)
    pictures = {name: _field(field, scale, still.lengths) for name, field, scale in fields}
    return pictures | {"spectrum": _spectrum(still), "rollout": gif(sample, side=64, labelled=False)}


def figure_png(figure: Figure) -> bytes:
    """A figure at 100 dots an inch."""
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _png(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))


def _field(field: np.ndarray, scale: Scale, lengths: tuple[float, float]) -> bytes:
    """A field (H, W) in the shape of its domain: x to the right, y upwards."""
    upright = np.flip(field.T, axis=0)
    holes = ~np.isfinite(upright)
    unit = np.clip(scale.norm(np.where(holes, 0, upright)), 0, 1).astype(np.float32)
    size = _size(lengths[0] / lengths[1])
    large = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    indices = np.rint(large * (LEVELS - 1))
    torn = np.asarray(Image.fromarray(holes.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    image = Image.fromarray(np.where(torn, LEVELS, indices).astype(np.uint8), "P")
    colours = [*scale.cmap(np.linspace(0, 1, LEVELS))[:, :3], to_rgb(NOT_FINITE)]
    image.putpalette(np.rint(np.array(colours) * 255).astype(np.uint8).tobytes())
    return _png(image)


def _size(aspect: float) -> tuple[int, int]:
    """Width and height in pixels of a panel that is `aspect` times as wide as high."""
    short = round(SIDE * min(aspect, 1 / aspect) ** 0.5)
    return (round(short * aspect), short) if aspect > 1 else (short, round(short / aspect))


def _spectrum(sample: Sample) -> bytes:
    """Power spectra of the sample's first step: truth, prediction and error."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    draw_spectra(axes, sample.at([0]))
    axes.set(ylabel="power", title=sample.dataset)
    axes.legend(frameon=False)
    return figure_png(figure)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
