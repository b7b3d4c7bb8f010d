"""helmholtz_staircase: sound of one frequency from a point source above an endless zigzag wall.

    -(lap + omega^2) u = delta_x0 above the wall,   u_n = 0 on it,   U(t, x) = u(x) exp(-i omega t)

The wall y = -1/2 + |((x + 1/2) mod 1) - 1/2| runs along cell diagonals of the grid, so a cell is fluid, solid or half
of each and a face is open or closed: a five-point finite-volume scheme with exact cut cells, decided in whole
numbers, never by rounding. Outside the box a complex stretching 1 + i sigma / omega absorbs the waves. The source is a
narrow Gaussian of unit strength. The linear system is factorized once per omega.

Arrays on the extended grid are (X, Y) with the absorber, on the box (X, Y) without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csc_array
from scipy.sparse.linalg import SuperLU, splu

from data_pipeline.miniwell.system import ParameterSet, Preset, Simulation, System, counts
from data_pipeline.well.layout import BoundaryMask, edge

LOWER_X, UPPER_X = -8, 8
LOWER_Y, UPPER_Y = -0.5, 3.5
ABSORBER_X, ABSORBER_Y = 12, 3  # thickness on each side and on top; slow waves along the wall need the length in x
REFLECTION = 1e-6  # of a wave that crosses the absorber twice, head on
SOURCE_WIDTH = 0.125  # standard deviation
REFINE = 2  # solved cells per stored cell and axis


@dataclass(frozen=True)
class Domain:
    """Extended grid of square cells with its solid part."""

    spacing: float
    x: np.ndarray  # (X,) cell centers
    y: np.ndarray  # (Y,)
    volume: np.ndarray  # (X, Y) fluid fraction of a cell: 0, 1/2 or 1
    open_x: np.ndarray  # (X-1, Y) bool: fluid face between neighbors in x
    open_y: np.ndarray  # (X, Y-1) bool
    box: tuple[slice, slice]  # the part inside the absorber

    @property
    def fluid(self) -> np.ndarray:
        """(X, Y) bool: cells with any fluid, which are the unknowns, in C order."""
        return self.volume > 0


def staircase(cells_per_unit: int) -> Domain:
    """Return the zigzag domain with an even number of cells per unit length."""
    if cells_per_unit < 2 or cells_per_unit % 2:
        raise ValueError(f"cells_per_unit must be even, so that corners of the wall are grid points: {cells_per_unit}")
    spacing = 1.0 / cells_per_unit
    num_x = (UPPER_X - LOWER_X + 2 * ABSORBER_X) * cells_per_unit
    num_y = round((UPPER_Y - LOWER_Y + ABSORBER_Y) * cells_per_unit)
    column = np.arange(num_x) % cells_per_unit  # 0 at the cell right of a valley
    row = np.arange(num_y)
    cut = np.minimum(column, cells_per_unit - 1 - column)[:, None]  # row of the half cell in each column
    corner = np.minimum(column, cells_per_unit - column)[1:, None]  # height of the wall on the lower x-face
    pad = ABSORBER_X * cells_per_unit
    return Domain(
        spacing=spacing,
        x=LOWER_X - ABSORBER_X + spacing * (np.arange(num_x) + 0.5),
        y=LOWER_Y + spacing * (row + 0.5),
        volume=np.where(row == cut, 0.5, (row > cut).astype(float)),
        open_x=row >= corner,
        open_y=row[1:] > cut,
        box=(slice(pad, num_x - pad), slice(0, num_y - ABSORBER_Y * cells_per_unit)),
    )


def _stretching(position: np.ndarray, lower: float, upper: float, thickness: float, omega: float) -> np.ndarray:
    """Return the complex stretching: 1 inside [lower, upper], 1 + i sigma / omega with a cubic sigma outside."""
    depth = np.maximum(np.maximum(lower - position, position - upper), 0.0) / thickness
    peak = -0.5 * np.log(REFLECTION) * 4 / thickness  # the integral of peak * depth^3 halves ln(1 / REFLECTION)
    return 1 + 1j * peak * depth**3 / omega


def assemble(domain: Domain, omega: float) -> csc_array:
    """Return the matrix of -(lap + omega^2), integrated over each fluid cell; complex symmetric (N, N).

    Fluxes are (s_y / s_x) du/dx and (s_x / s_y) du/dy, masses s_x s_y (coordinate stretching, Chew and Weedon 1994).
    """
    half = 0.5 * domain.spacing
    stretch_x, face_x = (
        _stretching(p, LOWER_X, UPPER_X, ABSORBER_X, omega)[:, None] for p in (domain.x, domain.x[1:] - half)
    )
    below = domain.y[0] - half  # the wall side has no absorber
    stretch_y, face_y = (
        _stretching(p, below, UPPER_Y, ABSORBER_Y, omega)[None, :] for p in (domain.y, domain.y[1:] - half)
    )
    number = np.cumsum(domain.fluid).reshape(domain.fluid.shape) - 1
    diagonal = -((omega * domain.spacing) ** 2) * domain.volume * stretch_x * stretch_y
    rows, columns, values = [], [], []
    for flux, is_open, lower, upper in (
        (stretch_y / face_x, domain.open_x, np.s_[:-1, :], np.s_[1:, :]),
        (stretch_x / face_y, domain.open_y, np.s_[:, :-1], np.s_[:, 1:]),
    ):
        flux = flux * is_open
        diagonal[lower] += flux
        diagonal[upper] += flux
        first, second, value = number[lower][is_open], number[upper][is_open], -flux[is_open]
        rows += [first, second]
        columns += [second, first]
        values += [value, value]
    rows.append(number[domain.fluid])
    columns.append(number[domain.fluid])
    values.append(diagonal[domain.fluid])
    size = int(domain.fluid.sum())
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return csc_array(coo_array(entries, shape=(size, size)))


def factorize(matrix: csc_array) -> SuperLU:
    """Return LU factors; the ordering and pivoting suit a matrix with a symmetric pattern."""
    return splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.01, options={"SymmetricMode": True})


def source_term(domain: Domain, position: tuple[float, float]) -> np.ndarray:
    """Return a Gaussian source at (x, y), integrated over each fluid cell, of total strength 1; (N,)."""
    squared = (domain.x[:, None] - position[0]) ** 2 + (domain.y[None, :] - position[1]) ** 2
    strength = domain.volume * np.exp(-0.5 * squared / SOURCE_WIDTH**2)
    return (strength / strength.sum())[domain.fluid]


def on_grid(domain: Domain, unknowns: np.ndarray) -> np.ndarray:
    """Return unknowns (N,) as an array on the extended grid (X, Y), 0 in the solid."""
    cells = np.zeros(domain.fluid.shape, dtype=unknowns.dtype)
    cells[domain.fluid] = unknowns
    return cells


def coarsen(cells: np.ndarray, volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return fluid-volume means over REFINE x REFINE blocks, 0 without fluid, and the blocks' fluid fraction."""
    num_x, num_y = cells.shape[0] // REFINE, cells.shape[1] // REFINE
    blocks = (num_x, REFINE, num_y, REFINE)
    fraction = volume.reshape(blocks).mean(axis=(1, 3))
    content = (cells * volume).reshape(blocks).mean(axis=(1, 3))
    return content / np.where(fraction > 0, fraction, 1.0), fraction


