"""The parts of a page, read by Python's own HTML parser."""

import base64
import io

from html_reader import Reader
from PIL import Image

from data_pipeline.tables import Marked, Table
from fm.evaluation import report


def test_a_table_names_its_rows_once_and_marks_what_must_not_be_read_alone() -> None:
    rows = [["a", "first", 0.5], ["a", "second", Marked(0.25, "1 of 3 diverged")], ["<b>", "first", None]]
    read = Reader(report.table(Table("", ["name", "window", "x & y"], rows), "caption", names=2))
    assert read.texts == [
        "caption", "name", "window", "x & y",
        "a", "first", "0.5000", "second", "0.2500 (1 of 3 diverged)", "<b>", "first", "-",
    ]  # fmt: skip
    assert [head.get("scope") for head in read.of("th")] == ["col"] * 3 + ["rowgroup"] * 2
    assert [head.get("rowspan") for head in read.of("th")][3:] == ["2", "1"]
    assert [span["class"] for span in read.of("span")] == ["alarm"]


def test_cells_are_shaded_by_their_place() -> None:
    content = Table("", ["name", "x"], [["a", 0.5], ["b", 2.0]])
    read = Reader(report.table(content, "", lambda row, column: ("better", "worse")[row]))
    assert [cell["class"] for cell in read.of("td")] == ["better", "worse"]


def test_a_figure_holds_its_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    read = Reader(report.figure(file.getvalue(), 'of "x" & y', "<b>A</b> caption", 2.0))
    (image,) = read.of("img")
    assert (image["alt"], image["width"], image["height"]) == ('of "x" & y', "60", "40")
    head, _, data = str(image["src"]).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == file.getvalue()


def test_a_document_is_whole_and_escapes_its_title() -> None:
    text = report.document("a <b> & c", report.contents([("x", "X & Y", [("z", "Z")])]), '<h1 id="x">X</h1>')
    read = Reader(text)
    assert text.startswith("<!doctype html>")
    assert "a <b> & c" in read.texts
    assert [link["href"] for link in read.of("a")] == ["#x", "#z"]
    assert "X & Y" in read.texts
    assert read.of("html")[0]["lang"] == "en"


def test_facts_are_escaped() -> None:
    assert Reader(report.facts([("<name>", "a & b")])).texts == ["<name>", "a & b"]
