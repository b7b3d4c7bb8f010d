"""A Well file written frame by frame is read as it was written."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from handmade_well import spread

from data_pipeline.files import UserError
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
