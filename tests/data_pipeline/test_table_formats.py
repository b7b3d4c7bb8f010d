"""One table in four formats, read back by other programs where there are any."""

import csv
import io
import json

import pytest

from data_pipeline.errors import UserError
from data_pipeline.tables import Document, Marked, Table, digits, format_number, markdown, plain, render

THIRD = 1 / 3
TABLE = Table(
    "One step",
    ["dataset", "score", "change"],
    [
        ["shear_flow", Marked(THIRD, "1 of 3 diverged"), -0.25],
        ["a|b", Marked(None, "all diverged"), None],
        ["n", 7, 0.5],
    ],
    percents=["change"],
)
OTHER = Table("Counts", ["dataset", "windows"], [["shear_flow", 12]])
DOCUMENT = Document("VRMSE, 50% of them.", [TABLE, OTHER], ["a note"])


def test_markdown_columns_line_up() -> None:
    assert markdown(["name", "x"], [["a", "1.0"], ["longer", "10.25"]]).splitlines() == [
        "| name   |     x |",
        "|:-------|------:|",
        "| a      |   1.0 |",
        "| longer | 10.25 |",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.1235"), (12.0, "12.0000"), (12345.6, "1.23e+04"), (None, "-")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_digits() -> None:
    texts = ["0.00", "0.0123", "4.10", "100", "1,230,000"]
    assert [digits(value) for value in (0, 0.01234, 4.1, 99.96, 1234567)] == texts
    assert [digits(value, 2) for value in (0.5, 9.96, 96, 148)] == ["0.50", "10", "96", "150"]


def test_markdown_is_for_people() -> None:
    text = render(DOCUMENT, "md")
    assert text.startswith("VRMSE, 50% of them.\n\n### One step\n\n| dataset")
    assert "| shear_flow | 0.3333 (1 of 3 diverged) |   -25% |" in text
    assert "| a\\|b       |             all diverged |      - |" in text
    assert "| n          |                        7 |   +50% |" in text
    assert text.endswith("\n\n- a note\n")


def test_csv_holds_all_tables_under_one_head_in_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(render(DOCUMENT, "csv"))))
    assert [row["table"] for row in rows] == ["One step"] * 3 + ["Counts"]
    assert list(rows[0]) == ["table", "dataset", "score", "change", "windows", "marks", "about"]
    assert (float(rows[0]["score"]), rows[0]["marks"]) == (THIRD, "score: 1 of 3 diverged")
    assert (rows[1]["dataset"], rows[1]["score"], rows[1]["change"]) == ("a|b", "", "")
    assert (rows[3]["windows"], rows[3]["score"], rows[3]["about"]) == ("12", "", "VRMSE, 50% of them.")


def test_json_holds_numbers_nulls_and_marks() -> None:
    whole = json.loads(render(DOCUMENT, "json"))
    assert (whole["about"], whole["notes"]) == (DOCUMENT.about, ["a note"])
    first, second = whole["tables"]
    assert first == {
        "title": "One step",
        "head": ["dataset", "score", "change"],
        "rows": [["shear_flow", THIRD, -0.25], ["a|b", None, None], ["n", 7, 0.5]],
        "marks": [[0, 1, "1 of 3 diverged"], [1, 1, "all diverged"]],
    }
    assert second["rows"] == [["shear_flow", 12]]


def test_latex_is_booktabs_with_special_characters_escaped() -> None:
    text = render(DOCUMENT, "latex")
    assert "% VRMSE, 50% of them.\n" in text
    assert text.count(r"\begin{tabular}{lrr}") == 1
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}", r"\end{table}"):
        assert text.count(rule) == 2
    assert r"shear\_flow & 0.3333 (1 of 3 diverged) & -25\% \\" in text
    assert r"a|b & all diverged & -- \\" in text
    odd = Table("a_b {c}", ["x"], [["\\ ~ ^ $ & # %"]])
    escaped = render(Document("", [odd]), "latex")
    assert r"\caption{a\_b \{c\}}" in escaped
    assert r"\textbackslash{} \textasciitilde{} \textasciicircum{} \$ \& \# \% \\" in escaped


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(UserError, match="format: expected one of md, csv, json, latex, got 'html'"):
        render(DOCUMENT, "html")


def test_plain_tables_align_numbers_to_the_right_and_the_named_columns_to_the_left() -> None:
    assert plain(["name", "x", "remark"], [["a", "1.0", "long"], ["longer", "10.25", ""]], {"name", "remark"}) == (
        "name        x  remark\na         1.0  long\nlonger  10.25"
    )


HOSTILE = "x\n\\input{/etc/passwd}\r|<script>[a](javascript:b)\x1b[31m\u2028$_"


def test_a_name_is_no_command_in_any_format() -> None:
    document = Document(HOSTILE, [Table(HOSTILE, ["dataset", HOSTILE], [[HOSTILE, 1.0]])], [HOSTILE])
    latex, text = render(document, "latex"), render(document, "md")
    for line in latex.splitlines():
        assert "\\input" not in line.partition("%")[0]
    assert latex.count(r"x \textbackslash{}input\{/etc/passwd\} |") == 3
    assert "<script>" not in text
    assert "](javascript" not in text.replace("\\]", "")
    assert [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")] == [3, 3, 3]
    assert len(text.splitlines()) == 9
    assert not any(char in latex + text for char in "\x1b\r\u2028")
