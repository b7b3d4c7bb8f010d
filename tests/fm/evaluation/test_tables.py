"""Tables of one evaluation that say what happened."""

import math

import numpy as np
from error_files import error_file

from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.scores import score
from fm.evaluation.tables import score_document, score_table


def cells(table: str, first: str) -> list[list[str]]:
    """The rows of a Markdown table that start with this cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] == first]


def test_the_score_table_has_protocol_persistence_mean_field_and_every_window() -> None:
    table = score_table(score(error_file(shear_flow=0.25, active_matter=0.5)))
    assert "protocol thirds v1" in table
    one_step, first, middle, last = cells(table, "shear_flow")
    assert one_step == ["shear_flow", "27", "0.2500", "0.2500", "1.0000", "1.0000", "0.2500"]
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
    rollout = Errors(ones, model, ones, ones)
    part = DatasetErrors(("a",), np.array([4, 5, 6]), Errors(*[ones] * 4), rollout, "x", (16, 16))
    file = ErrorFile(PROTOCOLS["thirds"], {"shear_flow": part})
    *_, last = cells(score_table(score(file)), "shear_flow")
    assert last[4:6] == ["0.5000 (1 of 3 diverged)", "-"]
    assert "Diverged on shear_flow: trajectory 4 at step 8." in score_table(score(file))
    _, short, long = cells(score_table(score(file, PROTOCOLS["wavelit"])), "shear_flow")
    assert short[1:] == ["1:20", "horizon is 9", "0", "-", "-", "-", "-", "-"]
    assert long[1] == "21:60"


def test_the_document_keeps_full_precision() -> None:
    one_step, rollout = score_document(score(error_file(shear_flow=1 / 3))).tables
    assert one_step.rows[0][:2] == ["shear_flow", 27]
    assert one_step.rows[0][2] == score(error_file(shear_flow=1 / 3))["datasets"]["shear_flow"]["one_step"]["median"]
    assert rollout.rows[0][1:4] == ["first_third", "1-3", 3]
