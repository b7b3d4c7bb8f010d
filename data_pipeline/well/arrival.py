"""Whether a file of the Well has arrived whole: what can be told without its card and without reading its arrays."""

from pathlib import Path

import h5py

from data_pipeline.errors import UserError
from data_pipeline.well.addresses import PARTIAL_SUFFIX, load_yaml
from data_pipeline.well.hdf5_safety import plain_dataset, plain_group, texts


def damage(path: Path, size: int | None) -> str | None:
    """What is wrong with a file that has arrived, or None: its size, an HTML page, no HDF5, not the Well's layout."""
    found = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, most likely an error message of the server"
    if size is not None and found != size:
        return f"it holds {found} bytes where the server has {size}"
    if path.name.removesuffix(PARTIAL_SUFFIX).endswith(".yaml"):
        try:
            content = load_yaml(path)
        except UserError as error:
            return str(error)
        return None if isinstance(content, dict) and content else "it is no YAML mapping"
    try:
        with h5py.File(path, "r") as opened:
            return _layout_damage(opened)
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError) as error:
        return f"it is truncated or no HDF5 file ({error})"
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        return f"it is not in the Well's layout ({error})"


def _layout_damage(file: h5py.File) -> str | None:
    """Compares each field's shape with the trajectories, frames and grid that the file itself declares."""
    dimensions = plain_group(file, "dimensions", "dimensions")
    axes = texts(dimensions.attrs["spatial_dims"])
    num_trajectories = int(file.attrs["n_trajectories"])
    num_frames, *grid = (plain_dataset(dimensions, name, name).shape[-1] for name in ("time", *axes))
    if min(num_trajectories, num_frames, *grid) < 1:
        return f"it declares {num_trajectories} trajectories of {num_frames} frames on the grid {grid}"
    for order in range(3):
        group = plain_group(file, f"t{order}_fields", f"t{order}_fields")
        for name in texts(group.attrs["field_names"]):
            data = plain_dataset(group, name, f"field {name!r}")
            shape = (num_trajectories,) * bool(data.attrs["sample_varying"])
            shape += (num_frames,) * bool(data.attrs["time_varying"])
            shape += tuple(size for size, varies in zip(grid, data.attrs["dim_varying"], strict=True) if varies)
            shape += (len(grid),) * order
            if data.shape != shape:
                return f"its field {name!r} has the shape {data.shape} where the file declares {shape}"
    return None
