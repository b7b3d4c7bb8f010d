"""Tables of one evaluation and of several, marks where a model diverged, and the effect of eps against its formula."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from error_files import error_file

from data_pipeline.errors import UserError
from data_pipeline.tables import Marked, Table, render
from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors, StencilChoice
from fm.evaluation.protocol import PROTOCOLS, Protocol, Window, load_protocol
from fm.evaluation.scores import Scores, score
from fm.evaluation.tables import compare_document, load_runs, score_document, score_table


def cells(table: str, first: str) -> list[list[str]]:
    """The rows of a Markdown table that start with this cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] == first]


def test_the_score_table_has_protocol_persistence_mean_field_and_every_window() -> None:
    table = score_table(score(error_file(shear_flow=0.25, active_matter=0.5)))
    assert "protocol thirds v1" in table
    one_step, first, middle, last = cells(table, "shear_flow")
    assert one_step == ["shear_flow", "27", "0.2500", "0.2500", "1.0000", "1.0000", "-", "0.2500"]
    assert [row[1:4] for row in (first, middle, last)] == [
        ["first_third", "1-3", "3"],
        ["middle_third", "4-6", "3"],
        ["last_third", "7-9", "3"],
    ]
    assert f"one step {math.sqrt(0.125):.4f}" in table


def test_the_score_table_marks_divergence_and_missing_windows() -> None:
    model = np.full((3, 9, 1), 0.25)
    model[0, 7:] = np.inf
    ones = np.ones_like(model)
    rollout = Errors(ones, model, ones, ones, ones)
    part = DatasetErrors(("a",), np.array([4, 5, 6]), Errors(*[ones] * 5), rollout, "x", (16, 16))
    file = ErrorFile(PROTOCOLS["thirds"], {"shear_flow": part})
    wavelit = load_protocol("wavelit@1")
    *_, last = cells(score_table(score(file)), "shear_flow")
    assert last[4:6] == ["0.5000 (1 of 3 diverged)", "-"]
    assert "Diverged on shear_flow: trajectory 4 at step 8." in score_table(score(file))
    _, short, long = cells(score_table(score(file, wavelit)), "shear_flow")
    assert short[1:] == ["1:20", "too short", "0", "-", "-", "-", "-", "-", "-"]
    assert long[1] == "21:60"


def test_a_table_says_which_trajectories_are_too_short_for_a_window() -> None:
    """Two trajectories of 9 steps and one of 4, scored under a rule that leaves it out, and under one that cuts."""
    values = np.full((3, 9, 1), 0.25)
    values[2, 4:] = np.nan
    errors = Errors(*[values] * 5)
    part = DatasetErrors(("a",), np.array([4, 5, 6]), errors, errors, "x", (16, 16))
    windows = {"1:6": Window(1, 6), "8:12": Window(8, 12)}
    notes = {}
    for short in ("skip", "cut"):
        protocol = Protocol("mine", 1, windows, short=short)
        scores = score(ErrorFile(protocol, {"shear_flow": part}))
        notes[short] = [line for line in score_document(scores).notes if line.startswith("shear_flow, ")]
        assert set(notes[short]) <= set(compare_document({"run": scores}).notes)
    unscored = "shear_flow, 8:12: not scored, the longest trajectory is too short."
    left_out = "shear_flow, 1:6: 1 of 3 trajectories are left out, they end before step 6."
    assert notes["skip"] == [left_out, unscored]
    assert notes["cut"] == [
        "shear_flow, 1:6: cut to steps 1-4, the shortest trajectory's end.",
        "shear_flow, 8:12: not scored, the shortest trajectory is too short.",
    ]


def test_the_document_keeps_full_precision() -> None:
    one_step, rollout = score_document(score(error_file(shear_flow=1 / 3))).tables
    assert one_step.rows[0][:2] == ["shear_flow", 27]
    assert one_step.rows[0][2] == score(error_file(shear_flow=1 / 3)).datasets["shear_flow"].one_step.median
    assert rollout.rows[0][1:4] == ["first_third", "1-3", 3]


