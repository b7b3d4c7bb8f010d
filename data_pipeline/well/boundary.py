"""Boundary types at the ends of the axes, from the masks of a Well file."""

import h5py
import numpy as np

from data_pipeline.cards.registry import BOUNDARY_TYPES, Boundary
from data_pipeline.errors import UserError
from data_pipeline.well.hdf5_safety import check_extent, plain_dataset, plain_group, texts


def boundary_types(groups: h5py.Group, where: str) -> Boundary:
    """Boundary type of the lower and upper end of each axis, coded as `the_well` does (its 'padding' type).

    An end is OPEN unless a group says otherwise: PERIODIC or OPEN if its mask holds anywhere on that end, WALL only if
    it holds on all of it; a later group (by name) overrides an earlier one.
    """
    sides = [["OPEN", "OPEN"], ["OPEN", "OPEN"]]
    for name in groups:
        group = plain_group(groups, name, f"{where}: boundary {name}")
        kind = " ".join(texts(group.attrs["bc_type"])).upper()
        dims = texts(group.attrs["associated_dims"])
        stored = plain_dataset(group, "mask", f"{where}: boundary {name}: mask")
        check_extent(stored, f"{where}: boundary {name}: mask")
        mask = np.asarray(stored[()], dtype=bool)
        if kind not in BOUNDARY_TYPES or mask.ndim != len(dims) or not set(dims) <= {"x", "y"}:
            raise UserError(
                f"{where}: boundary {name}: expected one of {', '.join(BOUNDARY_TYPES)} with a mask over x, y or both, "
                f"got {kind} with a mask of shape {mask.shape} over {', '.join(dims)}"
            )
        holds = np.all if kind == "WALL" else np.any
        for axis, dim in enumerate(dims):
            for end, position in enumerate((0, -1)):
                if holds(mask.take(position, axis=axis)):
                    sides["xy".index(dim)][end] = kind
    return (sides[0][0], sides[0][1]), (sides[1][0], sides[1][1])
