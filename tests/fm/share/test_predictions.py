"""A prediction's file scored beside the truth: the evaluation's own numbers, the_well's, and what is refused."""

import json
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from the_well.benchmark.metrics import VRMSE
from the_well.data import WellDataset

from data_pipeline.errors import UserError
from data_pipeline.well.hdf5 import split_files
from fm.cli import main
from fm.evaluation.errors import ErrorFile
from fm.evaluation.scores import Scores, score
from fm.evaluation.tables import compare_document, load_runs
from fm.share.predictions import evaluate_prediction
from fm.share.rollout import RolloutRequest, predict_file

MAZE = "acoustic_scattering_maze"


@pytest.mark.parametrize("dataset", [MAZE, "helmholtz_staircase", "viscoelastic_instability"])
def test_the_same_numbers_as_the_runs_evaluation(
    predicting_run: Path, tiny_well: Path, tmp_path: Path, dataset: str
) -> None:
    """To the rounding of float32: other trajectories may have been in the batch. In the shards the files follow."""
    expected = ErrorFile.load(predicting_run / "report" / "errors.npz").datasets[dataset]
    found = []
    for truth in split_files(tiny_well / dataset, "test"):
        out = tmp_path / dataset / "data" / "test" / truth.name
        predicted = predict_file(str(predicting_run), RolloutRequest(truth, out, steps=8), progress=False)
        found.append(evaluate_prediction(predicted, truth, out=tmp_path / truth.stem))
    parts = [ErrorFile.load(report / "errors.npz").datasets[dataset] for report in found]
    vrmse = np.concatenate([part.rollout.vrmse("model", 1e-7) for part in parts])
    np.testing.assert_allclose(vrmse, expected.rollout.vrmse("model", 1e-7), rtol=1e-5)
    np.testing.assert_allclose(vrmse[:, :3], expected.rollout.vrmse("model", 1e-7)[:, :3], rtol=1e-6)
    for part in ("variance", "persistence", "mean_field"):
        joined = np.concatenate([getattr(one.rollout, part) for one in parts])
        np.testing.assert_array_equal(joined, getattr(expected.rollout, part))
    mine, truth = (
        WellDataset(path=str(root / dataset), well_split_name="test", n_steps_output=8, use_normalization=False)
        for root in (tmp_path, tiny_well)
    )
    assert len(mine) == len(truth) == len(vrmse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the_well warns of a boundary mask over both axes
        pairs = [(mine[index], truth[index]) for index in range(len(mine))]
    for row, (one, other) in enumerate(pairs):
        theirs = VRMSE.eval(one["output_fields"], other["output_fields"], truth.metadata)
        np.testing.assert_allclose(theirs, vrmse[row], rtol=1e-5)
        for key in ("input_fields", "boundary_conditions", "space_grid", "constant_fields", "constant_scalars"):
            if key in other:
                np.testing.assert_array_equal(one[key], other[key])


@pytest.fixture(scope="module")
def predicted(folder: str, maze: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of trajectory 1 of the maze. Read only."""
    out = tmp_path_factory.mktemp("scored") / "maze.hdf5"
    return predict_file(folder, RolloutRequest(maze, out, steps=8, trajectories=(1,)), progress=False)


def test_the_report_says_what_was_scored_and_that_one_step_was_not(
    predicted: Path, maze: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(predicted), "--truth", str(maze)]) == 0
    said = capsys.readouterr().out
    assert "### One step" not in said
    assert f"Only rollouts were measured, no one-step predictions: {MAZE}." in said
    assert "split train" in said  # the folder of the truth
    report = predicted.with_name("maze_report")
    assert "Evaluation of maze.hdf5" in (report / "index.html").read_text()
    assert "fm evaluate PRED --truth FILE --protocol thirds --split train" in (report / "index.html").read_text()
    scores = Scores.load(report / "scores.json")
    stored = ErrorFile.load(report / "errors.npz")
    assert score(stored) == scores
    assert scores.origin["prediction"] == str(predicted)
    part = scores.datasets[MAZE]
    assert (part.one_step, part.horizon, stored.datasets[MAZE].trajectories.tolist()) == (None, 8, [1])
    assert scores.geometric_mean_ratio_to_persistence is None
    assert main(["score", str(report), "--eps", "1e-5"]) == 0
    runs = load_runs([report, report])
    one_step = next(table for table in compare_document(runs).tables if table.title == "One step")
    assert one_step.rows == [[MAZE, None, None, None, None, None, None]]


def test_a_rollout_that_ends_early_is_not_taken_for_a_whole_one(
    folder: str, predicted: Path, maze: Path, tmp_path: Path
) -> None:
    short = predict_file(
        folder, RolloutRequest(maze, tmp_path / "short.hdf5", steps=3, trajectories=(1,)), progress=False
    )
    report = evaluate_prediction(short, maze)
    measured = ErrorFile.load(report / "errors.npz")
    assert measured.protocol.max_steps == 3
    own = tmp_path / "early.yaml"
    own.write_text('{name: early, version: 1, windows: {"1:2": [1, 2], "4:8": [4, 8]}}')
    early = ErrorFile.load(evaluate_prediction(short, maze, str(own), tmp_path / "early") / "errors.npz")
    assert list(early.protocol.windows) == ["1:2"]
    whole = evaluate_prediction(predicted, maze, out=tmp_path / "whole")
    with pytest.raises(UserError, match="rollouts of all steps; these errors were measured under thirds v1 with at"):
        load_runs([whole, report])
    own.write_text('{name: early, version: 1, windows: {"4:8": [4, 8]}}')
    with pytest.raises(UserError, match=r"rollouts of 3 steps cover no window of protocol early \(4:8\): .* --steps 8"):
        evaluate_prediction(short, maze, str(own))


def test_a_rollout_beyond_the_truth_is_scored_as_far_as_it_goes(folder: str, maze: Path, tmp_path: Path) -> None:
    long = predict_file(folder, RolloutRequest(maze, tmp_path / "long.hdf5", steps=12), progress=False)
    measured = ErrorFile.load(evaluate_prediction(long, maze) / "errors.npz")
    assert measured.protocol.max_steps is None
    assert measured.datasets[MAZE].rollout.steps.tolist() == [8, 8]


def test_a_diverged_rollout_counts_as_infinitely_wrong(predicted: Path, maze: Path, tmp_path: Path) -> None:
    wild = tmp_path / "wild.hdf5"
    wild.write_bytes(predicted.read_bytes())
    with h5py.File(wild, "r+") as file:
        file["t0_fields/pressure"][:, 5:] = np.nan
    report = evaluate_prediction(wild, maze)
    scores = json.loads((report / "scores.json").read_text())
    assert scores["datasets"][MAZE]["diverged"] == {"1": 5}
    assert scores["datasets"][MAZE]["windows"]["last_third"]["median"] is None
    assert "diverged" in (report / "scores.md").read_text()


def test_files_that_do_not_fit_together_are_refused(
    folder: str, predicted: Path, maze: Path, tiny_well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = predict_file(folder, RolloutRequest(maze, tmp_path / "late.hdf5", steps=2, start=3), progress=False)
    with pytest.raises(
        UserError, match=r"start from frame 3 of .*; protocol thirds starts from frame 0: roll out with"
    ):
        evaluate_prediction(late, maze)
    own = tmp_path / "own.yaml"
    own.write_text('{name: own, version: 1, windows: {"1:2": [1, 2]}, start: 3}')
    assert ErrorFile.load(evaluate_prediction(late, maze, str(own)) / "errors.npz").protocol.start == 3
    with pytest.raises(UserError, match="its 1 rollouts are of the trajectories 1, expected numbers below 1"):
        evaluate_prediction(predicted, split_files(tiny_well / MAZE, "test")[0])
    with pytest.raises(UserError, match="not those of the card"):
        evaluate_prediction(predicted, split_files(tiny_well / "shear_flow", "test")[0])
    own.write_text('{name: own, version: 1, windows: {"1:2": [1, 2]}, context: 2}')
    with pytest.raises(UserError, match="expected context 1"):
        evaluate_prediction(predicted, maze, str(own))
    other = tmp_path / "other.hdf5"
    other.write_bytes(predicted.read_bytes())
    with h5py.File(other, "r+") as file:
        file.attrs["prediction_trajectories"] = [0]
    with pytest.raises(UserError, match="expected rollout 0 to start from frame 0 of trajectory 0"):
        evaluate_prediction(other, maze)
    with h5py.File(other, "r+") as file:
        file["dimensions/time"][...] += 0.4 * file["dimensions/time"][1]
    with pytest.raises(UserError, match=r"expected frames at times of .*, which go from 0 to"):
        evaluate_prediction(other, maze)
    assert main(["evaluate", str(predicted)]) == 2
    assert "expected --truth FILE" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "p.nc"), "--truth", str(maze)]) == 2
    assert "expected the rollouts in a Well file" in capsys.readouterr().err
    assert main(["evaluate", str(predicted), "--truth", str(maze), "--windows", "3"]) == 2
    assert "--windows: is of an evaluation of a run" in capsys.readouterr().err


def test_a_truth_that_is_not_finite_is_refused(predicted: Path, maze: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.hdf5"
    bad.write_bytes(maze.read_bytes())
    with h5py.File(bad, "r+") as file:
        file["t0_fields/pressure"][1, 4, 3, 3] = np.nan
    said = r"trajectory 1, field pressure \(pressure\), frame 4: expected finite numbers"
    with pytest.raises(UserError, match=said) as caught:
        evaluate_prediction(predicted, bad)
    assert "--skip" not in str(caught.value)  # an option of another command
