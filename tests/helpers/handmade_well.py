"""Well files with values that a test makes up, for any card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import yaml

from data_pipeline.registry import Card


@dataclass(frozen=True)
class StoredField:
    """A field as it lies in a file: ([n,] [T,] H, W[, components]), float32."""

    order: int
    values: np.ndarray
    time_varying: bool = True
    sample_varying: bool = True


def write_layout(
    path: Path,
    fields: Mapping[str, StoredField],
    grid: tuple[int, int],
    num_trajectories: int,
    time: np.ndarray,
    scalars: Mapping[str, float] | None = None,
    boundary: Mapping[str, str] | None = None,
) -> Path:
    """One HDF5 file in the Well's layout; scalars of the whole file; boundary: axis -> type of both its ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs.update({"grid_type": "cartesian", "n_spatial_dims": 2, "n_trajectories": num_trajectories})
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = _texts(["x", "y"])
        for name, points in (("time", time), *zip("xy", map(np.arange, grid), strict=True)):
            dimensions[name] = np.float32(points)
            dimensions[name].attrs["sample_varying"] = False
        file.create_group("scalars").attrs["field_names"] = _texts(list(scalars or {}))
        for name, value in (scalars or {}).items():
            file["scalars"][name] = np.float32(value)
            file["scalars"][name].attrs.update({"sample_varying": False, "time_varying": False})
        for order in range(3):
            own = {name: field for name, field in fields.items() if field.order == order}
            group = file.create_group(f"t{order}_fields")
            group.attrs["field_names"] = _texts(list(own))
            for name, field in own.items():
                group[name] = np.float32(field.values)
                varying = {"time_varying": field.time_varying, "sample_varying": field.sample_varying}
                group[name].attrs.update({"dim_varying": [True, True], **varying})
        file.create_group("boundary_conditions")
        for axis, kind in (boundary or {}).items():
            entry = file["boundary_conditions"].create_group(f"{axis}_{kind}")
            entry.attrs.update({"bc_type": kind, "associated_dims": _texts([axis])})
            entry["mask"] = np.isin(np.arange(grid["xy".index(axis)]), (0, grid["xy".index(axis)] - 1))
    return path


def _texts(names: Sequence[str]) -> np.ndarray:
    return np.array(names, dtype=h5py.string_dtype())


def write_file(path: Path, card: Card, state: np.ndarray, constants: np.ndarray | None = None) -> Path:
    """One file of a card's fields, without boundaries or scalars.

    state: (n, T, C, H, W) in the card's channels; constants: (n, K, H, W).
    """
    fields = {}
    for field in card.fields:
        values, names = (state, card.state_channels) if field.role == "state" else (constants, card.constant_channels)
        assert values is not None
        chosen = values[..., [names.index(channel) for channel in field.channels], :, :]
        stored = np.moveaxis(chosen, -3, -1).reshape(*values.shape[:-3], *values.shape[-2:], *(2,) * field.order)
        fields[field.name] = StoredField(field.order, stored, time_varying=field.role == "state")
    count, frames, _, height, width = state.shape
    write_layout(path, fields, (height, width), count, np.arange(frames))
    with h5py.File(path, "r+") as file:
        file.attrs["dataset_name"] = card.name
    return path


def write_stats(folder: Path, card: Card, figures: Mapping[str, Sequence[float]]) -> None:
    """stats.yaml of a dataset's folder; figures: statistic -> value of each channel, state then constant."""
    content = {}
    for statistic, values in figures.items():
        by_channel = dict(zip(card.state_channels + card.constant_channels, map(float, values), strict=False))
        fields = card.state if statistic.endswith("_delta") else card.fields
        content[statistic] = {field.name: [by_channel[channel] for channel in field.channels] for field in fields}
    (folder / "stats.yaml").write_text(yaml.safe_dump(content))


def spread(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float32 in [0, 1) by integer arithmetic: the same everywhere, whatever the library."""
    numbers = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed * 1_000_003 + 1)
    mixed = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed.astype(np.float32) / np.float32(2**24)).reshape(shape)
