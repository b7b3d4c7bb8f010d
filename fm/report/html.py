"""The parts of a page of our reports: one HTML file, without a script and without anything from elsewhere.

Every text is escaped here. Pictures are data URIs; the style is below, light and dark, for screens and for paper.
"""

import base64
import io
import itertools
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from fm.scores.formats import Marked, Table, text_rows

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5a636e; --rule: #d5dae0; --paper: #ffffff; --shade: #f4f6f8;
  --link: #0b5cad; --better: #e3eff8; --worse: #fbe9dc; --alarm: #b00020; --plate: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #9aa5b1; --rule: #353c45; --paper: #14181d;
  --shade: #1c2229; --link: #7db8f0; --better: #173248; --worse: #47301c; --alarm: #ff8a94; --plate: #f2f3f5; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
.layout { display: grid; grid-template-columns: 13.5rem minmax(0, 67rem); column-gap: 3rem; justify-content: center;
  padding: 2.5rem 2rem 4rem; }
nav { position: sticky; top: 2.5rem; align-self: start; font-size: .82rem; line-height: 1.4; max-height: 92vh;
  overflow: auto; }
nav h2 { margin: 0 0 .6rem; padding: 0; border: 0; font-size: .82rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav li { margin: .32rem 0; overflow-wrap: anywhere; }
nav ol ol { margin-left: .8rem; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
h1 { font-size: 1.85rem; line-height: 1.2; margin: 0 0 .4rem; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .9rem; padding-top: .9rem; border-top: 1px solid var(--rule);
  font-weight: 650; }
h3 { font-size: 1.05rem; margin: 2.6rem 0 .5rem; font-weight: 650; overflow-wrap: anywhere; }
p { margin: .6rem 0; max-width: 50rem; }
.alarm { color: var(--alarm); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1.2rem; margin: .9rem 0;
  font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--shade); padding: .8rem 1rem; border-radius: 4px; overflow-x: auto; }
.scroll { overflow-x: auto; margin: 1.1rem 0 1.6rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums lining-nums; line-height: 1.35;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
caption { text-align: left; padding-bottom: .5rem; color: var(--soft); caption-side: top; }
caption b, figcaption b { color: var(--ink); font-weight: 600; }
th, td { padding: .26rem .6rem; text-align: right; vertical-align: baseline; white-space: nowrap; }
th { font-weight: 600; }
thead th { border-bottom: 1px solid var(--ink); vertical-align: bottom; white-space: normal; }
th.text, td.text, tbody th { text-align: left; }
tbody th { font-weight: 400; }
tr.group th, tr.group td { border-top: 1px solid var(--rule); }
tbody tr:first-child th, tbody tr:first-child td { border-top: 0; }
td.better { background: var(--better); }
td.worse { background: var(--worse); }
td.digest { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
figure { margin: 1.2rem 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; background: var(--plate); border-radius: 3px; }
@media (prefers-color-scheme: dark) { figure img { padding: 6px; filter: brightness(.94); } }
figcaption { margin-top: .6rem; max-width: 50rem; font-size: .87rem; line-height: 1.45; color: var(--soft); }
@media (max-width: 75rem) { .layout { display: block; max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.2rem 3rem; }
  nav { position: static; max-height: none; margin: 0 0 2rem; padding: .9rem 1rem; background: var(--shade);
  border-radius: 4px; } nav > ol { columns: 2; column-gap: 2rem; } nav li { break-inside: avoid; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --rule: #bbb; --paper: #fff; --plate: #fff; }
  body { font-size: 9.5pt; } nav { display: none; } .layout { display: block; padding: 0; }
  .scroll { overflow: visible; }
  figure, tr, pre { break-inside: avoid; } h2, h3, caption { break-after: avoid; } a { color: inherit; }
  figure img { padding: 0; filter: none; } th, td { padding: .2rem .5rem; } table { font-size: 8pt; } }
"""


def document(title: str, contents: str, body: str) -> str:
    """The whole page: a table of contents beside, or above, the body (both HTML)."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<div class="layout">\n<nav aria-label="Contents">\n<h2>Contents</h2>\n{contents}\n</nav>\n'
        f"<main>\n{body}\n</main>\n</div>\n</body>\n</html>\n"
    )


def table(
    content: Table, caption: str, shade: Callable[[int, int], str] = lambda row, column: "", names: int = 1
) -> str:
    """A table with a caption (HTML). The first `names` columns are text, and a name that repeats stands once.

    `shade` gives the class of a cell by its row and column.
    """

    def head(column: int, name: str) -> str:
        return f'<th scope="col"{_class("text" if column < names else "")}>{escape(name)}</th>'

    lines = [
        '<div class="scroll">\n<table>',
        f"<caption>{caption}</caption>",
        f"<thead><tr>{''.join(head(column, name) for column, name in enumerate(content.head))}</tr></thead>\n<tbody>",
    ]
    numbered = enumerate(zip(text_rows(content), content.rows, strict=True))
    for _, group in itertools.groupby(numbered, key=lambda entry: entry[1][1][0]):
        together = list(group)
        for number, (row, cells) in together:
            opens = number == together[0][0]
            parts = [f'<th scope="rowgroup" rowspan="{len(together)}">{escape(row[0])}</th>'] if opens else []
            for column, (text, cell) in enumerate(zip(row[1:], cells[1:], strict=True), start=1):
                name = " ".join(filter(None, ("text" if column < names else "", shade(number, column))))
                inner = f'<span class="alarm">{escape(text)}</span>' if isinstance(cell, Marked) else escape(text)
                parts.append(f"<td{_class(name)}>{inner}</td>")
            lines.append(f"<tr{_class('group' if opens else '')}>{''.join(parts)}</tr>")
    return "\n".join([*lines, "</tbody>\n</table>\n</div>"])


def figure(image: bytes, alt: str, caption: str, zoom: float = 1.0) -> str:
    """A picture with its caption (HTML), `zoom` page pixels to a pixel of the picture."""
    with Image.open(io.BytesIO(image)) as opened:
        kind, (width, height) = opened.format, opened.size
    source = f"data:image/{str(kind).lower()};base64,{base64.b64encode(image).decode()}"
    size = f'width="{round(width * zoom)}" height="{round(height * zoom)}"'
    picture = f'<img src="{source}" alt="{escape(alt)}" {size}>'
    return f"<figure>\n{picture}\n<figcaption>{caption}</figcaption>\n</figure>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values (both text), a line each."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def contents(entries: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
    """A list of links: anchor, text and, one level below, more of them."""

    def item(anchor: str, text: str, below: Sequence[tuple[str, str]]) -> str:
        inner = "".join(item(*entry, ()) for entry in below)
        return f'<li><a href="#{escape(anchor)}">{escape(text)}</a>{f"<ol>{inner}</ol>" if inner else ""}</li>'

    return "<ol>" + "".join(item(*entry) for entry in entries) + "</ol>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
