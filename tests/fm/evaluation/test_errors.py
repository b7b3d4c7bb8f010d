"""The error file: read as it was written, refused when damaged."""

import dataclasses
import json
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from error_files import dataset_errors

from data_pipeline.errors import UserError
from fm.evaluation.errors import ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS, Protocol, Window
from fm.evaluation.scores import score

PLAIN = Protocol("plain", 1, {"all": Window(1, 2)}, eps=0.0)


def test_the_error_file_comes_back_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rollout = rng.random((3, 5, 2))
    rollout[1, 3:] = math.nan
    rollout[2, 4, 1] = math.inf
    datasets = {"shear_flow": dataset_errors(rollout, rng.random((3, 5, 2)))}
    file = ErrorFile(PROTOCOLS["thirds"], datasets, {"checkpoint": "runs/x", "step": 40})
    file.save(tmp_path / "errors.npz")
    loaded = ErrorFile.load(tmp_path / "errors.npz")
    assert (loaded.protocol, loaded.origin) == (file.protocol, file.origin)
    ours, theirs = file.datasets["shear_flow"], loaded.datasets["shear_flow"]
    assert (theirs.channels, theirs.data_digest) == (ours.channels, ours.data_digest)
    for task in ("one_step", "rollout"):
        for part in dataclasses.fields(Errors):
            np.testing.assert_array_equal(
                getattr(getattr(theirs, task), part.name), getattr(getattr(ours, task), part.name)
            )
    one_step = score(loaded).datasets["shear_flow"].one_step
    assert one_step is not None
    assert one_step.mean == pytest.approx(np.random.default_rng(0).random((2, 3, 5, 2))[1].mean())  # VRMSE, by chance
    assert list(loaded.protocol.windows) == ["first_third", "middle_third", "last_third"]
    file.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "errors.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "errors.npz"]


def test_bad_error_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "errors.npz"
    with pytest.raises(UserError, match=r"expected the errors\.npz of an evaluation, found none"):
        ErrorFile.load(path)
    ErrorFile(PLAIN, {"shear_flow": dataset_errors(np.ones((1, 2, 1)))}).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a zip", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"expected the errors\.npz of an evaluation"):
            ErrorFile.load(path)
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = dict(file)
    name = "shear_flow/rollout/model"
    for change in ({name: np.ones((1, 3, 1))}, {name: np.ones((1, 2))}, {"head": np.array("[]")}):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(UserError, match=r"expected the errors\.npz of an evaluation"):
            ErrorFile.load(path)
    np.savez(path, **{key: array for key, array in arrays.items() if key != name})
    with pytest.raises(UserError, match=r"expected the errors\.npz of an evaluation"):
        ErrorFile.load(path)
    head = json.loads(str(arrays["head"]))
    unnamed = {"protocol": {**head["protocol"], "windows": []}}
    for change in ({"origin": ["x"]}, unnamed):
        np.savez(path, **{**arrays, "head": np.array(json.dumps({**head, **change}))})
        with pytest.raises(UserError, match=r"expected the errors\.npz of an evaluation"):
            ErrorFile.load(path)
    np.savez(path, **{**arrays, "shear_flow/trajectories": np.zeros(0, np.int64)})
    with pytest.raises(UserError, match=r"shear_flow/one_step: \(0,\) trajectory ids for 1 trajectories"):
        ErrorFile.load(path)
    np.savez(path, head=np.array(json.dumps({"format": 99})))
    with pytest.raises(UserError, match=r"expected the errors\.npz .* got ValueError\(.format 99, not 2 or 3"):
        ErrorFile.load(path)


def test_a_file_of_format_2_has_no_linear_stencil(tmp_path: Path) -> None:
    path = tmp_path / "errors.npz"
    ErrorFile(PLAIN, {"shear_flow": dataset_errors(np.ones((1, 2, 1)))}).save(path)
    with np.load(path) as file:
        arrays = {name: array for name, array in file.items() if "linear_stencil" not in name}
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="linear_stencil"):  # a file of this format has one
        ErrorFile.load(path)
    np.savez(path, **{**arrays, "head": np.array(json.dumps({**json.loads(str(arrays["head"])), "format": 2}))})
    part = ErrorFile.load(path).datasets["shear_flow"]
    assert part.stencil is None
    assert np.isnan(part.one_step.linear_stencil).all()
    np.testing.assert_array_equal(part.rollout.model, 1.0)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "growth", "overview", "spectra", 'a"b'])
def test_names_that_pictures_cannot_have_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "errors.npz"
    ErrorFile(PLAIN, {name: dataset_errors(np.ones((1, 2, 1)))}).save(path)
    with pytest.raises(UserError, match=r"expected the errors\.npz of an evaluation, got ValueError.*expected a"):
        ErrorFile.load(path)
    part = dataclasses.replace(dataset_errors(np.ones((1, 2, 1))), channels=("../up",))
    ErrorFile(PLAIN, {"shear_flow": part}).save(path)
    with pytest.raises(UserError, match=r"expected a name of letters, digits, .*got '\.\./up'"):
        ErrorFile.load(path)


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}", "is not what the file holds"),
        ("{'descr': '<U100000000', 'fortran_order': False, 'shape': ()}", "is not what the file holds"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (0, 1000000000000)}", "is not what the file holds"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': ()}", "Object arrays cannot be loaded"),
    ],
)
def test_sizes_in_a_header_are_compared_before_memory_is_allocated(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "errors.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("head.npy", npy(header, pickle.dumps(0)[:8].ljust(8) if "|O" in header else b""))
    with pytest.raises(UserError, match=message):
        ErrorFile.load(path)


def test_an_archive_that_unpacks_to_more_than_memory_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "errors.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("head.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}"))
        file.getinfo("head.npy").file_size = 2**30
    with pytest.raises(UserError, match="it is there twice, or larger than its file"):
        ErrorFile.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="found none"):
        ErrorFile.load(path)