def draw_source(rng: np.random.Generator) -> tuple[float, float]:
    """Return a source position over the middle of the wall, 0.25 to 1.5 above it: at least 0.17 from the surface."""
    x, above = rng.uniform([-4.0, 0.25], [4.0, 1.5])
    return x, LOWER_Y + abs((x + 0.5) % 1 - 0.5) + above


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate one period of the sound of one source per trajectory; the last frame equals the first, as in the Well.

    See System.simulate. The phase between frames is the same for every omega, so the time step is not.
    """
    omega = parameter_set.scalars["omega"]
    num_x, num_y = preset.grid
    domain = staircase(REFINE * num_x // (UPPER_X - LOWER_X))
    factors = factorize(assemble(domain, omega))
    # One right-hand side at a time: a block of them is summed in another order, and differs in the last bits.
    solutions = [on_grid(domain, factors.solve(source_term(domain, draw_source(rng)) + 0j)) for rng in rngs]
    volume = domain.volume[domain.box]
    amplitude = np.stack([coarsen(u[domain.box], volume)[0] for u in solutions])
    solid = coarsen(volume, volume)[1] == 0
    phase = 2 * np.pi * np.arange(preset.num_frames) / (preset.num_frames - 1)
    wave = amplitude[:, None] * np.exp(-1j * phase)[:, None, None]  # (b, T, X, Y)
    return Simulation(
        time=phase / omega,
        x=LOWER_X + (UPPER_X - LOWER_X) / num_x * (np.arange(num_x) + 0.5),
        y=LOWER_Y + (UPPER_Y - LOWER_Y) / num_y * (np.arange(num_y) + 0.5),
        fields={"pressure_re": wave.real.copy(), "pressure_im": wave.imag.copy()},
        boundaries=(
            edge("x_open_neumann", "OPEN", "x", num_x),
            BoundaryMask("xy_wall", "WALL", ("x", "y"), solid),
            edge("y_open_neumann", "OPEN", "y", num_y, lower=False),
        ),
        constant_fields={"mask": solid.astype(float)},
    )


def _set(omega: float, *trajectories: int) -> ParameterSet:
    return ParameterSet(f"omega_{omega:.4f}", {"omega": omega}, counts(*trajectories))


def _preset(grid: tuple[int, int], num_frames: int, sets: tuple[ParameterSet, ...]) -> Preset:
    """Return a preset whose dt is a step of the phase: frames are dt / omega apart."""
    return Preset(grid, num_frames, 2 * np.pi / (num_frames - 1), sets)


SYSTEM = System(
    name="helmholtz_staircase",
    tensor_orders={"pressure_re": 0, "pressure_im": 0},
    presets={
        # Below 0.25 the absorber is shorter than a wave, above 1.9 it reflects slow waves along the wall.
        "mini": _preset((128, 32), 24, tuple(_set(omega, 3, 1, 3) for omega in (0.4393, 1.1821, 1.883))),
        "tiny": _preset((64, 16), 9, tuple(_set(omega, 1, 1, 1) for omega in (0.8133, 1.5413))),
    },
    simulate=simulate,
    cost=1.2,
)
