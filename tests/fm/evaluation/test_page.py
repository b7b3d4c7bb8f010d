"""The blocks of a page, read by Python's own HTML parser."""

import base64
import io

from html_reader import Reader
from PIL import Image

from data_pipeline.tables import Marked, Table
from fm.evaluation.page import Block, Code, Facts, PageTable, Paragraph, Picture, Section, render_page


def read(*blocks: Block) -> Reader:
    return Reader(render_page("", blocks, []))


def test_a_table_names_its_rows_once_and_marks_what_must_not_be_read_alone() -> None:
    rows = [["a", "first", 0.5], ["a", "second", Marked(0.25, "1 of 3 diverged")], ["<b>", "first", None]]
    page = read(PageTable(Table("", ["name", "window", "x & y"], rows), "caption", "<i>", num_text_columns=2))
    assert page.texts[page.texts.index("<i>.") :] == [
        "<i>.", "caption", "name", "window", "x & y",
        "a", "first", "0.5000", "second", "0.2500 (1 of 3 diverged)", "<b>", "first", "-",
    ]  # fmt: skip
    assert [head.get("scope") for head in page.of("th")] == ["col"] * 3 + ["rowgroup"] * 2
    assert [head.get("rowspan") for head in page.of("th")][3:] == ["2", "1"]
    assert [cell.get("class") for cell in page.of("td")] == ["text", None] * 3
    assert [span["class"] for span in page.of("span")] == ["alarm"]


def test_cells_are_shaded_by_their_place() -> None:
    content = Table("", ["name", "x"], [["a", 0.5], ["b", 2.0]])
    page = read(PageTable(content, "", cell_class=lambda row, column: ("better", "worse")[row]))
    assert [cell["class"] for cell in page.of("td")] == ["better", "worse"]


def test_a_picture_is_part_of_the_page() -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    page = read(Picture(file.getvalue(), 'of "x" & y', "<b> caption", "A", zoom=2.0))
    (image,) = page.of("img")
    assert (image["alt"], image["width"], image["height"]) == ('of "x" & y', "60", "40")
    head, _, data = str(image["src"]).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == file.getvalue()
    assert page.texts[-2:] == ["A.", "<b> caption"]


def test_a_page_is_whole_and_escapes_its_texts() -> None:
    inner = Section("z", "Z", [Paragraph("a & b", alarm="<alarm>", items=["1 < 2"])])
    text = render_page(
        "a <b> & c", [Facts([("<name>", "a & b")])], [Section("x", "X & Y", [Code("1 <\n  2")], [inner])]
    )
    page = Reader(text)
    assert text.startswith("<!doctype html>")
    assert [link["href"] for link in page.of("a")] == ["#x", "#z"]
    assert {"X & Y", "<name>", "a & b", "<alarm>", "1 < 2", "1 <\n  2"} <= set(page.texts)
    assert page.texts.count("a <b> & c") == 2  # of the window, of the page
    assert page.of("html")[0]["lang"] == "en"
