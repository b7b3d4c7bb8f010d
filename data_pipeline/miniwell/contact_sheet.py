"""One picture of every system in a mini-Well: two trajectories each, frames from left to right.

Axis 0 (x) runs to the right and axis 1 (y) upwards, in true proportion. Every frame has about the same area; a dataset
has one pair of color limits. The background is transparent, the lettering mid-gray, for light and dark pages.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import write_whole

STRIP_WIDTH = 9.4  # inches of tiles in a line
TILE_AREA = 1.3  # square inches
MAX_TILE_HEIGHT = 1.75
GAP, BLOCK_GAP, MARGIN, HEADER = 0.04, 0.16, 0.12, 0.3
BAR_SPACE = 0.62  # right of the tiles: the color bar and its two limits
INK = "#808080"
WALL = (0.5, 0.5, 0.5, 0.55)


@dataclass(frozen=True)
class View:
    """What is shown of a dataset: one component of a field, and a perceptually uniform colormap."""

    field: str
    label: str
    colormap: str
    component: tuple[int, ...] = ()
    signed: bool = False  # color limits symmetric about 0
    quantile: float = 0.995  # of all values shown; the colors end there, so that one sharp peak does not dim the rest


VIEWS: Mapping[str, View] = {
    "gray_scott_reaction_diffusion": View("A", "A", "viridis"),
    "shear_flow": View("tracer", "tracer", "cividis"),
    "rayleigh_benard": View("buoyancy", "buoyancy", "inferno"),
    "turbulent_radiative_layer_2D": View("density", "density", "magma"),
    "active_matter": View("D", "D_xx", "viridis", (0, 0)),
    "viscoelastic_instability": View("C", "C_xx", "inferno", (0, 0)),
    "acoustic_scattering_maze": View("pressure", "pressure", "twilight_shifted", signed=True, quantile=0.985),
    "helmholtz_staircase": View("pressure_re", "pressure_re", "twilight_shifted", signed=True),
    "burgers": View("tracer", "tracer", "cividis"),
    "euler_multi_quadrants_periodicBC": View("density", "density", "magma"),
    "pdearena_navier_stokes": View("smoke", "smoke", "viridis"),
}


@dataclass(frozen=True)
class DatasetRow:
    """The part of the picture that shows one dataset."""

    dataset: str
    lines: tuple[tuple[np.ma.MaskedArray, ...], ...]  # in each line, trajectories: (n, X, Y), masked in solid walls
    tile: tuple[float, float]  # width and height of a frame, inches

    @property
    def height(self) -> float:
        """Height of all lines, inches."""
        return len(self.lines) * (self.tile[1] + GAP) - GAP

    @property
    def limits(self) -> tuple[float, float]:
        """Color limits for all frames shown."""
        view = VIEWS[self.dataset]
        values = np.concatenate([strip.compressed() for line in self.lines for strip in line])
        low, high = np.quantile(values, (1 - view.quantile, view.quantile))
        if view.signed:
            high = max(abs(low), abs(high))
            low = -high
        return float(low), float(high)


def contact_sheet(well: Path, file: Path) -> None:
    """Draw the datasets that `well` holds into the picture `file`, whose suffix names the format (.png, .svg, ...).

    Raises UserError if `well` holds no dataset of the mini-Well, the format is unknown, or the file cannot be written.
    """
    # Here, because matplotlib takes longer to import than the tiny preset to simulate, and only this function needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    present = [name for name in VIEWS if list((well / name / "data").glob("*/*.hdf5"))]
    if not present:
        raise UserError(
            f"expected at least one of {', '.join(VIEWS)} in {well}, found none. "
            f"Make them with: data-pipeline simulate --preset mini --out {well}"
        )
    suffix = file.suffix.lstrip(".").lower()
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if suffix not in formats:
        raise UserError(f"expected a picture file with one of the suffixes {', '.join(formats)}; got {file}")
    rows = [_row(name, well / name / "data") for name in present]
    height = 2 * MARGIN + sum(HEADER + row.height for row in rows)
    figure = Figure(figsize=(STRIP_WIDTH + BAR_SPACE + 2 * MARGIN, height))
    FigureCanvasAgg(figure)
    top = MARGIN
    for row in rows:
        _draw_row(figure, row, top)
        top += HEADER + row.height
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix, dpi=150, transparent=True)
    write_whole(file, picture.getvalue())


def _row(dataset: str, data: Path) -> DatasetRow:
    """Read a dataset: two trajectories beside each other, or one below the other if the frames are wide."""
    paths = sorted((data / "train").glob("*.hdf5")) or sorted(data.glob("*/*.hdf5"))
    with h5py.File(paths[0]) as file:
        ratio = _length(file["dimensions/x"][:]) / _length(file["dimensions/y"][:])
    strips_per_line = 1 if ratio > 2 else 2
    width = STRIP_WIDTH - (strips_per_line - 1) * (BLOCK_GAP - GAP) + GAP
    wanted = min(np.sqrt(TILE_AREA * ratio), MAX_TILE_HEIGHT * ratio) + GAP
    num_frames = max(2, round(width / wanted / strips_per_line))
    tile = width / (num_frames * strips_per_line) - GAP
    strips = (_read(dataset, paths[0], 0, num_frames), _read(dataset, paths[len(paths) // 2], -1, num_frames))
    return DatasetRow(
        dataset, (strips,) if strips_per_line == 2 else tuple((strip,) for strip in strips), (tile, tile / ratio)
    )


def _length(points: np.ndarray) -> float:
    """Return the length of the domain whose cells these points are: one spacing more than first to last."""
    return float(points[-1] - points[0]) * len(points) / (len(points) - 1)


def _read(dataset: str, path: Path, trajectory: int, num_frames: int) -> np.ma.MaskedArray:
    """Return frames (n, X, Y) of a trajectory, evenly spread from first to last, masked in solid walls."""
    view = VIEWS[dataset]
    with h5py.File(path) as file:
        values = file[f"t{len(view.component)}_fields"][view.field]
        index = trajectory % values.shape[0]
        times = np.unique(np.linspace(0, values.shape[1] - 1, num_frames).round().astype(int))
        frames = values[(index, times, slice(None), slice(None), *view.component)]
        constants, solid = file["t0_fields"], np.zeros(frames.shape[1:], dtype=bool)
        if "mask" in constants:
            solid = constants["mask"][:] > 0.5
        elif dataset == "acoustic_scattering_maze":
            solid = constants["density"][index] > 1e3  # walls 1e6, paths 3
    return np.ma.masked_array(frames, np.broadcast_to(solid, frames.shape))


def _draw_row(figure: Any, row: DatasetRow, top: float) -> None:
    """Draw heading, frames and color bar of one dataset, `top` inches below the upper edge."""
    import matplotlib

    view, (low, high) = VIEWS[row.dataset], row.limits
    colors = matplotlib.colormaps[view.colormap].with_extremes(bad=WALL)
    baseline = 1 - (top + HEADER - 0.1) / figure.get_figheight()
    for text, left, weight in ((row.dataset, 0.0, "bold"), (view.label, STRIP_WIDTH, "normal")):
        align = "right" if left else "left"
        at = (MARGIN + left) / figure.get_figwidth()
        figure.text(at, baseline, text, color=INK, size=10, weight=weight, va="baseline", ha=align)
    upper = top + HEADER
    for line in row.lines:
        left = MARGIN
        for strip in line:
            for frame in strip:
                axes = _axes(figure, left, upper, *row.tile)
                axes.imshow(frame.T, origin="lower", cmap=colors, vmin=low, vmax=high, aspect="auto")
                left += row.tile[0] + GAP
            left += BLOCK_GAP - GAP
        upper += row.tile[1] + GAP
    bar = _axes(figure, MARGIN + STRIP_WIDTH + 0.08, top + HEADER, 0.07, row.height)
    bar.imshow(np.linspace(0, 1, 256)[:, None], origin="lower", cmap=colors, aspect="auto")
    for value, at, align in ((low, 0.0, "bottom"), (high, 1.0, "top")):
        number = f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
        bar.text(1.6, at, number, color=INK, size=7, va=align, transform=bar.transAxes)


def _axes(figure: Any, left: float, upper: float, width: float, height: float) -> Any:
    """Add bare axes at a place given in inches from the upper left corner."""
    whole_width, whole_height = figure.get_size_inches()
    bounds = (left / whole_width, 1 - (upper + height) / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(bounds)
    axes.set_axis_off()
    return axes
