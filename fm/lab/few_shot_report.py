"""`fm few-shot`: the curve as a table, a file for programs, a picture and a page."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.files import atomic_file
from fm.lab.few_shot_figure import few_shot_figure
from fm.lab.sweep_file import Sweep
from fm.report import html
from fm.scores.formats import Document, Marked, Table, render
from fm.scores.protocol import load_protocol

PRETRAINED, SCRATCH = ARMS = ("pretrained", "from scratch")
DPI = 160


@dataclass(frozen=True)
class Curve:
    """VRMSE of both arms on the test split after training on so many trajectories."""

    dataset: str
    pretrained: str  # the model that the first arm begins with
    counts: Sequence[int]
    windows: Sequence[int]  # one-step windows that so many trajectories have
    steps: int  # of each run
    seen: int  # windows that each run takes
    rates: Mapping[str, float]  # arm -> peak learning rate
    vrmse: Mapping[str, Mapping[str, Sequence[float | None]]]  # arm -> block -> value at each count
    persistence: Mapping[str, float | None]  # by block; None where no trajectory covers it
    unfinished: Sequence[str]  # runs that have failed


def write_report(out: Path, sweep: Sweep, curve: Curve) -> str:
    """Write few_shot.md, .png, .json and index.html into `out`; returns the table as Markdown. JSON comes last."""
    document = describe(sweep, curve)
    text = f"# {sweep.title}\n\n{render(document, 'md')}"
    figure = few_shot_figure(curve.counts, curve.vrmse, curve.persistence, subtitle(curve))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    numbers = json.dumps(_to_json(sweep, curve), indent=1, allow_nan=False) + "\n"
    files = {
        "few_shot.png": picture.getvalue(),
        "few_shot.md": f"{text}\n![{sweep.title}](few_shot.png)\n".encode(),
        "index.html": page(sweep.title, curve, document, picture.getvalue()).encode(),
        "few_shot.json": numbers.encode(),
    }
    (out / "few_shot.json").unlink(missing_ok=True)
    for name, content in files.items():
        with atomic_file(out / name) as file:
            file.write(content)
    return f"{text}\npage: {out / 'index.html'}\n"


def subtitle(curve: Curve) -> str:
    """What is equal, for the picture."""
    return f"{curve.steps} steps and {curve.seen} windows of {curve.dataset} each, same architecture"


def describe(sweep: Sweep, curve: Curve) -> Document:
    """A table for each kind of score, and what is compared with what."""
    about = f"VRMSE of {curve.dataset}, lower is better. {load_protocol(sweep.protocol).describe()}."
    tables = [_table(curve, block) for block, value in curve.persistence.items() if value is not None]
    return Document(about, tables, _notes(curve))


def _table(curve: Curve, block: str) -> Table:
    rows = []
    for place, (count, windows) in enumerate(zip(curve.counts, curve.windows, strict=True)):
        ours, theirs = (curve.vrmse[arm][block][place] for arm in ARMS)
        change = None if ours is None or not theirs else ours / theirs - 1
        passes = f"{curve.seen / windows:.1f}"
        shown = [Marked(None, "none") if value is None else value for value in (ours, theirs)]
        rows.append([str(count), windows, passes, *shown, change, curve.persistence[block]])
    head = ["trajectories", "windows", "passes", *ARMS, "change", "persistence"]
    return Table("One step" if block == "one step" else f"Rollout, {block}", head, rows, ("change",))


def _notes(curve: Curve) -> list[str]:
    notes = [
        f"Both arms: {curve.steps} steps, {curve.seen} windows of {curve.dataset} alone, the same windows in the same "
        "order, one step at a time; one architecture, with as many parameters. Fewer trajectories are passed over more "
        "often. Sets of trajectories are nested.",
        f"Pretrained: begins with {curve.pretrained}, whose own training is not counted here; peak learning rate "
        f"{curve.rates[PRETRAINED]:g}. From scratch: peak learning rate {curve.rates[SCRATCH]:g}.",
        "Normalisation statistics are those of the whole train split, for both. One seed.",
    ]
    return [*notes, f"No scores, see train.out there: {', '.join(curve.unfinished)}."] if curve.unfinished else notes


def page(title: str, curve: Curve, document: Document, picture: bytes) -> str:
    """One self-contained file."""
    anchors = [(f"table-{number}", table) for number, table in enumerate(document.tables)]
    links = html.contents([("curve", "Curve", ()), *((anchor, table.title, ()) for anchor, table in anchors)])
    notes = "".join(f"<p>{escape(note)}</p>" for note in document.notes)
    body = [
        f"<h1>{escape(title)}</h1>\n<p>{escape(document.about)}</p>",
        html.facts([("pretrained model", curve.pretrained), ("dataset", curve.dataset), ("steps", str(curve.steps))]),
        f'<h2 id="curve">Curve</h2>\n{html.figure(picture, f"{title}: error against trajectories", notes, zoom=0.6)}',
    ]
    for anchor, table in anchors:
        caption = "VRMSE, test split; change: pretrained against from scratch"
        body.append(f'<h2 id="{anchor}">{escape(table.title)}</h2>\n{html.table(table, caption, _shade(table))}')
    return html.document(title, links, "\n".join(body))


def _shade(table: Table) -> Any:
    column = list(table.head).index("change")

    def shade(row: int, at: int) -> str:
        value = table.rows[row][column]
        if at != column or not isinstance(value, float) or abs(value) < 0.005:
            return ""
        return "better" if value < 0 else "worse"

    return shade


def _to_json(sweep: Sweep, curve: Curve) -> dict[str, Any]:
    return {"title": sweep.title, "protocol": load_protocol(sweep.protocol).to_json(), **asdict(curve)}
