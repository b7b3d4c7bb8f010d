"""Tables: one model of a table, written as plain text, Markdown, LaTeX, CSV or JSON.

Plain text, Markdown and LaTeX round numbers and print a dash for a missing one. CSV and JSON are read by programs: they
hold numbers in full precision, and an empty cell or null for a missing one.
"""

import csv
import io
import json
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from data_pipeline.errors import UserError, printable

DASH = "-"
LATEX_ESCAPES = {char: "\\" + char for char in "&%$#_{}"}
LATEX_ESCAPES |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
MARKDOWN_ESCAPES = {"|": "\\|", "<": "&lt;", "[": "\\[", "]": "\\]"}


@dataclass(frozen=True)
class Marked:
    """A number with a remark, such as the score of a model that diverged; or a text."""

    value: float | str | None
    mark: str


Cell: TypeAlias = str | int | float | Marked | None


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    percents: Sequence[str] = ()  # columns of relative changes: -0.25 is printed as -25%
    exact: bool = False  # print numbers with all their digits

    def text_rows(self) -> list[list[str]]:
        """Return the cells as Markdown, LaTeX and HTML print them."""
        return [
            [cell_text(cell, name in self.percents, self.exact) for name, cell in zip(self.head, row, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Document:
    """Tables of one kind of number, a sentence above them that defines the numbers, and notes below."""

    about: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()


def render(document: Document, form: str) -> str:
    """Return the document in one of FORMATS, with a newline at its end; UserError for another format."""
    if form not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    return FORMATS[form](document)


def format_number(value: float | None) -> str:
    """Return four decimals below 100, three digits from 100 on, a dash for None."""
    if value is None:
        return DASH
    return f"{value:.4f}" if value < 100 else f"{value:.3g}"


def digits(value: float, count: int = 3) -> str:
    """Return a number of at least 0 with `count` significant digits and no exponent."""
    rounded = float(f"{value:.{count}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (count - 1) else f"{rounded:#.{count}g}"


def listed(names: Iterable[str]) -> str:
    """Return names as prose lists them: a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def cell_text(cell: Cell, percent: bool = False, exact: bool = False) -> str:
    """Return a cell as text: text and integers as they are, numbers rounded, a mark in brackets after its number."""
    if isinstance(cell, Marked):
        return cell.mark if cell.value is None else f"{cell_text(cell.value, percent, exact)} ({cell.mark})"
    if isinstance(cell, str | int) or (exact and cell is not None):
        return str(cell)
    return f"{100 * cell:+.0f}%" if percent and cell is not None else format_number(cell)


def one_line(text: str) -> str:
    """Return a text without line breaks and control characters."""
    return printable(" ".join(text.split()) if not text.isprintable() else text)


def escape_latex(text: str) -> str:
    """Return a text that LaTeX prints as it is, and neither runs nor breaks."""
    return "".join(LATEX_ESCAPES.get(char, char) for char in one_line(text))


def escape_markdown(text: str) -> str:
    """Return a text that is no HTML, link or new line in Markdown; backquotes still mark code."""
    return "".join(MARKDOWN_ESCAPES.get(char, char) for char in one_line(text))


def plain(head: Sequence[str], rows: Sequence[Sequence[Cell]], text_columns: Container[str]) -> str:
    """Return an aligned table without rules; the columns named in `text_columns` are aligned to the left."""
    lines = _aligned([head, *rows], [name in text_columns for name in head])
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]], num_text_columns: int = 1) -> str:
    """Return a Markdown table padded to equal widths; the first columns are aligned to the left, the others right."""
    left = [column < num_text_columns for column in range(len(head))]
    escaped = [[escape_markdown(cell_text(cell)) for cell in row] for row in [head, *rows]]
    first, *others = _aligned(escaped, left)
    dashes = ["-" * (len(cell) + 1) for cell in first]
    rules = [f":{dash}" if to_left else f"{dash}:" for dash, to_left in zip(dashes, left, strict=True)]
    lines = [f"| {' | '.join(cells)} |" for cells in (first, *others)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def _aligned(rows: Sequence[Sequence[Cell]], left: Sequence[bool]) -> list[list[str]]:
    """Cells as text, padded to the width of their column."""
    texts = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        [cell.ljust(width) if one else cell.rjust(width) for cell, width, one in zip(line, widths, left, strict=True)]
        for line in texts
    ]


def _markdown(document: Document) -> str:
    parts = [escape_markdown(document.about)]
    parts += [
        f"### {escape_markdown(table.title)}\n\n{markdown(table.head, table.text_rows())}" for table in document.tables
    ]
    parts += ["\n".join(f"- {escape_markdown(note)}" for note in document.notes)] if document.notes else []
    return "\n\n".join(parts) + "\n"


def _csv(document: Document) -> str:
    """All tables under one head: the table's title, each column of any table, the marks, and the sentence `about`."""
    columns = list(dict.fromkeys(name for table in document.tables for name in table.head))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", *columns, "marks", "about"])
    for table in document.tables:
        for row in table.rows:
            cells = dict(zip(table.head, row, strict=True))
            marks = [f"{name}: {cell.mark}" for name, cell in cells.items() if isinstance(cell, Marked)]
            values = [_value(cells.get(name)) for name in columns]
            writer.writerow([table.title, *values, "; ".join(marks), document.about])
    return text.getvalue()


def _json(document: Document) -> str:
    """Rows as lists; `marks` holds [row, column, mark]."""
    tables: list[dict[str, Any]] = []
    for table in document.tables:
        marks = [
            [y, x, cell.mark]
            for y, row in enumerate(table.rows)
            for x, cell in enumerate(row)
            if isinstance(cell, Marked)
        ]
        rows = [[_value(cell) for cell in row] for row in table.rows]
        tables.append({"title": table.title, "head": list(table.head), "rows": rows, "marks": marks})
    whole = {"about": document.about, "tables": tables, "notes": list(document.notes)}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def _value(cell: Cell) -> str | int | float | None:
    return cell.value if isinstance(cell, Marked) else cell


def _latex(document: Document) -> str:
    """One table environment for each table, for the package booktabs."""
    parts = [f"% {one_line(document.about)}", *map(_latex_table, document.tables)]
    parts += ["\n".join(f"% {one_line(note)}" for note in document.notes)] if document.notes else []
    return "\n\n".join(parts) + "\n"


def _latex_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join("--" if cell == DASH else escape_latex(cell) for cell in cells) + r" \\"

    body = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        r"\toprule",
        line(table.head),
        r"\midrule",
        *map(line, table.text_rows()),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(body)


FORMATS: dict[str, Callable[[Document], str]] = {"md": _markdown, "csv": _csv, "json": _json, "latex": _latex}