def test_the_linear_stencil_has_a_column_a_mean_and_a_note() -> None:
    file = error_file(shear_flow=0.5, active_matter=0.25)
    part = file.datasets["shear_flow"]
    known = dataclasses.replace(part.one_step, linear_stencil=np.full_like(part.one_step.model, 0.09))
    choice = StencilChoice(3, 1e-6, 1, 0.1)
    both = {**file.datasets, "shear_flow": dataclasses.replace(part, one_step=known, rollout=known, stencil=choice)}
    older, newer = score(file), score(dataclasses.replace(file, datasets=both))
    assert newer.datasets["shear_flow"].one_step.best_baseline() == pytest.approx(0.3)
    assert Scores.from_json(json.dumps(newer.to_json()), "here") == newer
    text = score_table(newer)
    assert cells(text, "shear_flow")[0][-2] == "0.3000"
    assert cells(text, "active_matter")[0][-2] == "-"
    assert "shear_flow 3, 1e-06 / 1, 0.1." in text
    one_step = compare_document({"older": older, "newer": newer}).tables[0]  # from the run that has it
    assert one_step.rows[1][-1] == pytest.approx(0.3)
    assert older.datasets["shear_flow"].one_step.linear_stencil is None


RATIO = "geometric mean of the ratio to persistence"


def stored(root: Path, **runs: ErrorFile) -> list[Path]:
    """Run directories with these evaluations."""
    for name, file in runs.items():
        file.save(root / name / "report" / "errors.npz")
    return [root / name for name in runs]


def tables_of(**runs: ErrorFile) -> dict[str, Table]:
    document = compare_document({name: score(file, PROTOCOLS["thirds"]) for name, file in runs.items()})
    return {table.title: table for table in document.tables}


def test_two_runs_have_a_change_and_the_readmes_layout() -> None:
    runs = {
        "pretrained": error_file(shear_flow=0.5, active_matter=0.4),
        "finetuned": error_file(shear_flow=0.25, active_matter=0.6),
    }
    tables = tables_of(**runs)
    table = tables["One step"]
    assert table.head == ["dataset", "pretrained", "finetuned", "change", "persistence", "mean field", "linear stencil"]
    assert table.rows[1][0] == "shear_flow"
    assert table.rows[1][1:-1] == pytest.approx([0.5, 0.25, -0.5, 1.0, 1.0], rel=1e-6)
    assert tables["Rollout, last_third"].rows[0][:2] == ["active_matter", "7-9"]
    assert tables["Rollout, last_third"].rows[0][4] == pytest.approx(0.5, rel=1e-6)
    text = render(compare_document({name: score(file) for name, file in runs.items()}), "md")
    assert "| shear_flow    |     0.5000 |    0.2500 |   -50% |      1.0000 |     1.0000 |" in text


def test_the_summary_has_ranks_wins_and_the_geometric_mean() -> None:
    summary = tables_of(
        a=error_file(shear_flow=0.5, active_matter=0.4, rayleigh_benard=0.2),
        b=error_file(shear_flow=0.25, active_matter=0.6, rayleigh_benard=0.2),
        c=error_file(shear_flow=math.inf, active_matter=0.5, rayleigh_benard=0.1),
    )["Summary"]
    assert summary.head == ["scores", "run", "datasets", "diverged", "mean rank", "wins", RATIO]
    a, b, c = summary.rows[:3]
    assert a[:4] == ["one step", "a", 3, 0]
    assert a[4:] == [pytest.approx((2 + 1 + 2.5) / 3), 1, pytest.approx(0.04 ** (1 / 3), rel=1e-6)]
    assert b[4:6] == [pytest.approx((1 + 3 + 2.5) / 3), 1]
    assert c[3:] == [27, pytest.approx((3 + 2 + 1) / 3), 1, None]
    assert [row[0] for row in summary.rows[::3]] == ["one step", "first_third", "middle_third", "last_third"]


def test_a_diverged_score_is_marked_and_has_no_change() -> None:
    row = tables_of(a=error_file(shear_flow=0.5), b=error_file(shear_flow=math.inf))["One step"].rows[0]
    assert row[2:4] == [Marked(None, "27 of 27 diverged"), None]


def test_the_summary_counts_rollouts_that_diverged_where_the_median_does_not_tell() -> None:
    file = error_file(shear_flow=0.5)
    part = file.datasets["shear_flow"]
    model = part.rollout.model.copy()
    model[0, 7:] = np.inf
    rollout = dataclasses.replace(part.rollout, model=model)
    broken = dataclasses.replace(file, datasets={"shear_flow": dataclasses.replace(part, rollout=rollout)})
    rows = tables_of(a=file, b=broken)["Summary"].rows
    assert [(row[0], row[1], row[3]) for row in rows if row[3]] == [("last_third", "b", 1)]


def test_a_window_that_no_run_covers_counts_for_none() -> None:
    runs = {name: score(error_file(shear_flow=0.5), load_protocol("wavelit@1")) for name in ("a", "b")}
    _, window, _, summary = compare_document(runs).tables
    assert window.rows == [["shear_flow", "too short", *[None] * 6]]
    assert summary.rows[2] == ["1:20", "a", 0, 0, None, None, None]


