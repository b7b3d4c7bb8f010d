"""Samples: kept as they are, refused when damaged."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from samples import ramp_sample

from data_pipeline.errors import UserError
from fm.evaluation.samples import evenly_spaced, load_samples, save_samples


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = [ramp_sample((8, 16)), ramp_sample(domain=((0.0, 4.0), (-1.0, 1.0)), dataset="rayleigh_benard")]
    save_samples(tmp_path / "samples.npz", samples)
    for before, after in zip(samples, load_samples(tmp_path / "samples.npz"), strict=True):
        for field in dataclasses.fields(before):
            np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))
        assert after.truth.dtype == before.truth.dtype
        assert (after.domain, after.steps) == (before.domain, before.steps)


def test_units_and_parameters_are_kept_and_files_without_them_are_read(tmp_path: Path) -> None:
    file = tmp_path / "samples.npz"
    known = dataclasses.replace(ramp_sample(), unit="m/s; as measured", scalars={"Re": 1e5})
    save_samples(file, [known])
    (back,) = load_samples(file)
    assert (back.label, back.scalars) == ("tracer (m/s)", {"Re": 1e5})
    with np.load(file) as stored:
        arrays = dict(stored)
    head = json.loads(str(arrays["head"]))
    facts = {name: value for name, value in head["samples"][0].items() if name not in ("unit", "scalars")}
    np.savez(file, **{**arrays, "head": np.array(json.dumps({"format": 1, "samples": [facts]}))})
    (back,) = load_samples(file)
    assert (back.label, back.scalars) == ("tracer", {})
    for damage in ({"unit": 3}, {"scalars": {"Re": "high"}}, {"scalars": [1]}):
        changed = {"format": 2, "samples": [{**facts, **damage}]}
        np.savez(file, **{**arrays, "head": np.array(json.dumps(changed))})
        with pytest.raises(UserError, match=r"expected the samples\.npz of an evaluation"):
            load_samples(file)


def test_no_samples_are_a_file_too(tmp_path: Path) -> None:
    save_samples(tmp_path / "samples.npz", [])
    assert load_samples(tmp_path / "samples.npz") == []


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "samples.npz"
    with pytest.raises(UserError, match=r"expected the samples\.npz of an evaluation, found none"):
        load_samples(file)
    save_samples(file, [ramp_sample()])
    whole = file.read_bytes()
    with np.load(file) as stored:
        arrays = dict(stored)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"expected the samples.npz of an evaluation, got BadZipFile"):
        load_samples(file)
    np.savez(file, **{**arrays, "0/prediction": arrays["0/prediction"][:, :4]})
    with pytest.raises(UserError, match=r"truth \(3, 16, 16\), prediction \(3, 4, 16\)"):
        load_samples(file)
    np.savez(file, **{**arrays, "head": np.array(json.dumps({"format": 99, "samples": []}))})
    with pytest.raises(UserError, match="format 99, not 1"):
        load_samples(file)
    torn = bytearray(whole)
    start = whole.index(b"0/truth.npy") + 40
    torn[start : start + 30] = b"\xff" * 30
    file.write_bytes(torn)
    with pytest.raises(UserError, match=r"expected the samples.npz of an evaluation, got error.*decompressing data"):
        load_samples(file)
    np.savez(file, head=arrays["head"])
    with pytest.raises(UserError, match="0/truth"):
        load_samples(file)


@pytest.mark.parametrize("change", [{"dataset": "../up"}, {"dataset": "growth"}, {"channel": "a/b"}])
def test_names_that_files_cannot_have_are_refused(tmp_path: Path, change: dict[str, str]) -> None:
    save_samples(tmp_path / "samples.npz", [dataclasses.replace(ramp_sample(), **change)])
    with pytest.raises(
        UserError, match=r"samples\.npz: expected the samples\.npz of an evaluation, got Val.*expected a"
    ):
        load_samples(tmp_path / "samples.npz")


def test_fewer_steps_of_the_same_rollout() -> None:
    sample = ramp_sample(num_steps=9).at([0, 8])
    assert sample.steps == (1, 9)
    assert sample.truth.shape == sample.prediction.shape == (2, 16, 16)
    assert sample.vrmse.tolist() == [0.25, np.inf]


def test_spacing_is_of_the_domain_or_one_cell() -> None:
    assert ramp_sample((8, 16)).spacing == (1.0, 1.0)
    assert ramp_sample((8, 16), domain=((0.0, 4.0), (-1.0, 1.0))).spacing == (0.5, 0.125)


@pytest.mark.parametrize(
    ("count", "shown", "indices"),
    [(0, 6, []), (1, 6, [0]), (3, 6, [0, 1, 2]), (9, 3, [0, 4, 8]), (24, 6, [0, 5, 9, 14, 18, 23])],
)
def test_evenly_spaced_indices_reach_from_the_first_to_the_last(count: int, shown: int, indices: list[int]) -> None:
    assert evenly_spaced(count, shown) == indices
