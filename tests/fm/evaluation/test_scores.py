"""Aggregation against numbers computed by hand, ranks against counts by hand, the correlation against SciPy's."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from error_files import dataset_errors
from scipy.stats import spearmanr

from data_pipeline.errors import UserError
from fm.evaluation.errors import ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS, Protocol, Window, load_protocol
from fm.evaluation.scores import (
    DatasetScores,
    Scores,
    aggregate,
    geometric_mean,
    mean_ranks,
    mean_ratio,
    score,
    spearman,
    wins,
)
from fm.evaluation.tables import score_table

PLAIN = Protocol("plain", 1, {"all": Window(1, 2)}, eps=0.0, context=1)


def score_of(rollout: np.ndarray, protocol: Protocol = PLAIN) -> DatasetScores:
    return score(ErrorFile(protocol, {"shear_flow": dataset_errors(np.array(rollout, float))})).datasets["shear_flow"]


def test_the_order_of_the_averages_matters_and_is_followed() -> None:
    # Trajectories (1, 6), (2, 2), (5, 4): medians per step 2, 4, mean 3; means per trajectory 3.5, 2, 4.5, median 3.5.
    values = np.array([[[1.0], [6.0]], [[2.0], [2.0]], [[5.0], [4.0]]])
    assert aggregate(values, PLAIN, "median") == 3.0
    assert aggregate(values, dataclasses.replace(PLAIN, order="per_trajectory"), "median") == 3.5
    assert aggregate(values, PLAIN, "mean") == pytest.approx(20 / 6)


def test_channels_are_averaged_after_the_root_and_stay_apart_per_channel() -> None:
    part = score_of([[[1.0, 3.0], [2.0, 4.0]]])
    cell = part.windows["all"]
    assert cell.median == cell.mean == 2.5
    assert (cell.per_channel["c0"].median, cell.per_channel["c1"].median) == (1.5, 3.5)
    assert (cell.persistence, cell.mean_field, cell.ratio_to_persistence) == (4.0, 0.9, 0.625)


def test_a_channel_that_never_changes_is_not_scored() -> None:
    errors = dataset_errors(np.array([[[1.0, 0.1, 3.0], [2.0, 0.1, 4.0]]]))
    for task in (errors.one_step, errors.rollout):
        task.persistence[..., 1] = 0
    scores = score(ErrorFile(PLAIN, {"shear_flow": errors}))
    part = scores.datasets["shear_flow"]
    assert (part.channels, part.static) == (("c0", "c2"), ("c1",))
    for block in part.blocks().values():
        assert (block.median, block.persistence, list(block.per_channel)) == (2.5, 4.0, ["c0", "c2"])
    assert "Not scored, for they never change in time: c1 of shear_flow." in score_table(scores)
    errors.rollout.persistence[0, 1, 1] = 1e-9  # it did change once
    assert score(ErrorFile(PLAIN, {"shear_flow": errors})).datasets["shear_flow"].static == ()


def test_eps_enters_under_the_root() -> None:
    errors = Errors(*(np.full((1, 1, 1), value) for value in (3.0, 8.0, 1.0, 1.0, 4.0)))
    assert errors.vrmse("model", 1.0)[0, 0, 0] == math.sqrt(2.0)


def test_a_window_needs_a_trajectory_that_covers_all_of_it() -> None:
    long, short = [[1.0], [1.0], [1.0]], [[9.0], [9.0], [math.nan]]
    protocol = dataclasses.replace(PLAIN, windows={"head": Window(1, 2), "tail": Window(2, 3), "beyond": Window(3, 4)})
    windows = score_of([long, short], protocol).windows
    assert (windows["head"].mean, windows["head"].count) == (5.0, 2)
    assert (windows["tail"].mean, windows["tail"].count) == (1.0, 1)
    assert windows["beyond"] is None


def test_a_diverged_rollout_is_counted_and_never_averaged_away() -> None:
    good, bad = [[1.0], [2.0]], [[1.0], [math.inf]]
    three = score_of([good, good, bad])
    assert three.diverged == {12: 2}
    cell = three.windows["all"]
    assert (cell.median, cell.mean, cell.diverged, cell.count) == (1.5, None, 1, 3)
    two = score_of([good, bad]).windows["all"]
    assert two.median is None
    assert two.ratio_to_persistence is None
    early = dataclasses.replace(PLAIN, windows={"all": Window(1, 1)})
    assert score_of([good, bad], early).windows["all"].diverged == 0


def test_not_a_number_counts_as_diverged_where_the_step_exists() -> None:
    errors = Errors(*(np.full((1, 2, 1), value) for value in (1.0, math.nan, 1.0, 1.0, math.nan)))
    assert np.isinf(errors.vrmse("model", 0.0)).all()
    assert errors.first_failures().tolist() == [1]


def test_one_step_counts_every_window_of_every_trajectory_once() -> None:
    one_step = np.array([[[1.0], [2.0], [3.0]], [[10.0], [math.nan], [math.nan]]])
    part = score(ErrorFile(PLAIN, {"shear_flow": dataset_errors(one_step)})).datasets["shear_flow"].one_step
    assert (part.count, part.median, part.mean) == (4, 2.5, 4.0)


def test_scores_are_strict_json_and_name_their_protocol(tmp_path: Path) -> None:
    rollout = np.array([[[1.0], [math.inf]]])
    scores = score(ErrorFile(PLAIN, {"shear_flow": dataset_errors(rollout), "active_matter": dataset_errors(rollout)}))
    text = json.dumps(scores.to_json(), allow_nan=False)
    again = Scores.from_json(text, "the test")
    assert again == scores
    assert again.protocol == PLAIN
    assert list(again.datasets) == ["active_matter", "shear_flow"]
    assert again.diverged == 2
    assert again.mean_ratios() == {"one step": None, "all": None}
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(text)


def test_the_keys_of_the_scores_file_keep_their_order(tmp_path: Path) -> None:
    rollout = np.array([[[1.0], [2.0]]])
    whole = json.loads(json.dumps(score(ErrorFile(PLAIN, {"shear_flow": dataset_errors(rollout)})).to_json()))
    assert list(whole) == [
        *("format", "origin", "protocol", "datasets", "geometric_mean_ratio_to_persistence"),
        *("geometric_mean_ratio_to_persistence_windows", "diverged"),
    ]
    part = whole["datasets"]["shear_flow"]
    assert list(part) == [
        *("data_digest", "grid", "channels", "trajectories", "horizon", "one_step", "windows", "diverged", "stencil"),
        "static",
    ]
    averages = ["median", "mean", "persistence", "mean_field", "linear_stencil", "ratio_to_persistence"]
    assert list(part["one_step"]) == [*averages, "count", "diverged", "per_channel"]
    assert list(part["windows"]["all"]) == ["first", "last", *part["one_step"]]
    assert list(part["one_step"]["per_channel"]["c0"]) == averages


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("{", r"Invalid JSON"),
        ("{}", r"format: Field required"),
        ('{"format": 2, "origin": [], "protocol": {"name": "x"}}', r"origin: Input should be an object"),
        ('{"format": 2, "origin": {}, "protocol": {"name": "x"}}', r"protocol: Value error, not a protocol"),
    ],
)
def test_other_files_are_not_read_as_scores(tmp_path: Path, change: str, problem: str) -> None:
    file = tmp_path / "scores.json"
    with pytest.raises(UserError, match=r"no scores at .*scores\.json .No such file.*; make them with"):
        Scores.load(file)
    file.write_text(change)
    with pytest.raises(UserError, match=rf"scores\.json: not a report's scores\.json \({problem}.*; remove it and"):
        Scores.load(file)


def test_geometric_mean_ratio_over_datasets() -> None:
    first, second = (dataset_errors(np.full((1, 2, 1), value)) for value in (1.0, 4.0))
    scores = score(ErrorFile(PLAIN, {"shear_flow": first, "active_matter": second}))
    assert scores.geometric_mean_ratio_to_persistence == pytest.approx(math.sqrt(1 / 4 * 1))
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert mean_ratio([1e-7, 1.0]) == pytest.approx(0.1)  # a solved dataset counts as 0.01
    assert mean_ratio([1e-7, None]) is None
    assert geometric_mean([2.0, None]) is None
    assert geometric_mean([]) is None


def test_another_protocol_reads_the_file_only_where_the_frames_are_the_same() -> None:
    file = ErrorFile(PROTOCOLS["thirds"], {"shear_flow": dataset_errors(np.full((2, 60, 1), 0.5))})
    wavelit = load_protocol("wavelit@1")
    windows = score(file, wavelit).datasets["shear_flow"].windows
    assert windows["21:60"].median == pytest.approx(0.5, rel=1e-6)
    with pytest.raises(UserError, match=r"protocol well v2 needs start 3.* evaluate again with that protocol$"):
        score(file, PROTOCOLS["well"])
    with pytest.raises(
        UserError, match=r"wavelit v2 needs start 3; these .* under thirds v1 .*, or score under wavelit@1"
    ):
        score(file, PROTOCOLS["wavelit"])
    with pytest.raises(UserError, match="needs rollouts of 60 steps"):
        score(ErrorFile(load_protocol("appendix_g@1"), file.datasets), wavelit)
    tail = dataclasses.replace(wavelit, max_steps=61)
    with pytest.raises(UserError, match="needs rollouts of 61 steps"):
        score(ErrorFile(wavelit, file.datasets), tail)
    subset = dataclasses.replace(PROTOCOLS["thirds"], one_step_windows=8)
    with pytest.raises(UserError, match=r"needs one_step_windows None; these errors .* with one_step_windows 8"):
        score(ErrorFile(subset, file.datasets), PROTOCOLS["thirds"])


def test_rollouts_that_all_ended_before_the_limit_serve_any_protocol_of_their_frames() -> None:
    file = ErrorFile(load_protocol("wavelit@1"), {"shear_flow": dataset_errors(np.full((2, 59, 1), 0.5))})
    assert score(file, PROTOCOLS["thirds"]).datasets["shear_flow"].horizon == 59


def test_steps_beyond_the_protocols_limit_count_for_nothing() -> None:
    rollout = np.array([[[1.0], [2.0], [3.0], [math.inf]]])
    part = score_of(rollout, dataclasses.replace(PLAIN, windows={"last": Window(2, 2, 2)}, max_steps=2))
    assert (part.horizon, part.diverged) == (2, {})
    assert (part.windows["last"].first, part.windows["last"].median) == (2, 2.0)
    assert dataset_errors(rollout).rollout_vrmse(10, "c0", (2, 4), 0.0).tolist() == [2.0, math.inf]


def test_ties_share_a_rank_and_a_diverged_score_comes_last() -> None:
    rows = [[0.1, 0.2, 0.3], [0.5, 0.5, 0.1], [math.inf, 0.2, math.inf]]
    assert mean_ranks(rows) == pytest.approx([(1 + 2.5 + 2.5) / 3, (2 + 2.5 + 1) / 3, (3 + 1 + 2.5) / 3])
    assert wins(rows) == [1, 1, 1]


def test_ranks_leave_out_who_was_not_evaluated() -> None:
    rows = [[None, 0.2, 0.1, None], [0.1, 0.2, 0.3, None], [None, None, 0.1, None]]
    assert mean_ranks(rows) == [1.0, 2.0, (1 + 3) / 2, None]
    assert wins(rows) == [1, 0, 1, 0]


def test_a_shared_best_score_is_nobodys_win() -> None:
    assert wins([[0.5, 0.5], [math.inf, math.inf], [0.1, 0.2]]) == [1, 0]
    assert wins([[None]]) == [0]
    assert mean_ranks([]) == wins([]) == []


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 6, 12).astype(float).tolist(), rng.random(12).tolist()
    assert spearman(ours, theirs) == pytest.approx(spearmanr(ours, theirs).statistic)
    assert spearman([1.0, 2.0, math.inf], [1.0, 5.0, 9.0]) == pytest.approx(1.0)
    assert spearman([1.0, 9.0, 2.0], [1.0, None, 5.0]) == pytest.approx(1.0)
    assert spearman([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(-1.0)


def test_no_correlation_without_an_order() -> None:
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    assert spearman([1.0], [1.0]) is None
    assert spearman([], []) is None
