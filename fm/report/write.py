"""Writes the files of one evaluation."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data_pipeline.files import atomic_file
from fm.report.curves import growth_figure
from fm.report.page import page
from fm.report.sample import Sample, save_samples
from fm.report.spectra import spectra_figure
from fm.report.strips import overview, strip
from fm.report.video import gif
from fm.scores.errors import ErrorFile
from fm.scores.tables import score_table

DPI = 160


def write_report(out: Path, errors: ErrorFile, scores: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """The files of one evaluation. An older scores.json goes first, the new one comes last: where it is, all is.

    index.html holds everything; pictures/ has the same pictures one by one, errors.npz and samples.npz what all of it
    is made from.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").unlink(missing_ok=True)
    errors.save(out / "errors.npz")
    save_samples(out / "samples.npz", samples)
    figures = {"overview": overview(samples), "spectra": spectra_figure(samples)} if samples else {}
    figures["growth"] = growth_figure(errors.datasets, errors.protocol)
    figures |= {sample.dataset: strip(sample) for sample in samples}
    images = {name: _draw(figure) for name, figure in figures.items()}
    videos = {sample.dataset: gif(sample) for sample in samples}
    for name, image in images.items():
        _write(out / "pictures" / f"{name}.png", _encode(image, "PNG", dpi=(DPI, DPI)))
    for name, video in videos.items():
        _write(out / "pictures" / f"{name}.gif", video)
    # A page of PNGs would be three times as large.
    small = {name: _encode(image, "WEBP", quality=90, use_sharp_yuv=True) for name, image in images.items()}
    _write(out / "index.html", page(errors, scores, samples, small, videos).encode())
    pictures = "\n".join(f"![{name}](pictures/{name}.png)\n" for name in images)
    _write(out / "scores.md", f"# Scores\n\n{score_table(scores)}\n{pictures}".encode())
    _write(out / "scores.json", (json.dumps(scores, indent=1, allow_nan=False) + "\n").encode())


def _draw(figure: Figure) -> Image.Image:
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)
