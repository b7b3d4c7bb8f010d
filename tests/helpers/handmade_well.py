"""Well files with values that a test makes up, for any card."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import yaml

from data_pipeline.cards.card import Card


def write_file(path: Path, card: Card, state: np.ndarray, constants: np.ndarray | None = None) -> Path:
    """One HDF5 file in the Well's layout, without boundaries or scalars.

    state: (n, T, C, H, W) in the card's channels; constants: (n, K, H, W). Stored as float32.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count, frames, _, *grid = state.shape
    with h5py.File(path, "w") as file:
        file.attrs["n_trajectories"] = count
        file.create_group("dimensions").attrs["spatial_dims"] = ["x", "y"]
        for name, size in (("time", frames), ("x", grid[0]), ("y", grid[1])):
            file["dimensions"][name] = np.arange(size, dtype=np.float32)
        file.create_group("scalars").attrs["field_names"] = []
        file.create_group("boundary_conditions")
        for order in range(3):
            group = file.create_group(f"t{order}_fields")
            names = [field.name for field in card.fields if field.order == order]
            group.attrs["field_names"] = np.array(names, dtype=h5py.string_dtype())
        for fields, names, values in (
            (card.state_fields, card.state_channels, state),
            (card.constant_fields, card.constant_channels, constants),
        ):
            for field in fields:
                assert values is not None
                chosen = values[..., [names.index(channel) for channel in field.channels], :, :]
                stored = np.moveaxis(chosen, -3, -1).reshape(*values.shape[:-3], *grid, *(2,) * field.order)
                data = file[f"t{field.order}_fields"].create_dataset(field.name, data=stored.astype(np.float32))
                varying = {"time_varying": field.role == "state", "sample_varying": True, "dim_varying": [True, True]}
                data.attrs.update(varying)
    return path


def write_stats(folder: Path, card: Card, figures: Mapping[str, Sequence[float]]) -> None:
    """stats.yaml of a dataset's folder; figures: statistic -> value of each channel, state then constant."""
    content = {}
    for statistic, values in figures.items():
        by_channel = dict(zip(card.state_channels + card.constant_channels, map(float, values), strict=False))
        fields = card.state_fields if statistic.endswith("_delta") else card.fields
        content[statistic] = {field.name: [by_channel[channel] for channel in field.channels] for field in fields}
    (folder / "stats.yaml").write_text(yaml.safe_dump(content))


def spread(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float32 in [0, 1) by integer arithmetic: the same everywhere, whatever the library."""
    numbers = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed * 1_000_003 + 1)
    mixed = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed.astype(np.float32) / np.float32(2**24)).reshape(shape)
