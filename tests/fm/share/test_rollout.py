"""Rollouts from file to file: what the file holds, what is doubted, what is refused."""

import copy
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from handmade_export import exported
from handmade_well import write_file
from well_rules import broken_rules
from whole_runs import file_size_limit

from data_pipeline.errors import UserError
from data_pipeline.registry import VARIABLE, load_registry
from data_pipeline.well.hdf5 import WellFile, split_files
from fm.cli import main
from fm.evaluation.errors import ErrorFile
from fm.model.wavelit import WaveLiTFM
from fm.share.predictions import evaluate_prediction
from fm.share.rollout import RolloutRequest, predict_file

MAZE = "acoustic_scattering_maze"
CARDS = load_registry().cards


def copy_without(source: Path, target: Path, attribute: str) -> Path:
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        del file.attrs[attribute]
    return target


@pytest.mark.parametrize("dataset", [MAZE, "viscoelastic_instability"])
def test_the_file_holds_the_given_frame_and_what_the_model_says(
    folder: str, model: WaveLiTFM, tiny_well: Path, tmp_path: Path, dataset: str
) -> None:
    source = split_files(tiny_well / dataset, "train")[0]
    out = predict_file(folder, RolloutRequest(source, tmp_path / "new" / "p.hdf5", steps=4, start=2), progress=False)
    assert broken_rules(out) == []
    with WellFile(source, CARDS[dataset]) as given, WellFile(out, CARDS[dataset]) as predicted:
        count = given.num_trajectories
        assert (predicted.num_trajectories, predicted.num_frames, predicted.grid) == (count, 5, given.grid)
        initial = np.concatenate([given.read(one, 2, 3) for one in range(count)])
        constants = np.stack([given.constants(one) for one in range(count)])
        states = model.iterate(torch.from_numpy(initial), torch.from_numpy(constants), dataset, 4)
        expected = np.stack([initial, *(state.numpy() for state in states)], axis=1)
        for one in range(count):
            np.testing.assert_array_equal(predicted.read(one, 0, 5), expected[one])
            np.testing.assert_array_equal(predicted.constants(one), constants[one])
            assert predicted.scalars(one) == given.scalars(one)
            np.testing.assert_allclose(predicted.times(one), given.times(one)[2:7], rtol=1e-6)
        np.testing.assert_array_equal(predicted.axes(), given.axes())
        pairs = zip(predicted.boundary_masks(), given.boundary_masks(), strict=True)
        assert all(a.kind == b.kind and a.dims == b.dims and (a.mask == b.mask).all() for a, b in pairs)


