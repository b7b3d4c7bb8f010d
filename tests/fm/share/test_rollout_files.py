"""netCDF and zarr: read with other names and orders, written so that xarray reads them."""

import json
import pickle
import warnings
from pathlib import Path

import h5netcdf
import numpy as np
import pytest
import xarray
from forked import Forked

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.well.hdf5 import WellFile, split_files
from fm.model.wavelit import WaveLiTFM
from fm.share.rollout import RolloutRequest, predict_file
from fm.share.rollout_files import read_xarray

REGISTRY = load_registry()
NAME = "viscoelastic_instability"
CARD = REGISTRY.card(NAME)


def open_whole(path: Path) -> xarray.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return xarray.open_dataset(path, engine="zarr" if path.suffix == ".zarr" else "h5netcdf").load()


@pytest.fixture(scope="module")
def predicted(folder: str, tiny_well: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Well file that was predicted from, and the prediction as a Well file."""
    source = split_files(tiny_well / NAME, "train")[0]
    out = tmp_path_factory.mktemp("predicted") / "p.hdf5"
    return source, predict_file(folder, RolloutRequest(source, out, steps=3), progress=False)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_both_formats_hold_what_the_well_file_holds(
    folder: str, predicted: tuple[Path, Path], tmp_path: Path, suffix: str
) -> None:
    source, reference = predicted
    out = predict_file(folder, RolloutRequest(source, tmp_path / f"p{suffix}", steps=3), progress=False)
    found = open_whole(out)
    assert found["velocity_x"].dims == ("trajectory", "time", "x", "y")
    assert found["velocity_x"].attrs == {"units": "dimensionless", "long_name": "velocity along x"}
    assert found.attrs["prediction_steps"] == 3
    with WellFile(reference, CARD) as file:
        np.testing.assert_allclose(found["time"], file.times(0), rtol=1e-6)
        for axis, points in zip("xy", file.axes(), strict=True):
            np.testing.assert_allclose(found[axis], points)
        for one in range(file.num_trajectories):
            frames = file.read(one, 0, 4)
            for index, name in enumerate(CARD.state_channels):
                np.testing.assert_array_equal(found[name].values[one], frames[:, index])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    forced = RolloutRequest(source, out, steps=1, force=True)
    assert open_whole(predict_file(folder, forced, progress=False)).sizes["time"] == 2


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_file_with_the_wells_names_and_other_axes_gives_the_same(
    folder: str, predicted: tuple[Path, Path], tmp_path: Path, suffix: str
) -> None:
    source, reference = predicted
    with WellFile(source, CARD) as file:
        states = np.stack([file.read(one, 0, 9) for one in range(file.num_trajectories)])
        times, scalars = file.times(0), file.scalars(0)
    variables = {
        name: (("y", "member", "time", "x"), np.moveaxis(states[:, :, index], 3, 0))
        for index, name in enumerate(CARD.state_channels)
    }
    given = xarray.Dataset(variables, {"time": times}, {"dataset_name": NAME, **scalars})
    path = tmp_path / f"given{suffix}"
    given.to_netcdf(path, engine="h5netcdf") if suffix == ".nc" else given.to_zarr(path)
    out = predict_file(folder, RolloutRequest(path, tmp_path / "p.hdf5", steps=3), progress=False)
    with WellFile(reference, CARD) as expected, WellFile(out, CARD) as found:
        assert found.num_trajectories == len(states)
        for one in range(len(states)):
            np.testing.assert_array_equal(found.read(one, 0, 4), expected.read(one, 0, 4))
        assert found.scalars(0) == pytest.approx(scalars)
        assert found.boundary == CARD.boundary
    single = xarray.Dataset({name: (["x", "y"], states[1, 4, i]) for i, name in enumerate(CARD.state_channels)})
    single.to_netcdf(tmp_path / "single.nc", engine="h5netcdf")
    request = RolloutRequest(tmp_path / "single.nc", tmp_path / "q.nc", steps=1, dataset=NAME)
    later = open_whole(predict_file(folder, request, progress=False))
    assert later["C_xx"].shape == (1, 2, *states.shape[-2:])
    refused = {
        "got pressure": single[["pressure"]],
        "expected the dimensions x, y, maybe time and one": single.expand_dims(a=2, b=2),
        "--start: expected a frame from 0 to 0": single,
    }
    for message, dataset in refused.items():
        dataset.to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
        bad = RolloutRequest(
            tmp_path / "bad.nc", tmp_path / "r.nc", steps=1, dataset=NAME, start=int("--start" in message)
        )
        with pytest.raises(UserError, match=message):
            predict_file(folder, bad, progress=False)
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(UserError, match="cannot be read as nc by xarray"):
        predict_file(folder, RolloutRequest(tmp_path / "text.nc", tmp_path / "r.nc", steps=1), progress=False)


def test_units_and_calendars_of_the_axes_survive(folder: str, predicted: tuple[Path, Path], tmp_path: Path) -> None:
    with WellFile(predicted[0], CARD) as file:
        states = file.read(0, 0, 4)
    variables = {name: (("time", "x", "y"), states[:, index]) for index, name in enumerate(CARD.state_channels)}
    days = {"units": "days since 0001-01-01", "calendar": "noleap", "standard_name": "time"}
    meters = {"units": "m", "long_name": "downstream"}
    points = np.arange(states.shape[2]) * 0.25
    given = xarray.Dataset(
        variables, {"time": ("time", [730000, 730001, 730004, 730005], days), "x": ("x", points, meters)}
    )
    given.to_netcdf(tmp_path / "given.nc", engine="h5netcdf")
    for suffix in (".nc", ".zarr", ".hdf5"):
        request = RolloutRequest(tmp_path / "given.nc", tmp_path / f"p{suffix}", steps=5, dataset=NAME, start=1)
        out = predict_file(folder, request, progress=False)
        if suffix == ".hdf5":
            with WellFile(out, CARD) as file:
                times, found = file.times(0), file.axis_attributes()
                assert (found["time"], found["x"]) == (days, meters)
        else:
            found = xarray.open_dataset(out, engine="zarr" if suffix == ".zarr" else "h5netcdf", decode_times=False)
            times = found["time"].values
            assert (found["time"].attrs, found["x"].attrs) == (days, meters)
        np.testing.assert_array_equal(times, 730000 + np.array([1, 4, 5, 6, 7, 8]))


def test_axes_that_are_not_straight_are_refused(folder: str, tmp_path: Path) -> None:
    values = {name: (["x", "y"], np.ones((16, 16), np.float32)) for name in CARD.state_channels}
    request = RolloutRequest(tmp_path / "given.nc", tmp_path / "p.nc", steps=1, dataset=NAME)
    named = xarray.Dataset(values, {"x": [f"p{number}" for number in range(16)]})
    named.to_netcdf(tmp_path / "given.nc", engine="h5netcdf")
    with pytest.raises(UserError, match="x: expected one number per point along it"):
        predict_file(folder, request, progress=False)
    with h5netcdf.File(tmp_path / "given.nc", "w") as file:
        file.dimensions = {"x": 16, "y": 16}
        file.create_variable("x", ("x", "y"), data=np.ones((16, 16)))
        for name in CARD.state_channels:
            file.create_variable(name, ("x", "y"), data=np.ones((16, 16), np.float32))
    with pytest.raises(UserError, match=r"x: expected one number per point along it, .* \(16, 16\); interpolate"):
        predict_file(folder, request, progress=False)


def test_variables_may_have_the_wells_names(tmp_path: Path) -> None:
    """Where a card gives its fields other channels: field `flow`, components flow_x and flow_y."""
    (tmp_path / "cards" / "datasets").mkdir(parents=True)
    (tmp_path / "cards" / "datasets" / "mine.yaml").write_text(
        "{name: mine, description: a flow, state: {t0: {p: [pressure]}, t1: {flow: [velocity_x, velocity_y]}}, "
        "boundary: {x: [PERIODIC, PERIODIC], y: [WALL, OPEN]}, grid: [4, 6], dt: 1}"
    )
    values = {name: (["x", "y"], np.full((4, 6), index, np.float32)) for index, name in enumerate(["flow_y", "p"])}
    given = xarray.Dataset({**values, "velocity_x": (["x", "y"], np.full((4, 6), 7.0))})
    given.to_netcdf(tmp_path / "given.nc", engine="h5netcdf")
    registry = load_registry(tmp_path / "cards")
    initial = read_xarray(tmp_path / "given.nc", registry, "mine", None, 0, 1)
    assert initial.frames[0, 0, :, 0, 0].tolist() == [1, 7, 0]
    assert initial.dt is None
    assert [(one.name, one.mask.tolist()) for one in initial.setting.boundaries[1:]] == [
        ("y_wall", [True, False, False, False, False, False]),
        ("y_open", [False, False, False, False, False, True]),
    ]
    given.rename(velocity_x="u").to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    with pytest.raises(UserError, match=r"expected the variables of mine: pressure \(or p\), velocity_x \(or flow_x\)"):
        read_xarray(tmp_path / "bad.nc", registry, "mine", None, 0, 1)


def test_in_python_a_dataset_is_enough(folder: str, predicted: tuple[Path, Path], tmp_path: Path) -> None:
    """The lines of fm/share/rollout.py."""
    source, _ = predicted
    path = predict_file(folder, RolloutRequest(source, tmp_path / "p.nc", steps=3), progress=False)
    model = WaveLiTFM.from_pretrained(folder)
    state = xarray.open_dataset(path).isel(time=0)
    model.predict(state, NAME, steps=3).to_netcdf(tmp_path / "predicted.nc", engine="h5netcdf")
    again, first = open_whole(tmp_path / "predicted.nc"), open_whole(path)
    np.testing.assert_array_equal(again["C_xy"], first["C_xy"].isel(time=slice(1, None)))


def test_without_xarray_the_way_to_get_it_is_told(folder: str, maze: Path, tmp_path: Path) -> None:
    script = tmp_path / "fm.py"
    script.write_text("import sys; sys.modules['xarray'] = None; from fm.cli import main; sys.exit(main(sys.argv[1:]))")
    arguments = ["rollout", folder, "--input", str(maze), "--steps", "1", "--out", str(tmp_path / "p.nc")]
    process = Forked(script, *arguments)
    _, said = process.communicate()
    assert process.returncode == 2
    assert "install them with `launch/setup xarray`" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressor": {"id": "pickle"}}, "time: expected codecs of numbers, got 'pickle'"),
        ({"filters": [{"id": "json2"}]}, "time: expected codecs of numbers, got 'json2'"),
        ({"dtype": "|O"}, "time: it holds Python objects, which are not loaded because they can run code"),
        ({"shape": [10**12]}, "expected at most 1048576 points along an axis"),
    ],
)
def test_a_zarr_folder_is_opened_only_if_it_holds_plain_numbers(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "states.zarr"
    xarray.Dataset(coords={"time": np.zeros(3)}).to_zarr(path, zarr_format=2, consolidated=True)
    file, ran = path / "time" / ".zarray", tmp_path / "ran"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (path / "time" / "0").write_bytes(pickle.dumps([[Touch(ran)], "|O", (1,)]))
    with pytest.raises(UserError, match=message):
        read_xarray(path, REGISTRY, NAME, None, 0, 1)
    assert not ran.exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)
