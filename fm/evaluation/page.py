"""A self-contained HTML page: one file with sections of text, tables and pictures, without scripts or network access.

`render_page` fills the template page.html.j2, which holds the markup and the style. jinja2 escapes every text. Pictures
are data URIs. The style is light or dark as the reader's screen is, and has rules for paper.
"""

import base64
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar, TypeAlias

from jinja2 import Environment, StrictUndefined
from PIL import Image

from data_pipeline.tables import Marked, Table

PAGE = "index.html"


@dataclass(frozen=True)
class Paragraph:
    """A text, with a warning before it and a list of lines below it where they are given."""

    kind: ClassVar[str] = "paragraph"
    text: str
    alarm: str = ""
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Facts:
    """Names and values, a line each."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Lines of commands or of a file, printed as they are."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class PageTable:
    """A table with a caption. Rows with the same first cell are grouped: the cell is printed once.

    `cell_class` returns the style class of a cell, by its row and column: `better`, `worse`, `digest`, or none.
    """

    kind: ClassVar[str] = "table"
    table: Table
    caption: str
    title: str = ""
    num_text_columns: int = 1  # the first columns are text, the others numbers
    cell_class: Callable[[int, int], str] = lambda row, column: ""

    def groups(self) -> list[tuple[str, list[list[tuple[str, str, bool]]]]]:
        """Return for each group its name and its rows; a cell is its text, its class, and whether it has a mark."""
        rows = [
            (texts[0], [self._cell(row, column, text) for column, text in enumerate(texts) if column])
            for row, texts in enumerate(self.table.text_rows())
        ]
        return [
            (name, [cells for _, cells in group]) for name, group in itertools.groupby(rows, key=lambda row: row[0])
        ]

    def _cell(self, row: int, column: int, text: str) -> tuple[str, str, bool]:
        classes = ["text"] if column < self.num_text_columns else []
        classes += filter(None, [self.cell_class(row, column)])
        return text, " ".join(classes), isinstance(self.table.rows[row][column], Marked)


@dataclass(frozen=True)
class Picture:
    """An encoded image with a caption, `zoom` pixels of the page to a pixel of the image."""

    kind: ClassVar[str] = "picture"
    image: bytes
    alt: str
    caption: str
    title: str = ""
    zoom: float = 1.0

    @property
    def source(self) -> str:
        """The image as a data URI."""
        with Image.open(io.BytesIO(self.image)) as opened:
            kind = str(opened.format).lower()
        return f"data:image/{kind};base64,{base64.b64encode(self.image).decode()}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page, in pixels."""
        with Image.open(io.BytesIO(self.image)) as opened:
            width, height = opened.size
        return round(width * self.zoom), round(height * self.zoom)


Block: TypeAlias = Paragraph | Facts | Code | PageTable | Picture


@dataclass(frozen=True)
class Section:
    """A heading that the table of contents links to, blocks below it, and subsections."""

    anchor: str
    title: str
    blocks: Sequence[Block] = ()
    subsections: Sequence["Section"] = ()


def render_page(title: str, intro: Sequence[Block], sections: Sequence[Section]) -> str:
    """Return the HTML of a page: a table of contents, the title, the blocks of `intro`, and the sections."""
    # StrictUndefined: a name that the template misspells is an error, not an empty text.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(files("fm.evaluation").joinpath("page.html.j2").read_text("utf-8"))
    return template.render(title=title, intro=intro, sections=sections).lstrip()
