"""A Well file written frame by frame is read as it was written."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray
from handmade_well import spread
from well_rules import broken_rules

from data_pipeline import write_well
from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.well.hdf5 import Setting, WellFile, read_attributes, read_setting
from data_pipeline.well.layout import edges
from data_pipeline.well.write import WellWriter

CARDS = load_registry().cards


@pytest.mark.parametrize("dataset", ["active_matter", "acoustic_scattering_maze"])
def test_what_is_written_is_read(tmp_path: Path, dataset: str) -> None:
    card = CARDS[dataset]
    grid, states = (6, 10), spread((2, 3, len(card.state_channels), 6, 10))
    setting = Setting(
        card=card,
        x=np.linspace(0, 1, 6),
        y=np.linspace(-2, 2, 10),
        constants=spread((2, len(card.constant_channels), *grid), seed=1),
        scalars={"same": np.array([0.5, 0.5]), "other": np.array([1.0, 2.0])},
        boundaries=edges(card.boundary, grid),
    )
    times = np.array([[0.0, 0.5, 1.0], [2.0, 2.5, 3.0]])
    with WellWriter(tmp_path / "file.hdf5", setting, times) as writer:
        for index in range(3):
            writer.write(index, states[:, index])
        writer.describe({"told": "yes"})
    assert read_attributes(tmp_path / "file.hdf5")["told"] == "yes"
    assert broken_rules(tmp_path / "file.hdf5") == []
    with WellFile(tmp_path / "file.hdf5", card) as file:
        assert file.boundary == card.boundary
        again = read_setting(file, [1, 0])
        for one in range(2):
            np.testing.assert_array_equal(file.read(one, 0, 3), states[one])
            np.testing.assert_array_equal(file.times(one), times[one])
    np.testing.assert_array_equal(again.constants, setting.constants[::-1])
    assert {name: values.tolist() for name, values in again.scalars.items()} == {"same": [0.5, 0.5], "other": [2, 1]}
    np.testing.assert_allclose(again.y, setting.y, rtol=1e-6)


def test_a_mask_inside_the_grid_survives(tmp_path: Path, tiny_well: Path) -> None:
    """Obstacles of the staircase: no type at an end of an axis says where they are."""
    card = CARDS["helmholtz_staircase"]
    source = next((tiny_well / card.name / "data" / "test").iterdir())
    with WellFile(source, card) as file:
        setting, frames = read_setting(file, [0]), file.read(0, 0, 1)
    with WellWriter(tmp_path / "copy.hdf5", setting, np.zeros((1, 1))) as writer:
        writer.write(0, frames)
    with h5py.File(source) as one, h5py.File(tmp_path / "copy.hdf5") as other:
        assert list(one["boundary_conditions"]) == list(other["boundary_conditions"])
        for name, group in one["boundary_conditions"].items():
            np.testing.assert_array_equal(group["mask"], other["boundary_conditions"][name]["mask"])
            assert dict(group.attrs).keys() == dict(other["boundary_conditions"][name].attrs).keys()


def test_attributes_of_what_is_no_file_of_the_well(tmp_path: Path) -> None:
    (tmp_path / "text.hdf5").write_text("no HDF5")
    for name, message in (("gone.hdf5", "found none"), ("", "found a folder"), ("text.hdf5", "truncated or no HDF5")):
        with pytest.raises(UserError, match=message):
            read_attributes(tmp_path / name)


SHAPE = (6, 3, 4, 8)  # trajectories, frames, points along x and y
VALUES = spread(SHAPE)
AXES = {"t": np.arange(3) * 0.5, "x": np.linspace(0, 1, 4), "y": np.linspace(0, 2, 8)}
BOUNDARY = {"x": "periodic", "y": ("wall", "open")}


def test_write_well_takes_arrays(tmp_path: Path) -> None:
    vector, constant = spread((*SHAPE, 2), 1), spread((6, 4, 8), 2)
    folder = write_well(
        *(tmp_path, "mine", {"velocity": vector, "p": VALUES.astype(np.float64)}),
        **AXES,
        boundary=BOUNDARY,
        constants={"depth": constant, "mask": constant[0]},
        scalars={"nu": np.arange(6), "k": 2},
        units={"p": "Pa"},
        split={"train": [4, 1], "test": [0]},
    )
    assert folder == tmp_path / "mine"
    assert sorted(path.name for path in folder.rglob("*.hdf5")) == ["mine.hdf5"] * 2
    for split, chosen in (("train", [4, 1]), ("test", [0])):
        path = folder / "data" / split / "mine.hdf5"
        assert broken_rules(path) == []
        with h5py.File(path) as file:
            assert np.array_equal(file["t0_fields/p"], VALUES[chosen])
            assert np.array_equal(file["t1_fields/velocity"], vector[chosen])
            assert np.array_equal(file["t0_fields/depth"], constant[chosen])
            assert np.atleast_1d(file["scalars/nu"]).tolist() == chosen
            assert file["t0_fields/p"].attrs["units"] == "Pa"
            assert (file["scalars/k"][()], file.attrs["k"]) == (2, 2)


def test_write_well_takes_xarray_in_any_order(tmp_path: Path) -> None:
    given = xarray.Dataset(
        {"u": (("y", "x", "time", "sample"), VALUES.transpose(3, 2, 1, 0), {"units": "m/s"})},
        {"time": np.datetime64("2020-01-01") + np.arange(3), "x": AXES["x"], "y": AXES["y"]},
    )
    write_well(tmp_path, "mine", given, boundary=BOUNDARY, split=(1, 0, 0))
    late = AXES["t"] + 1.6e9  # seconds since 1970: float32 cannot tell the frames apart
    write_well(tmp_path, "also", {"u": given["u"]}, late, AXES["x"], AXES["y"], boundary=BOUNDARY, split=(1, 0, 0))
    with h5py.File(tmp_path / "also/data/train/also.hdf5") as file:
        assert np.array_equal(file["t0_fields/u"], VALUES)
        assert file["dimensions/time"][:].tolist() == AXES["t"].tolist()
    with h5py.File(tmp_path / "mine/data/train/mine.hdf5") as file:
        assert np.array_equal(file["t0_fields/u"], VALUES)
        assert file["dimensions/time"][:].tolist() == [0, 86400, 2 * 86400]
        assert file["t0_fields/u"].attrs["units"] == "m/s"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fields": {"u": VALUES.swapaxes(2, 3)}}, r"u: expected the shape \(6, 3, 4, 8\).*got \(6, 3, 8, 4\)"),
        ({"fields": {"u": np.ma.masked_greater(VALUES, 0.99)}}, "u: expected a value at every point, got masked ones"),
        ({"fields": {"u": np.where(VALUES > 0.99, np.nan, VALUES)}}, r"trajectory \d, frame \d, u: .* NaN"),
        ({"fields": {"u": VALUES + 0j}}, "u: expected real numbers, got complex.*two fields"),
        (
            {"fields": xarray.Dataset({"m": (("x", "y"), VALUES[0, 0])})},
            "m: expected the dimensions time, x, y.*got x, y",
        ),
        ({"fields": {"u v": VALUES}}, "field 'u v': expected up to 64 letters"),
        ({"t": [0, 1, 3]}, "expected evenly spaced times, got steps from 1 to 2"),
        ({"t": None}, "expected the times t and the grid points x and y, got no t; pass it"),
        ({"x": [0, 1, 3, 2]}, "x: expected at least 2 points that increase"),
        ({"boundary": {"x": "periodic"}}, "boundary of y: expected periodic, wall or open"),
        ({"scalars": {"nu": [1, 2, 3]}}, "scalar nu: expected a number, or 6 of them"),
        ({"split": (0.5, 0.5)}, "split: expected 3 fractions"),
        ({"split": {"train": [0, 9]}}, "split: expected trajectories from 0 to 5"),
        ({"units": {"v": "m"}}, "units: expected names of fields"),
    ],
)
def test_write_well_refuses_what_does_not_fit_and_leaves_nothing(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    arguments = {"fields": {"u": VALUES}, **AXES, "boundary": BOUNDARY, **changed}
    with pytest.raises(UserError, match=message):
        write_well(tmp_path / "out", "mine", **arguments)
    assert not list(tmp_path.rglob("*.hdf5*"))
    assert not list(tmp_path.rglob("mine*"))
