"""Cosines between the gradients of datasets: what is kept of them, and their picture.

Near +1 a step for one dataset is a step for the other, near 0 they do not meet, below 0 one undoes what the other does
(Yu et al. 2020, "Gradient Surgery for Multi-Task Learning"). A gradient of a few windows is noisy, which draws the
cosines towards 0; means over a run are steadier than one measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fm.report.strips import TEXT_SIZE, diverging_map

CELL = 0.52  # inches
LETTER = 0.062  # inches of a name's letter
NEUTRAL = "#DDDDDD"  # the diagonal, and what is not known


@dataclass(frozen=True, eq=False)
class Cosines:
    """Between the gradients of n datasets with respect to the parameters that all of them use."""

    datasets: tuple[str, ...]
    matrix: np.ndarray  # (n, n); NaN where one of the two gradients is zero or not finite
    norms: np.ndarray  # (n,) of the gradients

    def with_others(self) -> dict[str, float]:
        """Each dataset's mean cosine with the others, over those that are known; NaN where none is."""
        others = np.where(np.eye(len(self.datasets), dtype=bool), np.nan, self.matrix)
        return dict(zip(self.datasets, _known_mean(others, axis=1).tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """JSON types; null for what is not finite."""
        matrix = [[_finite(value) for value in row] for row in self.matrix.tolist()]
        return {"datasets": list(self.datasets), "matrix": matrix, "norms": [_finite(v) for v in self.norms.tolist()]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Cosines":
        """Inverse of `to_json`. ValueError, TypeError or KeyError where the document is another."""
        datasets = tuple(document["datasets"])
        matrix, norms = np.array(document["matrix"], np.float64), np.array(document["norms"], np.float64)
        if matrix.shape != (len(datasets), len(datasets)) or norms.shape != (len(datasets),):
            raise ValueError(f"{len(datasets)} datasets, but a matrix {matrix.shape} and norms {norms.shape}")
        return cls(datasets, matrix, norms)


def mean_cosines(measured: Sequence[Cosines]) -> Cosines:
    """The mean of measurements of the same datasets, of each cosine over those in which it is known."""
    (datasets,) = {cosines.datasets for cosines in measured}
    matrix = _known_mean(np.stack([cosines.matrix for cosines in measured]), axis=0)
    return Cosines(datasets, matrix, _known_mean(np.stack([cosines.norms for cosines in measured]), axis=0))


def cosine_figure(cosines: Cosines, title: str) -> Figure:
    """A heat map with the cosines in its cells and the gradients' norms on the diagonal; colours from -1 to 1."""
    count, names = len(cosines.datasets), LETTER * max(map(len, cosines.datasets)) + 0.15
    width, height = names + count * CELL + 0.75, names + count * CELL + 0.5
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    box = (names / width, names / height, count * CELL / width, count * CELL / height)
    axes = figure.add_axes(box)
    shown = np.ma.masked_invalid(np.where(np.eye(count, dtype=bool), np.nan, cosines.matrix))
    image = axes.imshow(shown, cmap=diverging_map(), norm=Normalize(-1, 1))
    axes.set_facecolor(NEUTRAL)
    _write_cells(axes, cosines)
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


def _write_cells(axes: Axes, cosines: Cosines) -> None:
    for row, values in enumerate(cosines.matrix):
        for column, value in enumerate(values):
            own = row == column
            text = f"{cosines.norms[row]:.2g}" if own else f"{value:+z.2f}" if np.isfinite(value) else "none"
            colour = "white" if not own and abs(value) > 0.6 else "black"
            style = "italic" if own else "normal"
            axes.text(column, row, text, ha="center", va="center", fontsize=TEXT_SIZE, color=colour, style=style)


def _known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the finite values, NaN where there is none."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(axis), known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
