"""Boundary conditions of a Well file: the masks that it stores, and the types at the ends of the axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from data_pipeline.cards.registry import BOUNDARY_TYPES, Boundary
from data_pipeline.errors import UserError
from data_pipeline.well.hdf5_safety import check_extent, plain_dataset, plain_group, texts


@dataclass(frozen=True)
class BoundaryMask:
    """One boundary group of the Well: `mask` is True where the condition holds, over the axes `dims`."""

    name: str  # the Well's group name, e.g. "y_wall_dirichlet"
    kind: str  # WALL, OPEN or PERIODIC
    dims: tuple[str, ...]  # ("x",), ("y",) or ("x", "y")
    mask: np.ndarray  # bool, one axis per dim


def edge(name: str, kind: str, dim: str, size: int, *, lower: bool = True, upper: bool = True) -> BoundaryMask:
    """A boundary on the lower and/or upper end of one axis of `size` points."""
    mask = np.zeros(size, dtype=bool)
    mask[0] |= lower
    mask[-1] |= upper
    return BoundaryMask(name, kind, (dim,), mask)


def edges(boundary: Boundary, grid: tuple[int, int]) -> tuple[BoundaryMask, ...]:
    """Masks that say no more than the types at the ends of the axes."""
    return tuple(
        edge(f"{axis}_{kind.lower()}", kind, axis, size, lower=lower == kind, upper=upper == kind)
        for axis, size, (lower, upper) in zip("xy", grid, boundary, strict=True)
        for kind in dict.fromkeys((lower, upper))
    )


def boundary_masks(groups: h5py.Group, where: str) -> tuple[BoundaryMask, ...]:
    """The boundary groups of a file, by name. Raises UserError for one that is not over x, y or both."""
    masks = []
    for name in groups:
        group = plain_group(groups, name, f"{where}: boundary {name}")
        kind = " ".join(texts(group.attrs["bc_type"])).upper()
        dims = tuple(texts(group.attrs["associated_dims"]))
        stored = plain_dataset(group, "mask", f"{where}: boundary {name}: mask")
        check_extent(stored, f"{where}: boundary {name}: mask")
        mask = np.asarray(stored[()], dtype=bool)
        if kind not in BOUNDARY_TYPES or mask.ndim != len(dims) or not set(dims) <= {"x", "y"}:
            raise UserError(
                f"{where}: boundary {name}: expected one of {', '.join(BOUNDARY_TYPES)} with a mask over x, y or both, "
                f"got {kind} with a mask of shape {mask.shape} over {', '.join(dims)}"
            )
        masks.append(BoundaryMask(name, kind, dims, mask))
    return tuple(masks)


def boundary_types(masks: Sequence[BoundaryMask]) -> Boundary:
    """Boundary type of the lower and upper end of each axis, coded as `the_well` does (its 'padding' type).

    An end is OPEN unless a group says otherwise: PERIODIC or OPEN if its mask holds anywhere on that end, WALL only if
    it holds on all of it; a later group (by name) overrides an earlier one.
    """
    sides = [["OPEN", "OPEN"], ["OPEN", "OPEN"]]
    for one in masks:
        holds = np.all if one.kind == "WALL" else np.any
        for axis, dim in enumerate(one.dims):
            for end, position in enumerate((0, -1)):
                if holds(one.mask.take(position, axis=axis)):
                    sides["xy".index(dim)][end] = one.kind
    return (sides[0][0], sides[0][1]), (sides[1][0], sides[1][1])