def test_the_command_says_whose_prediction_it_is(
    folder: str, maze: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = copy_without(maze, tmp_path / "source.hdf5", "dataset_name"), tmp_path / "p.h5"
    command = ["rollout", folder, "--input", str(source), "--steps", "2", "--out", str(out), "--trajectory", "1"]
    assert main(command) == 2
    assert "it does not say which dataset it is of" in capsys.readouterr().err
    assert main([*command, "--dataset", MAZE, "--start", "3"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out)
    assert "warning" not in said.err
    with h5py.File(out) as file:
        told = {name.removeprefix("prediction_"): value for name, value in file.attrs.items()}
    assert (told["model"], told["source"], told["dataset_name"]) == (folder, str(source), MAZE)
    assert (told["start"], told["steps"], list(told["trajectories"])) == (3, 2, [1])
    assert list(told["first_nonfinite_step"]) == [0]
    assert told["weights"] == hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
    assert main([*command, "--dataset", MAZE]) == 2
    assert "is there already; --force replaces it" in capsys.readouterr().err
    assert main([*command, "--dataset", MAZE, "--force"]) == 0
    assert main([*command, "one"]) == 2
    assert "--trajectory: expected numbers from 0 on, or all; got 1 one" in capsys.readouterr().err


def test_a_prediction_goes_on_from_a_prediction(folder: str, maze: Path, tmp_path: Path) -> None:
    whole = predict_file(folder, RolloutRequest(maze, tmp_path / "whole.hdf5", steps=5), progress=False)
    first = predict_file(folder, RolloutRequest(maze, tmp_path / "first.hdf5", steps=3), progress=False)
    rest = predict_file(folder, RolloutRequest(first, tmp_path / "rest.hdf5", steps=2, start=3), progress=False)
    with WellFile(whole, CARDS[MAZE]) as one, WellFile(rest, CARDS[MAZE]) as other:
        np.testing.assert_allclose(other.read(0, 0, 3), one.read(0, 3, 6), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(other.times(0), one.times(0)[3:], rtol=1e-6)


def test_predictions_have_the_files_own_times(
    folder: str, maze: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "log.hdf5": (np.append(0, 2.0 ** np.arange(8)), [256 - 64, 320 - 64], "time grows 2-fold"),
        "restart.hdf5": (np.array([0, 1, 2, 3, 2, 3, 4, 5, 7.0]), [9, 11], "2 of 9 frames are not later than one"),
        "epoch.hdf5": (
            1.7e9 + np.array([0, 1, 2, 4, 5, 6, 7, 8, 9.0]),
            [1.7e9 + 10, 1.7e9 + 11],
            "1 frame is missing",
        ),
    }
    for name, (times, beyond, words) in cases.items():
        source = Path(shutil.copy(maze, tmp_path / name))
        with h5py.File(source, "r+") as file:
            del file["dimensions/time"]
            file["dimensions/time"] = np.stack([times, times + 0.5])
            file["dimensions/time"].attrs["units"] = "hours since 2000-02-28"
        out = predict_file(folder, RolloutRequest(source, tmp_path / "p.hdf5", steps=10, force=True), progress=False)
        said = capsys.readouterr().err
        assert f"warning: {source}: trajectory 1" in said
        assert words in said
        with WellFile(out, CARDS[MAZE]) as predicted:
            for trajectory, shift in enumerate((0, 0.5)):
                expected = np.append(times, beyond) + shift
                np.testing.assert_array_equal(predicted.times(trajectory), expected)
            assert predicted.axis_attributes()["time"] == {"units": "hours since 2000-02-28"}
        report = evaluate_prediction(out, source, out=tmp_path / f"{name}_report")
        assert ErrorFile.load(report / "errors.npz").datasets[MAZE].rollout.steps.tolist() == [8, 8]


def test_a_rollout_that_diverges_is_kept_and_told(
    model: WaveLiTFM, maze: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in wild.named_parameters():
            parameter.mul_(1e12 if name.startswith("heads.") else 1)
    exported(wild, tmp_path / "wild", tiny_shards)
    out = predict_file(str(tmp_path / "wild"), RolloutRequest(maze, tmp_path / "p.hdf5", steps=6), progress=False)
    said = capsys.readouterr().err
    with h5py.File(out) as file:
        first = file.attrs["prediction_first_nonfinite_step"].tolist()
    assert all(1 < step < 6 for step in first)
    names = CARDS[MAZE].state_channels
    with WellFile(out, CARDS[MAZE]) as file:
        for one, step in enumerate(first):
            finite = np.isfinite(file.read(one, 0, 7)).all(axis=(2, 3))  # (T, C)
            assert finite[:step].all()
            assert not finite[step:].all(axis=1).any()
            name = names[finite[step].tolist().index(False)]
            assert f"warning: trajectory {one} is not finite from step {step} on, first in {name}" in said


def test_what_is_unlike_the_training_data_is_told(
    folder: str, maze: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with WellFile(maze, CARDS[MAZE]) as file:
        state, constants = np.repeat(file.read(0, 0, 3), 2, axis=2), np.repeat(file.constants(0), 2, axis=1)
    state[:, CARDS[MAZE].state_channels.index("pressure")] *= 1e6
    source = write_file(tmp_path / "s.hdf5", CARDS[MAZE], state[None], constants[None])  # frames 1 apart
    predict_file(folder, RolloutRequest(source, tmp_path / "p.hdf5", steps=1, dataset=MAZE), progress=False)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert all(line.startswith(f"warning: {source}: dataset {MAZE}: ") for line in told)
    assert "the model was trained on" in told[0]
    assert "frames 1 apart, but a step of the model is" in told[1]
    assert "pressure is" in told[2]
    assert "in the same units?" in told[2]


def test_what_cannot_be_predicted_is_refused(
    predicting_run: Path, model: WaveLiTFM, maze: Path, tiny_well: Path, tmp_path: Path
) -> None:
    other = split_files(tiny_well / "shear_flow", "test")[0]
    text = tmp_path / "text.hdf5"
    text.write_text("no HDF5")
    (tmp_path / "taken.zarr").write_text("")
    (tmp_path / "linked.h5").hardlink_to(maze)
    odd = write_file(
        tmp_path / "odd.hdf5", CARDS["helmholtz_staircase"], np.ones((1, 2, 2, 17, 18)), np.ones((1, 1, 17, 18))
    )
    void = write_file(
        tmp_path / "void.hdf5",
        CARDS["helmholtz_staircase"],
        np.full((1, 2, 2, 18, 18), np.nan),
        np.ones((1, 1, 18, 18)),
    )
    good = RolloutRequest(maze, tmp_path / "p.hdf5", steps=2)
    cases = [
        (replace(good, steps=0), "--steps: expected at least 1 step"),
        (replace(good, start=9), "--start: expected a frame from 0 to 8"),
        (replace(good, trajectories=(0, 7)), "--trajectory: expected numbers from 0 to"),
        (replace(good, trajectories=(0, 0)), "each once, or all; got 0 0"),
        (replace(good, out=tmp_path / "p.txt"), r"expected a name that ends in \.hdf5, \.h5, \.nc, \.zarr"),
        (replace(good, out=tmp_path / "taken.zarr", force=True), "expected a folder to write, got a file"),
        (replace(good, source=text, out=text, force=True), "expected another file than the input"),
        (replace(good, source=tmp_path / "a.zarr" / "b.h5", out=tmp_path / "a.zarr"), "and none around or inside it"),
        (replace(good, source=tmp_path / "linked.h5", out=maze, force=True), "expected another file than the input"),
        (replace(good, source=text), "truncated or no HDF5 file"),
        (replace(good, source=tmp_path / "gone.h5"), "expected an HDF5 file in the Well's layout, found none"),
        (replace(good, source=maze.parent), "found a folder"),
        (replace(good, source=tmp_path / "gone.nc"), "found no such file"),
        (replace(good, source=other), "expected a dataset that the model knows .*, got shear_flow"),
        (replace(good, dataset="maze"), "dataset 'maze': no card of this name"),
        (replace(good, dataset="shear_flow"), "its state fields are not those of the card"),
        (replace(good, source=odd, dataset="helmholtz_staircase"), "expected an even number of at least 16 points"),
        (replace(good, source=void, dataset="helmholtz_staircase"), "expected finite numbers, got NaN"),
    ]
    for request, message in cases:
        with pytest.raises(UserError, match=message):
            predict_file(str(predicting_run), request, progress=False)
    assert text.read_text() == "no HDF5"
    assert not (tmp_path / "p.hdf5").exists()
    with pytest.raises(UserError, match="no checkpoint found"):
        predict_file(str(tmp_path), good, progress=False)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="plain: expected a run, one of its checkpoints, or an exported model"):
        predict_file(str(tmp_path / "plain"), good, progress=False)
    with pytest.raises(UserError, match="expected an address such as hf://"):
        predict_file("hf://nobody", good, progress=False)


def test_a_killed_rollout_leaves_no_half_file(folder: str, maze: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.hdf5"
    command = [
        sys.executable,
        "-m",
        "fm",
        "rollout",
        folder,
        "--input",
        str(maze),
        "--steps",
        "20000",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


def test_an_exported_model_brings_its_own_cards(
    folder: str, maze: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))  # is not asked for
    assert predict_file(folder, RolloutRequest(maze, tmp_path / "p.hdf5", steps=1), progress=False).is_file()
    other = RolloutRequest(maze, tmp_path / "q.hdf5", steps=1, dataset="shear_flow")
    with pytest.raises(UserError, match="dataset 'shear_flow': no card of this name"):
        predict_file(folder, other, progress=False)
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "channels.yaml").write_text("heat: {description: heat, unit: joule}\n")
    with pytest.raises(UserError, match="its state fields are not those of the card"):
        predict_file(folder, other, registry=str(tmp_path / "cards"), progress=False)


@pytest.mark.parametrize("name", ["p.hdf5", "p.nc", "p.zarr"])
def test_a_full_disk_ends_in_a_message_and_leaves_nothing(folder: str, maze: Path, tmp_path: Path, name: str) -> None:
    """HDF5 would crash the process when it closes a file that it could not write."""
    if name != "p.hdf5":
        pytest.importorskip("xarray")
    request = RolloutRequest(maze, tmp_path / name, steps=3)
    for limit in (600, 5000):  # in the header, and in the frames
        with (
            file_size_limit(limit),
            pytest.raises(UserError, match=rf"{name}: cannot be written, the disk or the quota"),
        ):
            predict_file(folder, request, progress=False)
        gc.collect()
        assert not list(tmp_path.iterdir())
    predict_file(folder, request, progress=False)
