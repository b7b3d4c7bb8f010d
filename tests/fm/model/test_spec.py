"""What defines a model: configurations, dataset specifications, their JSON, and messages for what is wrong."""

import dataclasses
import json
import math
from typing import get_args

import pytest
import torch
from handmade import STATE_CHANNELS, make_spec
from pydantic import ValidationError

from fm.model.attention import RIDGE_MODES
from fm.model.spec import PRESETS, DatasetSpec, ModelConfig, Wavelet, from_json, to_json
from fm.model.wavelets import WAVELETS
from fm.model.wavelit import WaveLiTFM

SMALL = ModelConfig(width=16, depth=2, heads=2)


@pytest.mark.parametrize(
    ("preset", "names", "millions"),
    [
        ("1.2M", ["turbulent_radiative_layer_2D"], 1.2),
        ("9.5M", ["turbulent_radiative_layer_2D"], 9.5),
        ("9.5M", list(STATE_CHANNELS), 9.5),
    ],
)
def test_presets_have_the_size_of_their_name(preset: str, names: list[str], millions: float) -> None:
    with torch.device("meta"):
        model = WaveLiTFM(PRESETS[preset], [make_spec(name) for name in names])
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.03)


def test_specs_survive_json() -> None:
    for name in STATE_CHANNELS:
        spec = make_spec(name)
        assert from_json(DatasetSpec, json.loads(json.dumps(to_json(spec))), "here") == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 20, "heads": 2}, "width / heads must be a multiple of 4 (2D RoPE), got 20 / 2"),
        ({"attention": "softmax"}, "attention: softmax has no ridge, expected ridge: none, got ridge"),
        ({"depth": 0}, "depth: Input should be greater than 0 (got 0)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio: Input should be greater than 0 (got 0.0)"),
        ({"mlp_ratio": math.nan}, "mlp_ratio: Input should be a finite number (got nan)"),
        ({"wavelet": "db2"}, "wavelet: Input should be 'haar', 'bior2.2' or 'bior4.4' (got 'db2')"),
        ({"ridge": "rigde"}, "(got 'rigde'); did you mean ridge?"),
        ({"levels": 3}, "levels: Input should be 1 or 2 (got 3)"),
        ({"pyramid_levels": 5}, "pyramid_levels: Input should be 0, 1, 2, 3 or 4 (got 5)"),
        (
            {"predict_override": {"shear_flow": "both"}},
            "shear_flow: Input should be 'delta' or 'state'",
        ),
    ],
)
def test_impossible_configurations_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError):
        dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError) as caught:
        from_json(ModelConfig, {**to_json(SMALL), **changes}, "config of a file")
    assert str(caught.value).startswith("config of a file: ")
    assert message in str(caught.value)


def test_keys_must_be_exactly_those_of_the_class() -> None:
    with pytest.raises(ValueError, match=r"^here: missing keys \['depth', 'mlp_ratio'\]$"):
        from_json(ModelConfig, {k: v for k, v in to_json(SMALL).items() if k not in ("depth", "mlp_ratio")}, "here")
    with pytest.raises(ValueError, match=r"^here: unknown key wdith \(value 3\); did you mean width\?$"):
        from_json(ModelConfig, {**to_json(SMALL), "wdith": 3}, "here")
    with pytest.raises(ValueError, match=r"here: Input should be an object \(got 5\)"):
        from_json(ModelConfig, 5, "here")


def test_the_names_of_wavelets_are_those_of_the_transform() -> None:
    assert set(get_args(Wavelet)) == set(WAVELETS)
    assert set(get_args(ModelConfig.__annotations__["ridge"])) == set(RIDGE_MODES)


def test_impossible_datasets_are_named() -> None:
    spec = make_spec("shear_flow")
    for changes, message in (
        ({"state_channels": ()}, r"state_channels\n  Tuple should have at least 1 item"),
        ({"name": "a.b"}, "without dots"),
        ({"boundary": (("PERIODIC", "WALL"), ("WALL", "WALL"))}, "x is periodic at one end only"),
        (
            {"boundary": (("WALL", "WALL"), ("WALL", "LEAKY"))},
            r"boundary\.1\.1\n  String should match .*WALL\|OPEN.*LEAKY",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(spec, **changes)
    with pytest.raises(ValueError, match="different names"):
        WaveLiTFM(SMALL, [spec, spec])
    stats = {**spec.stats, "mean": {**spec.stats["mean"], "tracer": float("nan")}}
    with pytest.raises(ValueError, match="'mean' is not finite: tracer = nan"):
        WaveLiTFM(SMALL, [dataclasses.replace(spec, stats=stats)])
    stats = {**spec.stats, "std_delta": {"tracer": 1.0}}
    with pytest.raises(ValueError, match="no statistic 'std_delta' for channels pressure, velocity_x, velocity_y"):
        WaveLiTFM(SMALL, [dataclasses.replace(spec, stats=stats)])
