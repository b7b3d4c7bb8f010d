"""Protocols, the error file and aggregation, against numbers computed by hand."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files import UserError
from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS, Protocol, Window, get_protocol
from fm.evaluation.scores import aggregate, geometric_mean, score

PLAIN = Protocol("plain", 1, {"all": Window(1, 2)}, eps=0.0)


def errors_of(model: np.ndarray, persistence: float = 4.0) -> Errors:
    """Errors with VRMSE `model` (R, S, C) at eps 0: unit variance; NaN in `model` is a step that is not there."""
    there = ~np.isnan(model)
    variance = np.where(there, 1.0, np.nan)
    return Errors(variance, model**2, np.where(there, persistence**2, np.nan), np.where(there, 0.81, np.nan))


def dataset_of(rollout: np.ndarray, one_step: np.ndarray | None = None) -> DatasetErrors:
    channels = tuple(f"c{index}" for index in range(rollout.shape[2]))
    one_step = rollout if one_step is None else one_step
    return DatasetErrors(
        channels, np.arange(len(rollout)) + 10, errors_of(one_step), errors_of(rollout), "d" * 64, (16, 16)
    )


def score_of(rollout: np.ndarray, protocol: Protocol = PLAIN) -> dict:
    return score(ErrorFile(protocol, {"shear_flow": dataset_of(np.array(rollout, float))}))["datasets"]["shear_flow"]


def test_windows_are_one_indexed_and_inclusive() -> None:
    assert Window(1, 20).steps(20) == (1, 20)
    assert Window(21, 60).steps(59) is None
    thirds = PROTOCOLS["thirds"].windows
    assert [thirds[name].steps(40) for name in thirds] == [(1, 13), (14, 26), (27, 40)]
    assert [thirds[name].steps(2) for name in thirds] == [None, (1, 1), (2, 2)]
    assert thirds["last_third"].steps(0) is None


@pytest.mark.parametrize("bad", [(0, 3), (4, 3), (1, 4, 3), (1, 1, -1)])
def test_impossible_windows_are_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 <= first <= last"):
        Window(*bad)


@pytest.mark.parametrize(
    ("name", "windows"),
    [("wavelit", [(1, 20), (21, 60)]), ("appendix_g", [(2, 8), (9, 26), (27, 56)]), ("well", [(6, 12), (13, 30)])],
)
def test_named_protocols_have_the_published_windows(name: str, windows: list[tuple[int, int]]) -> None:
    protocol = get_protocol(name)
    assert [window.steps(10**6) for window in protocol.windows.values()] == windows
    assert protocol.trajectories == ("mean" if name == "well" else "median")
    assert Protocol.from_json(json.loads(json.dumps(protocol.to_json()))) == protocol
    assert f"{protocol.name} v{protocol.version}" in protocol.describe()


def test_bad_protocols_are_refused() -> None:
    with pytest.raises(UserError, match="expected one of wavelit, appendix_g, well, thirds; got 'walrus'"):
        get_protocol("walrus")
    wrong = ({"trajectories": "mode"}, {"order": "both"}, {"eps": -1.0}, {"max_steps": 0}, {"one_step_windows": 0})
    for change in wrong:
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(PLAIN, **change)


def test_the_order_of_the_averages_matters_and_is_followed() -> None:
    # Trajectories (1, 6), (2, 2), (5, 4): medians per step 2, 4, mean 3; means per trajectory 3.5, 2, 4.5, median 3.5.
    values = np.array([[[1.0], [6.0]], [[2.0], [2.0]], [[5.0], [4.0]]])
    assert aggregate(values, PLAIN, "median") == 3.0
    assert aggregate(values, dataclasses.replace(PLAIN, order="per_trajectory"), "median") == 3.5
    assert aggregate(values, PLAIN, "mean") == pytest.approx(20 / 6)


def test_channels_are_averaged_after_the_root_and_stay_apart_per_channel() -> None:
    part = score_of([[[1.0, 3.0], [2.0, 4.0]]])
    cell = part["windows"]["all"]
    assert cell["median"] == cell["mean"] == 2.5
    assert (cell["per_channel"]["c0"]["median"], cell["per_channel"]["c1"]["median"]) == (1.5, 3.5)
    assert (cell["persistence"], cell["mean_field"], cell["ratio_to_persistence"]) == (4.0, 0.9, 0.625)


def test_eps_enters_under_the_root() -> None:
    errors = Errors(*(np.full((1, 1, 1), value) for value in (3.0, 8.0, 1.0, 1.0)))
    assert errors.vrmse("model", 1.0)[0, 0, 0] == math.sqrt(2.0)


def test_a_window_needs_a_trajectory_that_covers_all_of_it() -> None:
    long, short = [[1.0], [1.0], [1.0]], [[9.0], [9.0], [math.nan]]
    protocol = dataclasses.replace(PLAIN, windows={"head": Window(1, 2), "tail": Window(2, 3), "beyond": Window(3, 4)})
    windows = score_of([long, short], protocol)["windows"]
    assert (windows["head"]["mean"], windows["head"]["count"]) == (5.0, 2)
    assert (windows["tail"]["mean"], windows["tail"]["count"]) == (1.0, 1)
    assert windows["beyond"] is None


def test_a_diverged_rollout_is_counted_and_never_averaged_away() -> None:
    good, bad = [[1.0], [2.0]], [[1.0], [math.inf]]
    three = score_of([good, good, bad])
    assert three["diverged"] == {"12": 2}
    cell = three["windows"]["all"]
    assert (cell["median"], cell["mean"], cell["diverged"], cell["count"]) == (1.5, None, 1, 3)
    two = score_of([good, bad])["windows"]["all"]
    assert two["median"] is None
    assert two["ratio_to_persistence"] is None
    early = dataclasses.replace(PLAIN, windows={"all": Window(1, 1)})
    assert score_of([good, bad], early)["windows"]["all"]["diverged"] == 0


def test_not_a_number_counts_as_diverged_where_the_step_exists() -> None:
    errors = Errors(*(np.full((1, 2, 1), value) for value in (1.0, math.nan, 1.0, 1.0)))
    assert np.isinf(errors.vrmse("model", 0.0)).all()
    assert errors.first_failures().tolist() == [1]


def test_one_step_counts_every_window_of_every_trajectory_once() -> None:
    one_step = np.array([[[1.0], [2.0], [3.0]], [[10.0], [math.nan], [math.nan]]])
    part = score(ErrorFile(PLAIN, {"shear_flow": dataset_of(one_step)}))["datasets"]["shear_flow"]["one_step"]
    assert (part["count"], part["median"], part["mean"]) == (4, 2.5, 4.0)


def test_scores_are_strict_json_and_say_their_protocol() -> None:
    rollout = np.array([[[1.0], [math.inf]]])
    scores = score(ErrorFile(PLAIN, {"shear_flow": dataset_of(rollout), "active_matter": dataset_of(rollout)}))
    again = json.loads(json.dumps(scores, allow_nan=False))
    assert again == scores
    assert Protocol.from_json(again["protocol"]) == PLAIN
    assert list(again["datasets"]) == ["active_matter", "shear_flow"]
    assert again["diverged"] == 2
    assert again["geometric_mean_ratio_to_persistence_windows"] == {"all": None}


def test_geometric_mean_ratio_over_datasets() -> None:
    first, second = (dataset_of(np.full((1, 2, 1), value)) for value in (1.0, 4.0))
    scores = score(ErrorFile(PLAIN, {"shear_flow": first, "active_matter": second}))
    assert scores["geometric_mean_ratio_to_persistence"] == pytest.approx(math.sqrt(1 / 4 * 1))
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([2.0, None]) is None
    assert geometric_mean([]) is None


def test_the_error_file_comes_back_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rollout = rng.random((3, 5, 2))
    rollout[1, 3:] = math.nan
    rollout[2, 4, 1] = math.inf
    datasets = {"shear_flow": dataset_of(rollout, rng.random((3, 5, 2)))}
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
    assert score(loaded) == score(file)
    assert list(loaded.protocol.windows) == ["first_third", "middle_third", "last_third"]
    file.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "errors.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "errors.npz"]


def test_bad_error_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "errors.npz"
    with pytest.raises(UserError, match="expected an error file, found none"):
        ErrorFile.load(path)
    ErrorFile(PLAIN, {"shear_flow": dataset_of(np.ones((1, 2, 1)))}).save(path)
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
    with pytest.raises(UserError, match=r"shear_flow: \(0,\) trajectory ids for 1 rollouts"):
        ErrorFile.load(path)
    np.savez(path, head=np.array(json.dumps({"format": 99})))
    with pytest.raises(UserError, match="format 2, got 99"):
        ErrorFile.load(path)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "growth", "overview", "spectra", 'a"b'])
def test_names_that_pictures_cannot_have_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "errors.npz"
    ErrorFile(PLAIN, {name: dataset_of(np.ones((1, 2, 1)))}).save(path)
    with pytest.raises(UserError, match=r"expected the errors\.npz of an evaluation, got ValueError.*expected a"):
        ErrorFile.load(path)
    part = dataclasses.replace(dataset_of(np.ones((1, 2, 1))), channels=("../up",))
    ErrorFile(PLAIN, {"shear_flow": part}).save(path)
    with pytest.raises(UserError, match=r"expected a name of letters, digits, .*got '\.\./up'"):
        ErrorFile.load(path)


def test_another_protocol_reads_the_file_only_where_the_frames_are_the_same() -> None:
    file = ErrorFile(PROTOCOLS["thirds"], {"shear_flow": dataset_of(np.full((2, 60, 1), 0.5))})
    windows = score(file, PROTOCOLS["wavelit"])["datasets"]["shear_flow"]["windows"]
    assert windows["21:60"]["median"] == pytest.approx(0.5, rel=1e-6)
    with pytest.raises(UserError, match="protocol well needs start 3"):
        score(file, PROTOCOLS["well"])
    with pytest.raises(UserError, match="needs rollouts of 60 steps"):
        score(ErrorFile(PROTOCOLS["appendix_g"], file.datasets), PROTOCOLS["wavelit"])
    tail = dataclasses.replace(PROTOCOLS["wavelit"], max_steps=61)
    with pytest.raises(UserError, match="needs rollouts of 61 steps"):
        score(ErrorFile(PROTOCOLS["wavelit"], file.datasets), tail)
    subset = dataclasses.replace(PROTOCOLS["thirds"], one_step_windows=8)
    with pytest.raises(UserError, match=r"needs one_step_windows None; these errors .* with one_step_windows 8"):
        score(ErrorFile(subset, file.datasets), PROTOCOLS["thirds"])


def test_rollouts_that_all_ended_before_the_limit_serve_any_protocol_of_their_frames() -> None:
    file = ErrorFile(PROTOCOLS["wavelit"], {"shear_flow": dataset_of(np.full((2, 59, 1), 0.5))})
    assert score(file, PROTOCOLS["thirds"])["datasets"]["shear_flow"]["horizon"] == 59


def test_steps_beyond_the_protocols_limit_count_for_nothing() -> None:
    rollout = np.array([[[1.0], [2.0], [3.0], [math.inf]]])
    part = score_of(rollout, dataclasses.replace(PLAIN, windows={"last": Window(2, 2, 2)}, max_steps=2))
    assert (part["horizon"], part["diverged"]) == (2, {})
    assert (part["windows"]["last"]["first"], part["windows"]["last"]["median"]) == (2, 2.0)
    assert dataset_of(rollout).rollout_vrmse(10, "c0", (2, 4), 0.0).tolist() == [2.0, math.inf]
