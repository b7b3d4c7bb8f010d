"""The parts of an HDF5 file in the Well's layout, as they are written.

Layout: the Well's data format (Ohana et al. 2024, "The Well"; docs/data_format.md of its repository) as
`the_well.data.WellDataset` 1.2 reads it: many trajectories of one parameter set in a file, float32, fields of tensor
order 0, 1, 2 in groups t0_fields, t1_fields, t2_fields, axis 0 = x, axis 1 = y.
"""

from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from data_pipeline.well.boundary import BoundaryMask


def strings(names: Sequence[str]) -> np.ndarray:
    """Names as an attribute; an empty list would become an array of float64."""
    return np.array(list(names), dtype=h5py.string_dtype())


def write_root(file: h5py.File, dataset: str, num_trajectories: int, scalars: Sequence[str]) -> None:
    """The attributes of a file; `scalars` are names."""
    file.attrs["dataset_name"] = dataset
    file.attrs["grid_type"] = "cartesian"
    file.attrs["n_spatial_dims"] = 2
    file.attrs["n_trajectories"] = num_trajectories
    file.attrs["simulation_parameters"] = strings(scalars)


def write_dimensions(file: h5py.File, time: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Points of the axes: time (T,), or (n, T) where it varies between trajectories; x (X,), y (Y,)."""
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = strings(["x", "y"])
    for name, values in (("time", time), ("x", x), ("y", y)):
        dataset = group.create_dataset(name, data=values.astype(np.float32))
        dataset.attrs["sample_varying"] = values.ndim == 2
        if name != "time":
            dataset.attrs["time_varying"] = False


def write_scalars(file: h5py.File, scalars: Mapping[str, float | np.ndarray]) -> None:
    """Constant scalars; an array (n,) where one varies between trajectories."""
    group = file.create_group("scalars")
    group.attrs["field_names"] = strings(list(scalars))
    for name, value in scalars.items():
        dataset = group.create_dataset(name, data=np.float32(value))
        dataset.attrs["sample_varying"] = np.ndim(value) == 1
        dataset.attrs["time_varying"] = False


def mark_field(dataset: h5py.Dataset, sample_varying: bool, time_varying: bool) -> None:
    """The flags of a field that is there at every point of the grid."""
    dataset.attrs["dim_varying"] = [True, True]
    dataset.attrs["sample_varying"] = sample_varying
    dataset.attrs["time_varying"] = time_varying


def write_boundary(group: h5py.Group, boundary: BoundaryMask) -> None:
    """One boundary group."""
    entry = group.create_group(boundary.name)
    entry.attrs["bc_type"] = boundary.kind
    entry.attrs["associated_dims"] = strings(boundary.dims)
    entry.attrs["associated_fields"] = strings([])
    entry.attrs["sample_varying"] = False
    entry.attrs["time_varying"] = False
    entry.create_dataset("mask", data=boundary.mask)
