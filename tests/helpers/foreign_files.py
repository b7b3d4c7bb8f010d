"""Small files as other programs lay them out, from one array (n, t, x, y) of values that tell their place.

The structures are those of the programs' own files: exponax arrays, PDEBench's diffusion-reaction and compressible
flow, PDEArena's Navier-Stokes, py-pde's FileStorage, and xarray's netCDF and zarr.
"""

import json
from pathlib import Path

import h5py
import numpy as np
import xarray
from handmade_well import spread

N, T, X, Y = 4, 5, 8, 6
TRUTH = spread((N, T, X, Y))
OTHER = spread((N, T, X, Y), seed=1)
TIMES = np.arange(T) * 0.25
POINTS = {"x": np.arange(X) / X, "y": np.arange(Y) / Y}


def npz(path: Path, **more: np.ndarray) -> Path:
    np.savez_compressed(path, u=TRUTH, v=OTHER, t=TIMES, **POINTS, **more)
    return path


def dataset(dims: tuple[str, ...] = ("sample", "time", "y", "x"), coordinates: bool = True) -> xarray.Dataset:
    """u and v with units, over dims of these names in the order n, t, y, x."""
    swapped = {"u": TRUTH.swapaxes(2, 3), "v": OTHER.swapaxes(2, 3)}
    attrs = {"units": "m s-1", "long_name": "speed"}
    coords = {dims[1]: TIMES, dims[2]: POINTS["y"], dims[3]: POINTS["x"]} if coordinates else {}
    variables = {name: (dims, values, attrs) for name, values in swapped.items()}
    return xarray.Dataset(variables, coords, {"nu": 0.0015, "title": "Burgers"})


def netcdf(path: Path, **given: object) -> Path:
    dataset(**given).to_netcdf(path, engine="h5netcdf")  # type: ignore[arg-type]
    return path


def pdebench(path: Path) -> Path:
    """Groups <seed>/data (t, y, x, component) with the grid beside it."""
    with h5py.File(path, "w") as file:
        for number in range(N):
            group = file.create_group(f"{number:04d}")
            group["data"] = np.stack([TRUTH[number], OTHER[number]], -1).swapaxes(1, 2)
            for axis, points in (("t", TIMES), *POINTS.items()):
                group[f"grid/{axis}"] = np.float32(points)
    return path


def pdebench_flow(path: Path) -> Path:
    """Arrays (n, t, x, y) with coordinates; PDEBench's list of times has one more than there are frames."""
    with h5py.File(path, "w") as file:
        file["Vx"], file["Vy"], file["density"] = TRUTH, OTHER, 1 + TRUTH
        file["t-coordinate"] = np.arange(T + 1) * 0.25
        file["x-coordinate"], file["y-coordinate"] = POINTS["x"], POINTS["y"]
        file.attrs.update({"eta": 0.1, "zeta": 0.01})
    return path


def pdearena(path: Path, splits: dict[str, slice]) -> Path:
    """Smoke u in a box, its velocity, and the buoyancy of each trajectory."""
    with h5py.File(path, "w") as file:
        for split, chosen in splits.items():
            values = {"u": TRUTH[chosen], "vx": OTHER[chosen], "vy": -OTHER[chosen]}
            count = len(values["u"])
            shared = {"t": np.linspace(18, 18 + T * 0.25, T), **POINTS}  # as theirs: T steps over T - 1 intervals
            values |= {axis: np.tile(points, (count, 1)) for axis, points in shared.items()}
            values |= {"dt": np.full(count, 0.25), "buo_y": 0.2 + 0.1 * np.arange(count)}
            for name, array in values.items():
                file[f"{split}/{name}"] = array
    return path


def pypde(path: Path, number: int, collection: bool = False, preallocated: int = 0) -> Path:
    """One run: data as float64, and attributes as texts of JSON within JSON."""
    grid = {"bounds": [[0.0, 1.0], [0.0, 1.0]], "shape": [X, Y], "periodic": [True, False], "class": "CartesianGrid"}
    scalar = {"class": "ScalarField", "grid": json.dumps(grid), "label": "c", "dtype": "<f8"}
    described = {key: value if key == "grid" else json.dumps(value) for key, value in scalar.items()}
    data = TRUTH[number]
    if collection:
        vector = {**described, "class": json.dumps("VectorField"), "label": json.dumps("v")}
        fields = json.dumps([described, vector])
        described = {
            "class": json.dumps("FieldCollection"),
            "label": "null",
            "dtype": json.dumps("<f8"),
            "fields": fields,
        }
        data = np.stack([TRUTH[number], OTHER[number], -OTHER[number]], 1)
    with h5py.File(path, "w") as file:
        room = ((0, preallocated), *((0, 0) for _ in data.shape[1:]))
        file["data"] = np.pad(data.astype(np.float64), room)
        file["times"] = np.pad(TIMES, (0, preallocated))
        width = str(1 + number / 8)
        file.attrs.update({"data_length": str(T), "field_attributes": json.dumps(described), "interface_width": width})
    return path
