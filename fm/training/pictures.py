"""The pictures of a run on TensorBoard, encoded as PNG or GIF."""

from matplotlib.figure import Figure
from PIL import Image

from fm.evaluation.cosines import Cosines
from fm.evaluation.pictures import composite, gif
from fm.evaluation.plots import cosine_figure, draw_spectra, encode, rasterize
from fm.evaluation.samples import Sample

DPI = 100
# pixels: TensorBoard shows every picture 350 pixels wide and without smoothing, so only text of this width is sharp
WIDTH = 350
TRACKER_WIDTH = 700  # pixels of a picture for another tracker, where it can be enlarged


def cosine_picture(cosines: Cosines, title: str) -> bytes:
    """Return the heat map of the cosines between gradients as a PNG."""
    return encode(rasterize(cosine_figure(cosines, title), DPI))


def rollout_pictures(sample: Sample) -> dict[str, bytes]:
    """Return encoded pictures by name; the first by name is the one to look at first.

    `fields` (truth, prediction and error with names, color scales and VRMSE) and `spectrum` are PNG, a third of the way
    into the rollout. `rollout` is a GIF of the whole rollout.
    """
    pictures = {name: encode(image) for name, image in still_pictures(sample, WIDTH).items()}
    return pictures | {"rollout": gif(sample, side=64, labeled=False)}


def still_pictures(sample: Sample, width: int) -> dict[str, Image.Image]:
    """Return `fields` and `spectrum` of `rollout_pictures`, `width` pixels wide."""
    shown = len(sample.steps) // 3
    still = sample.at([shown])
    # The axes have a fixed place, for a layout that fits the texts would take as long as drawing does.
    figure = Figure(figsize=(WIDTH / DPI, 0.8 * WIDTH / DPI))
    axes = figure.add_axes((0.16, 0.15, 0.82, 0.7))
    draw_spectra(axes, still)
    axes.set_ylabel("power", fontsize=8)
    axes.set_title(f"{still.dataset}\n{still.channel}, step {still.steps[0]}", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return {"fields": composite(sample, shown, width), "spectrum": rasterize(figure, DPI * width // WIDTH)}
