"""The symmetries of a dataset: maps of the grid that turn each of its trajectories into another possible trajectory.

    shift_x, shift_y      move all fields along a periodic axis by a whole number of grid points
    reflect_x, reflect_y  reverse the order of the grid points along an axis
    transpose             exchange the two axes

Vectors and tensors change with the grid. A reflection along x changes the sign of each component with an odd number of
indices x: v_x, T_xy, T_yx. Transposition exchanges the indices: v_x and v_y, T_xx and T_yy, T_xy and T_yx. Scalars keep
their values, so a field like vorticity, which a reflection changes in sign, must not be in a dataset that names one.

A card names the symmetries of its dataset. The transformed trajectory must solve the same equations with the same
parameters, boundaries and forcing, and its initial state must be one that the dataset could have.
"""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Annotated

from data_pipeline.schema import Mismatch, checked_list, choice

SYMMETRIES = ("shift_x", "shift_y", "reflect_x", "reflect_y", "transpose")
PAIRS = (("shift_x", "shift_y"), ("reflect_x", "reflect_y"))  # transposition turns one of a pair into the other
AXES = "xy"

Symmetries = Annotated[
    tuple[Annotated[str, choice(SYMMETRIES, "a symmetry")], ...],
    checked_list(lambda names: len(set(names)) == len(names), "names of symmetries, each once"),
]


def possible_symmetries(boundary: Sequence[Sequence[str]]) -> list[str]:
    """Return the symmetries that the boundary types allow: ((x lower, x upper), (y lower, y upper))."""
    return [name for name in SYMMETRIES if not _obstacle(name, boundary)]


def check_symmetries(
    symmetries: Sequence[str], boundary: Sequence[Sequence[str]], domain: Sequence[Sequence[float]] | None
) -> None:
    """Raise Mismatch for a symmetry that the boundary types or the domain ((lower, upper) of x, of y) rule out."""
    for number, name in enumerate(symmetries):
        if obstacle := _obstacle(name, boundary):
            raise Mismatch(obstacle, "Remove the symmetry, or correct `boundary`.", ("symmetries", number))
    if "transpose" not in symmetries:
        return
    at = ("symmetries", symmetries.index("transpose"))
    if domain is not None:
        x, y = (upper - lower for lower, upper in domain)
        if abs(x - y) > 1e-6 * max(x, y):
            raise Mismatch("a domain of the same length along x and y for transpose", "Remove transpose.", at)
    for pair in PAIRS:
        if len(set(pair) & set(symmetries)) == 1:
            raise Mismatch(f"both or neither of {pair[0]} and {pair[1]} beside transpose", "Name both.", at)


def _obstacle(symmetry: str, boundary: Sequence[Sequence[str]]) -> str:
    """Return the condition on the boundary types that the symmetry does not meet, or an empty text."""
    if symmetry == "transpose":
        return "" if tuple(boundary[0]) == tuple(boundary[1]) else "the same boundary along x and y for transpose"
    kind, _, axis = symmetry.partition("_")
    ends = set(boundary[AXES.index(axis)])
    if kind == "shift":
        return "" if ends == {"PERIODIC"} else f"a PERIODIC boundary along {axis} for {symmetry}"
    return "" if len(ends) == 1 else f"the same boundary at both ends of {axis} for {symmetry}"


def component_signs(orders: Iterable[int], axis: int) -> list[int]:
    """Return the sign, 1 or -1, that a reflection along `axis` (0: x, 1: y) gives each channel.

    `orders` are the tensor orders of the fields. A field has one channel per component: x, y; xx, xy, yx, yy.
    """
    return [(-1) ** component.count(AXES[axis]) for order in orders for component in product(AXES, repeat=order)]


def exchanged_components(orders: Iterable[int]) -> list[int]:
    """Return, for each channel, the channel whose values it gets when x and y are exchanged; `orders` as above."""
    sources: list[int] = []
    for order in orders:
        names = list(product(AXES, repeat=order))
        sources += [len(sources) + names.index(tuple("yx"[AXES.index(axis)] for axis in name)) for name in names]
    return sources
