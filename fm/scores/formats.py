"""A model of a table, written four ways: Markdown and LaTeX to be read, CSV and JSON, in full precision, for programs.

A number that does not exist is a dash to people and nothing (CSV) or null (JSON) to programs.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from data_pipeline.errors import UserError

DASH = "-"


@dataclass(frozen=True)
class Marked:
    """A number that must not be read alone, such as one of a model that diverged."""

    value: float | None
    mark: str


Cell: TypeAlias = str | int | float | Marked | None


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    percents: Sequence[str] = ()  # columns of relative changes: -0.25 is shown as -25%


@dataclass(frozen=True)
class Document:
    """Tables of one kind of number: a sentence that says what the numbers are, and remarks below."""

    about: str
    tables: Sequence[Table]
    notes: Sequence[str] = field(default=())


def render(document: Document, form: str) -> str:
    """The document as text that ends in a newline. UserError for a format that is none of FORMATS."""
    if form not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    return FORMATS[form](document)


def number(value: float | None) -> str:
    """Four decimals up to 100, three digits beyond; a dash for None."""
    if value is None:
        return DASH
    return f"{value:.4f}" if value < 100 else f"{value:.3g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to equal widths: the first column to the left, the others to the right."""
    head, rows = ([cell.replace("|", "\\|") for cell in head], [[c.replace("|", "\\|") for c in row] for row in rows])
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def text_rows(table: Table) -> list[list[str]]:
    """The rows as people read them."""
    return [
        [_text(cell, name in table.percents) for cell, name in zip(row, table.head, strict=True)] for row in table.rows
    ]


def _text(cell: Cell, percent: bool) -> str:
    if isinstance(cell, Marked):
        return cell.mark if cell.value is None else f"{_text(cell.value, percent)} ({cell.mark})"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return str(cell)
    return f"{100 * cell:+.0f}%" if percent and cell is not None else number(cell)


def _markdown(document: Document) -> str:
    parts = [document.about]
    parts += [f"### {table.title}\n\n{markdown(table.head, text_rows(table))}" for table in document.tables]
    parts += ["\n".join(f"- {note}" for note in document.notes)] if document.notes else []
    return "\n\n".join(parts) + "\n"


def _csv(document: Document) -> str:
    """All tables under one head: the table's title, every column that a table has, marks, and what the numbers are."""
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
        places = [(y, x, cell) for y, row in enumerate(table.rows) for x, cell in enumerate(row)]
        marks = [[y, x, cell.mark] for y, x, cell in places if isinstance(cell, Marked)]
        rows = [[_value(cell) for cell in row] for row in table.rows]
        tables.append({"title": table.title, "head": list(table.head), "rows": rows, "marks": marks})
    whole = {"about": document.about, "tables": tables, "notes": list(document.notes)}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def _value(cell: Cell) -> str | int | float | None:
    return cell.value if isinstance(cell, Marked) else cell


def _latex(document: Document) -> str:
    """One table environment each, for the package booktabs."""
    parts = [f"% {document.about}", *map(_latex_table, document.tables)]
    parts += ["\n".join(f"% {note}" for note in document.notes)] if document.notes else []
    return "\n\n".join(parts) + "\n"


def _latex_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join("--" if cell == DASH else _escaped(cell) for cell in cells) + r" \\"

    body = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        r"\toprule",
        line(table.head),
        r"\midrule",
        *map(line, text_rows(table)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(body)


_LATEX = {**{char: "\\" + char for char in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
_LATEX["^"] = r"\textasciicircum{}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)


FORMATS: dict[str, Callable[[Document], str]] = {"md": _markdown, "csv": _csv, "json": _json, "latex": _latex}
