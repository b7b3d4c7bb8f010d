"""PDE parameters that condition a model: statistics, what a missing one changes (nothing), what is refused, files."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import make_inputs, make_spec, stir

from data_pipeline.errors import UserError
from fm.model.fields import FieldsWarning
from fm.model.scalars import ScalarStats
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM

GRAY, SHEAR = "gray_scott_reaction_diffusion", "shear_flow"
CONFIG = ModelConfig(16, 1, 2, wavelet="haar", condition="scalars")
FEED = ScalarStats.of([0.01, 0.03])
SCALARS = {"F": FEED, "L": ScalarStats.of([10.0, 10.0]), "Ra": ScalarStats.of([1e6, 1e8, 1e10])}


def conditioned(name: str = GRAY, scalars: Mapping[str, ScalarStats] = SCALARS) -> DatasetSpec:
    return replace(make_spec(name), scalars=scalars)


@pytest.fixture(scope="module")
def model() -> WaveLiTFM:
    return stir(WaveLiTFM(CONFIG, [conditioned()])).eval()


def fields(size: int = 1) -> dict[str, np.ndarray]:
    state, _ = make_inputs(make_spec(GRAY), 16, 16, size)
    return dict(zip("AB", state.numpy().transpose(1, 0, 2, 3), strict=True))


def quiet_predict(model: WaveLiTFM, given: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FieldsWarning)
        return np.stack(list(model.predict(given, GRAY, **options).values()))


def test_statistics_follow_the_values_and_wide_ranges_are_taken_by_their_logarithm() -> None:
    assert (FEED.log, FEED.lowest, FEED.highest) == (False, 0.01, 0.03)
    torch.testing.assert_close(FEED.normalize(torch.tensor([0.02, 0.03])), torch.tensor([0.0, 1.0]))
    rayleigh = SCALARS["Ra"]
    assert (rayleigh.log, rayleigh.mean) == (True, 8.0)
    torch.testing.assert_close(rayleigh.normalize(torch.tensor([1e8, 1e10])), torch.tensor([0.0, 1.5**0.5]))
    assert not ScalarStats.of([-1.0, 1000.0]).log
    steps = ScalarStats.of([0.25, 0.250001])  # the rounding of times is no difference
    assert steps.std == 0
    with pytest.raises(ValueError, match="mean and spread are finite"):
        ScalarStats.of([-1e308, 1e308])


def test_a_value_that_is_missing_or_never_differed_changes_no_bit(model: WaveLiTFM) -> None:
    state, constants = make_inputs(model.specs[GRAY], 16, 16)

    def step(scalars: dict[str, Any] | None) -> torch.Tensor:
        return next(model.iterate(state, constants, GRAY, 1, scalars))

    absent = step(None)
    for same in ({}, {"F": float("nan")}, {"L": 12.0}, {"unknown": 3.0}, {"F": torch.tensor([float("nan")] * 2)}):
        assert torch.equal(step(same), absent)
    assert torch.equal(step({"F": FEED.mean}), absent)
    both = step({"F": torch.tensor([0.01, FEED.mean])})
    assert not torch.equal(both[0], absent[0])
    torch.testing.assert_close(both[1], absent[1])
    torch.testing.assert_close(step({"F": 0.01})[0], both[0])
    assert not torch.equal(step({"Ra": 1e6}), absent)
    with pytest.raises(UserError, match="scalar Ra: expected values above 0, as in the training data"):
        step({"Ra": torch.tensor([1e6, -1.0])})


def test_rows_belong_to_names_and_begin_without_effect() -> None:
    specs = [conditioned(), conditioned(SHEAR, {"F": FEED, "Re": FEED}), make_spec("active_matter")]
    model = WaveLiTFM(CONFIG, specs, seed=3)
    plain = WaveLiTFM(replace(CONFIG, condition="none"), [make_spec(one.name) for one in specs], seed=3)
    own, others = model.state_dict(), plain.state_dict()
    assert own.keys() - others.keys() == {f"scalars.rows.{name}" for name in ("F", "L", "Ra", "Re")}
    assert all(torch.equal(own[name], others[name]) for name in others)
    assert not any(own[name].any() for name in own.keys() - others.keys())

    used = {id(one): names for names, group in model.parameters_by_datasets().items() for one in group}
    assert used[id(model.scalars.rows["F"])] == {GRAY, SHEAR}
    assert used[id(model.scalars.rows["Re"])] == {SHEAR}
    assert model.normalize_scalars({"F": 0.01}, "active_matter", 2, torch.device("cpu")) is None

    state, constants = make_inputs(specs[1])
    scalars = stir(model).normalize_scalars({"F": 0.01}, SHEAR, len(state), torch.device("cpu"))
    model(state, constants, SHEAR, scalars).square().sum().backward()
    gradients = {name: one.grad for name, one in model.scalars.rows.items()}
    assert gradients["F"].any()
    assert not gradients["Re"].any()  # missing
    assert gradients["Ra"] is None  # another dataset's


def test_without_the_option_model_json_keeps_its_bytes() -> None:
    """The digest is that of the version before there was the option."""
    model = WaveLiTFM(ModelConfig(16, 1, 2), [make_spec(SHEAR), make_spec("helmholtz_staircase")], 0, 2)
    content = json.dumps(model.description(), indent=1).encode()
    assert hashlib.sha256(content).hexdigest() == "bdf2d0bf74e02b0e3aa23e39d747e2eead0d12895a6b02b535edeac5d1bd2feb"


def test_files_keep_the_scalars_and_other_datasets_leave_them(model: WaveLiTFM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = WaveLiTFM.from_pretrained(tmp_path)
    assert (loaded.config, loaded.specs) == (model.config, model.specs)
    given = fields()
    expected = quiet_predict(model, given, scalars={"F": 0.01, "Ra": 1e9})
    np.testing.assert_array_equal(quiet_predict(loaded, given, scalars={"F": 0.01, "Ra": 1e9}), expected)

    fresh = replace(conditioned(), scalars={})  # what the shards of a finetuning may say of the known dataset
    adapted = loaded.adapted_to([fresh, conditioned(SHEAR, {"Re": FEED})])
    np.testing.assert_array_equal(quiet_predict(adapted, given, scalars={"F": 0.01, "Ra": 1e9}), expected)
    assert not adapted.scalars.rows["Re"].any()

    description = json.loads((tmp_path / "model.json").read_text())
    for wrong in ({"lowest": -1.0}, {"mean": "1"}, {"std": -1.0}, {"lowest": 2e10}):
        spoilt = json.loads(json.dumps(description))
        spoilt["datasets"][0]["scalars"]["Ra"].update(wrong)
        (tmp_path / "model.json").write_text(json.dumps(spoilt))
        with pytest.raises(ValueError, match=r"scalars\.Ra"):
            WaveLiTFM.from_pretrained(tmp_path)


def test_predict_takes_scalars_by_name_and_batch(model: WaveLiTFM) -> None:
    given = fields(2)
    together = quiet_predict(model, given, steps=2, scalars={"F": [0.01, 0.03], "Ra": np.array([1e6, 1e7])})
    for one, (feed, rayleigh) in enumerate([(0.01, 1e6), (0.03, 1e7)]):
        alone = {name: values[one] for name, values in given.items()}
        expected = quiet_predict(model, alone, steps=2, scalars={"F": feed, "Ra": torch.tensor(rayleigh)})
        np.testing.assert_allclose(together[:, one], expected, rtol=1e-4, atol=1e-5)
    rolled = list(model.rollout(given, GRAY, 2, scalars={"F": 0.01, "L": 10.0, "Ra": 1e6}))
    expected = quiet_predict(model, given, steps=2, scalars={"F": 0.01, "L": 10.0, "Ra": 1e6})
    np.testing.assert_array_equal(rolled[1]["B"], expected[1, :, 1])


def test_the_time_step_is_a_scalar_where_the_training_data_had_several() -> None:
    model = stir(WaveLiTFM(CONFIG, [conditioned(scalars={"dt": ScalarStats.of([1.0, 2.0])})])).eval()
    short, long = (quiet_predict(model, fields(), dt=dt) for dt in (1.0, 2.0))
    assert not np.array_equal(short, long)
    np.testing.assert_array_equal(quiet_predict(model, fields(), scalars={"dt": 2.0}), long)


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"Re": 1.0}, "unknown scalars Re: its model takes F, L, Ra"),
        ({"F": float("nan")}, "scalar F: expected a finite number, or 2 of them, one per state, got nan"),
        ({"F": [0.01, 0.02, 0.03]}, "scalar F: expected a finite number, or 2 of them"),
        ({"F": "0.01"}, "scalar F: expected a finite number"),
        ({"Ra": [1e6, 0.0]}, "scalar Ra: expected a number above 0, got 0"),
    ],
)
def test_scalars_that_cannot_be_used_are_refused(model: WaveLiTFM, scalars: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(fields(2), GRAY, scalars=scalars)


def test_a_model_without_the_option_refuses_scalars() -> None:
    model = WaveLiTFM(replace(CONFIG, condition="none"), [make_spec(GRAY)])
    with pytest.raises(ValueError, match=r"takes none, since it was trained without model\.condition=scalars"):
        model.predict(fields(), GRAY, scalars={"F": 0.01})


def test_what_the_training_data_did_not_have_is_said(model: WaveLiTFM) -> None:
    with pytest.warns(FieldsWarning) as caught:
        model.predict(fields(), GRAY, scalars={"F": 0.5, "L": 11.0})
    said = [str(one.message).removeprefix(f"dataset {GRAY}: ") for one in caught]
    assert said == [
        "F is 0.5, in the training data it ran from 0.01 to 0.03",
        "L is 11, in the training data it was always 10, so the model cannot follow it",
        "no value of Ra, which condition the model: it predicts as for the mean of the training data",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(fields(), GRAY, scalars={"F": 0.03, "Ra": 1e6})