def test_a_dataset_that_one_run_lacks_is_shown_and_left_out_of_the_summary() -> None:
    runs = {"fm": error_file(shear_flow=0.5, active_matter=0.5), "bespoke": error_file(shear_flow=0.25)}
    document = compare_document({name: score(file) for name, file in runs.items()})
    assert document.tables[0].rows[0][2:4] == [None, None]
    assert document.tables[0].rows[0][4] == pytest.approx(1.0, rel=1e-6)
    assert [row[2] for row in document.tables[-1].rows] == [1] * 8
    assert document.notes == ["Only in mean ranks and wins of the summary, not all runs have it: active_matter."]


def test_ranks_leave_out_the_datasets_that_a_run_lacks() -> None:
    """As the paper's ranks: `b` is left out where it was not evaluated, and so is what it alone has."""
    runs = {
        "a": error_file(shear_flow=0.5, active_matter=0.3),
        "b": error_file(active_matter=0.4, rayleigh_benard=0.1),
        "c": error_file(shear_flow=0.25, active_matter=math.inf),
    }
    a, b, c = tables_of(**runs)["Summary"].rows[:3]
    assert [row[4:6] for row in (a, b, c)] == [[(2 + 1) / 2, 1], [2.0, 0], [(1 + 3) / 2, 1]]


def test_one_run_has_its_own_table() -> None:
    tables = tables_of(only=error_file(shear_flow=0.5))
    assert tables["One step"].head == ["dataset", "only", "persistence", "mean field", "linear stencil"]
    *_, summary = tables.values()
    assert summary.head == ["scores", "run", "datasets", "diverged", RATIO]


def test_runs_report_folders_and_files_are_found_and_named(tmp_path: Path) -> None:
    run, other = stored(tmp_path, one=error_file(shear_flow=0.5), persistence=error_file(shear_flow=0.25))
    alone = tmp_path / "alone" / "errors.npz"
    error_file(shear_flow=0.25).save(alone)
    places = [run, other / "report", alone, run / "report" / "errors.npz"]
    assert list(load_runs(places)) == ["one (1)", "persistence (1)", "alone", "one (2)"]
    assert list(load_runs(places, labels=list("abcd"))) == list("abcd")
    for labels in (["a"], ["a", "a", "b", "c"], ["a", "b", "c", "dataset"], ["a", "b", "c", ""]):
        with pytest.raises(UserError, match=r"labels: expected 4, each once and none of dataset, steps"):
            load_runs(places, labels=labels)
    with pytest.raises(UserError, match=r"nowhere: expected a run that was evaluated, .* looked for .*nowhere/errors"):
        load_runs([tmp_path / "nowhere"])


def test_the_first_files_protocol_counts_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    wavelit, thirds = load_protocol("wavelit@1"), PROTOCOLS["thirds"]
    runs = stored(tmp_path, a=error_file(wavelit, shear_flow=0.5), b=error_file(thirds, shear_flow=0.25))
    assert {scores.protocol.name for scores in load_runs(runs).values()} == {"wavelit"}
    assert {scores.protocol.name for scores in load_runs(runs, thirds).values()} == {"thirds"}
    subset = dataclasses.replace(thirds, one_step_windows=4)
    runs += stored(tmp_path, c=error_file(subset, shear_flow=0.5))
    with pytest.raises(
        UserError, match=r"c/report/errors\.npz: protocol wavelit v1 needs one_step_windows None; these"
    ):
        load_runs(runs)


def test_either_statistic_can_lead(tmp_path: Path) -> None:
    file = error_file(shear_flow=0.5)
    file.datasets["shear_flow"].one_step.model[0, 0] = 100.0**2
    runs = stored(tmp_path, a=file)
    for statistic, average in (("median", np.median), ("mean", np.mean)):
        (scores,) = load_runs(runs, statistic=statistic).values()
        value = compare_document({"a": scores}).tables[0].rows[0][1]
        assert value == pytest.approx(average([100.0] + [0.5] * 26), rel=1e-6)
    with pytest.raises(UserError, match="statistic: expected one of mean, median, got 'mode'"):
        load_runs(runs, statistic="mode")


def test_only_the_same_data_are_compared(tmp_path: Path) -> None:
    file = error_file(shear_flow=0.5)
    other = dataclasses.replace(file.datasets["shear_flow"], data_digest="others")
    runs = stored(tmp_path, a=file, b=dataclasses.replace(file, datasets={"shear_flow": other}))
    with pytest.raises(UserError, match=r"the same shear_flow data, got shards with digests digest of sh in .* others"):
        load_runs(runs)
