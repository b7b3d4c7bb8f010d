"""The pictures of a run on TensorBoard, encoded as PNG or GIF."""

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from fm.evaluation.cosines import Cosines
from fm.evaluation.pictures import ROWS, ColorScale, enlarged, error_scale, field_scale, gif
from fm.evaluation.plots import NOT_FINITE, cosine_figure, draw_spectra, encode, rasterize
from fm.evaluation.samples import Sample

DPI = 100
PANEL_SIDE = 224  # pixels; a panel has the area of a square of this side
NUM_COLORS = 255  # of a palette; one more is for values that are not finite


def cosine_picture(cosines: Cosines, title: str) -> bytes:
    """Return the heat map of the cosines between gradients as a PNG."""
    return encode(rasterize(cosine_figure(cosines, title), DPI))


def rollout_pictures(sample: Sample) -> dict[str, bytes]:
    """Return encoded pictures by name.

    Truth, prediction, error and their power spectra a third of the way into the rollout are PNG; the whole rollout is a
    GIF.
    """
    still = sample.at([len(sample.steps) // 3])
    truth, prediction = still.truth[0], still.prediction[0]
    error = prediction - truth
    scales = (field_scale(truth), field_scale(truth), error_scale(error, truth))
    fields = zip(ROWS, (truth, prediction, error), scales, strict=True)
    pictures = {name: _field_png(field, scale, still.lengths) for name, field, scale in fields}
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    draw_spectra(axes, still)
    axes.set(ylabel="power", title=still.dataset)
    axes.legend(frameon=False)
    pictures["spectrum"] = encode(rasterize(figure, DPI))
    return pictures | {"rollout": gif(sample, side=64, labeled=False)}


def _field_png(field: np.ndarray, scale: ColorScale, lengths: tuple[float, float]) -> bytes:
    """Return a field (H, W) as a PNG in the shape of its domain: x to the right, y upwards."""
    aspect = lengths[0] / lengths[1]
    short = round(PANEL_SIDE * min(aspect, 1 / aspect) ** 0.5)
    size = (round(short * aspect), short) if aspect > 1 else (short, round(short / aspect))
    unit, finite = enlarged(field, scale.norm, size)
    indices = np.where(finite, np.rint(unit * (NUM_COLORS - 1)), NUM_COLORS).astype(np.uint8)
    image = Image.fromarray(indices, "P")
    colors = [*scale.cmap(np.linspace(0, 1, NUM_COLORS))[:, :3], to_rgb(NOT_FINITE)]
    image.putpalette(np.rint(np.array(colors) * 255).astype(np.uint8).tobytes())
    return encode(image)
