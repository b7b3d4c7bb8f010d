"""Prediction on fields by name: numpy, tensors, xarray; errors and warnings."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from handmade import make_inputs, make_spec, stir

from fm.model.fields import FieldsWarning
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM

NAME = "acoustic_scattering_maze"
SPEC = make_spec(NAME)
NAMES = (*SPEC.state_channels, *SPEC.constant_channels)


@pytest.fixture(scope="module")
def model() -> WaveLiTFM:
    return stir(WaveLiTFM(ModelConfig(16, 1, 2), [SPEC]))


def raw_fields(model: WaveLiTFM, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """State (B, C, H, W) and constants (B, K, H, W) in physical units."""
    state, constants = make_inputs(SPEC, batch=size)
    moments = model._moments(NAME)
    return model.denormalize(state, NAME), constants * moments.constant_std + moments.constant_mean


def by_name(state: torch.Tensor, constants: torch.Tensor) -> dict[str, torch.Tensor]:
    both = torch.cat([state, constants], dim=1)
    return {name: both[:, index] for index, name in enumerate(NAMES)}


def expected(model: WaveLiTFM, state: torch.Tensor, constants: torch.Tensor, steps: int) -> torch.Tensor:
    return torch.stack(list(model.iterate(state, constants, NAME, steps)), dim=1)  # (B, T, C, H, W)


def test_tensors_in_any_order_give_tensors(model: WaveLiTFM) -> None:
    state, constants = raw_fields(model)
    fields = by_name(state, constants)
    predicted = model.predict(dict(reversed(fields.items())), NAME, steps=3)
    truth = expected(model, state, constants, 3)
    assert list(predicted) == list(SPEC.state_channels)
    for index, name in enumerate(SPEC.state_channels):
        assert torch.equal(predicted[name], truth[:, :, index])


def test_one_state_of_numpy_arrays_has_no_batch_axis(model: WaveLiTFM) -> None:
    state, constants = raw_fields(model, 1)
    fields = {name: array[0].numpy().astype(np.float64) for name, array in by_name(state, constants).items()}
    predicted = model.predict(fields, NAME, steps=2)
    truth = expected(model, state, constants, 2)[0]
    for index, name in enumerate(SPEC.state_channels):
        assert isinstance(predicted[name], np.ndarray)
        np.testing.assert_array_equal(predicted[name], truth[:, index].numpy())


def test_constants_may_be_shared_by_a_batch(model: WaveLiTFM) -> None:
    state, constants = raw_fields(model, 3)
    constants[1:] = constants[0]
    fields = by_name(state, constants)
    shared = {name: array[0] if name in SPEC.constant_channels else array for name, array in fields.items()}
    one, other = model.predict(fields, NAME), model.predict(shared, NAME)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rollout_yields_the_same_states_one_by_one_and_without_end(model: WaveLiTFM) -> None:
    fields = by_name(*raw_fields(model))
    series = model.predict(fields, NAME, steps=4)
    endless = model.rollout(fields, NAME)
    for step in range(4):
        state = next(endless)
        assert all(torch.equal(state[name], series[name][:, step]) for name in series)
    assert len(list(model.rollout(fields, NAME, steps=4))) == 4


def dataset(fields: dict[str, torch.Tensor], **coords: Any) -> xarray.Dataset:
    variables = {name: (("member", "x", "y"), array.numpy()) for name, array in fields.items()}
    for name in SPEC.constant_channels:
        variables[name] = (("y", "x"), fields[name][0].numpy().T)
    grid = fields[NAMES[0]].shape[-2:]
    axes = {"x": np.linspace(0, 1, grid[0]), "y": np.linspace(0, 2, grid[1]), "member": [7, 9]}
    return xarray.Dataset(variables, {**axes, **coords}, {"title": "a maze"})


def test_an_xarray_dataset_gives_one_with_its_axes(model: WaveLiTFM) -> None:
    state, constants = raw_fields(model)
    constants[1] = constants[0]
    given = dataset(by_name(state, constants), time=5.0)
    given["pressure"].attrs["units"] = "Pa"
    predicted = model.predict(given, NAME, steps=3)
    truth = expected(model, state, constants, 3)
    assert predicted["pressure"].dims == ("member", "time", "x", "y")
    assert predicted["pressure"].attrs == {"units": "Pa"}
    assert predicted.attrs == given.attrs
    np.testing.assert_array_equal(predicted["member"], [7, 9])
    np.testing.assert_array_equal(predicted["y"], given["y"])
    for index, name in enumerate(SPEC.state_channels):
        np.testing.assert_array_equal(predicted[name].values, truth[:, :, index].numpy())
    assert SPEC.dt is None
    np.testing.assert_array_equal(predicted["time"], [1, 2, 3])
    each = model.predict(given.assign_coords(time=("member", [5.0, 6.0])), NAME)
    np.testing.assert_array_equal(each["pressure"].isel(time=0), predicted["pressure"].isel(time=0))
    frame = next(model.rollout(given, NAME))
    np.testing.assert_array_equal(frame["pressure"].values, predicted["pressure"].isel(time=0).values)


def test_dates_go_on_as_dates_in_the_units_they_were_read_in(model: WaveLiTFM) -> None:
    spec = type(SPEC)(**{**vars(SPEC), "dt": 6.0})
    known = WaveLiTFM(ModelConfig(16, 1, 2), [spec])
    state, constants = raw_fields(model)
    constants[1] = constants[0]
    hours = {"units": "hours since 1999-12-31", "calendar": "proleptic_gregorian"}
    given = dataset(by_name(state, constants)).assign_coords(time=((), 30.0, hours))
    plain = known.predict(given, NAME, steps=2)["time"]
    assert plain.attrs == hours
    np.testing.assert_array_equal(plain, [36.0, 42.0])
    dated = known.predict(xarray.decode_cf(given), NAME, steps=2)["time"]
    np.testing.assert_array_equal(dated, np.array(["2000-01-01T12", "2000-01-01T18"], "datetime64[ns]"))
    assert {key: dated.encoding[key] for key in hours} == hours
    assert next(known.rollout(xarray.decode_cf(given), NAME))["time"].values == np.datetime64("2000-01-01T12")


def test_axes_that_run_the_other_way_are_doubted(model: WaveLiTFM) -> None:
    state, constants = raw_fields(model)
    constants[1] = constants[0]
    given, grid = dataset(by_name(state, constants)), state.shape[-2:]
    spacing = (1 / (grid[0] - 1), -2 / (grid[1] - 1))
    known = WaveLiTFM(ModelConfig(16, 1, 2), [type(SPEC)(**{**vars(SPEC), "grid": grid, "spacing": spacing})])
    with pytest.warns(FieldsWarning, match="y runs forward, in the training data it ran backward: flip y") as caught:
        known.predict(given, NAME)
    assert not any("x runs" in str(one.message) for one in caught)
    with pytest.warns(FieldsWarning, match=r"points 0\.1176 apart along x, in the training data 0\.05882"):
        known.predict(given.assign_coords(x=given["x"] * 2, y=-given["y"]), NAME)


def test_what_cannot_be_predicted_is_refused_by_name(model: WaveLiTFM) -> None:
    fields = by_name(*raw_fields(model))
    without = {name: array for name, array in fields.items() if name != "pressure"}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ({**without, "presure": fields["pressure"]}, {}, "missing: pressure; unknown: presure"),
        (torch.zeros(1, 3, 32, 32), {}, "expected a dictionary of arrays or an xarray Dataset"),
        ({**fields, "pressure": fields["pressure"][:1]}, {}, r"on one grid, got pressure \(1, 18, 22\)"),
        ({**fields, "pressure": fields["pressure"] * np.nan}, {}, "pressure: expected finite numbers"),
        ({name: array[..., :21] for name, array in fields.items()}, {}, "even sides"),
        (fields, {"steps": 0}, "steps: expected at least 1"),
        (fields, {"dataset": "acoustic"}, "no dataset 'acoustic': it knows acoustic_scattering_maze"),
        (dataset(fields).expand_dims(more=2), {}, "expected the dimensions x and y and at most one more"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            model.predict(given, **{"dataset": NAME, **options})


def test_what_is_far_from_the_training_data_is_doubted_by_name(model: WaveLiTFM) -> None:
    spec = make_spec(NAME)
    known = WaveLiTFM(ModelConfig(16, 1, 2), [type(spec)(**{**vars(spec), "grid": (64, 64), "dt": 0.5})])
    fields = by_name(*raw_fields(model))
    with pytest.warns(FieldsWarning) as caught:
        known.predict({**fields, "velocity_x": fields["velocity_x"] * 1000}, NAME, dt=0.25)
    texts = "\n".join(str(one.message) for one in caught)
    assert "velocity_x is" in texts
    assert "is it in the same units?" in texts
    assert "velocity_y" not in texts
    assert "frames 0.25 apart, but a step of the model is 0.5" in texts
    assert "the model was trained on 64 x 64" in texts
    with pytest.warns(FieldsWarning, match="density is"):
        model.predict({**fields, "density": fields["density"] * 1e-6}, NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(fields, NAME, dt=0.1)
