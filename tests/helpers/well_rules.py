"""The rules of The Well's own checkers (scripts/check_thewell_formatting.py and check_thewell_data.py), restated."""

from pathlib import Path

import h5py
import numpy as np


def broken_rules(path: Path) -> list[str]:
    """What the two scripts would complain about in a file: flags, shapes, names of parameters, boundaries, NaN."""
    with h5py.File(path) as file:
        return [*_header(file), *_arrays(file), *_boundaries(file)]


def _header(file: h5py.File) -> list[str]:
    kinds = {"dataset_name": str, "grid_type": str, "n_spatial_dims": np.integer, "n_trajectories": np.integer}
    broken = [f"{name}: {file.attrs.get(name)!r}" for name, kind in kinds.items() if not _is(file.attrs, name, kind)]
    for name in file.attrs["simulation_parameters"]:
        if not isinstance(name, str) or name not in file.attrs or name not in file["scalars"]:
            broken.append(f"simulation parameter {name!r} is no attribute of the file, or no scalar")
    return broken


def _arrays(file: h5py.File) -> list[str]:
    broken = []
    axes = list(file["dimensions"].attrs["spatial_dims"])
    sizes = {axis: file["dimensions"][axis].shape[-1] for axis in axes}
    if len(axes) != file.attrs["n_spatial_dims"]:
        broken.append(f"spatial_dims {axes}")
    groups = {"dimensions": ["time", *axes], **{f"t{order}_fields": None for order in range(3)}, "scalars": None}
    for group, names in groups.items():
        for name in file[group].attrs["field_names"] if names is None else names:
            data = file[group][name]
            flags = [data.attrs.get(flag) for flag in ("sample_varying", "time_varying")]
            if not all(isinstance(flag, np.bool_) for flag in flags):
                broken.append(f"{data.name}: sample_varying, time_varying are {flags}")
                continue
            shape = (file.attrs["n_trajectories"],) * bool(flags[0])
            shape += (file["dimensions/time"].shape[-1],) * bool(flags[1])
            found = data.shape[:-1] if group == "dimensions" and name != "time" else data.shape
            if group.endswith("_fields"):
                shape += tuple(
                    sizes[axis] for axis, varies in zip(axes, data.attrs["dim_varying"], strict=True) if varies
                )
                shape += (len(axes),) * int(group[1])
                if np.isnan(data[()]).any():
                    broken.append(f"{data.name} holds NaN")
            if found != shape:
                broken.append(f"{data.name} has the shape {found}, expected {shape}")
    return broken


def _boundaries(file: h5py.File) -> list[str]:
    broken = []
    for group in file["boundary_conditions"].values():
        dims = list(group.attrs["associated_dims"])
        flags = [group.attrs.get(flag) for flag in ("sample_varying", "time_varying")]
        shape = tuple(file["dimensions"][dim].shape[-1] for dim in dims)
        if not all(isinstance(flag, np.bool_) and not flag for flag in flags) or group["mask"].shape != shape:
            broken.append(f"{group.name}: flags {flags}, mask {group['mask'].shape}, expected {shape}")
        if not _is(group.attrs, "bc_type", str) or group.attrs["bc_type"] != group.attrs["bc_type"].upper():
            broken.append(f"{group.name}: bc_type {group.attrs.get('bc_type')!r}")
        if group.attrs.get("associated_fields") is None:
            broken.append(f"{group.name}: no associated_fields")
    return broken


def _is(attrs: h5py.AttributeManager, name: str, kind: type) -> bool:
    return isinstance(attrs.get(name), kind)
