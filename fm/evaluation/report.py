"""The parts of a page of our reports: one HTML file, without a script and without anything from elsewhere.

Every text is escaped here. Pictures are data URIs; the style is below, light and dark, for screens and for paper.

One evaluation as a page: what was measured, the scores, the pictures, and how to get the numbers again.

Writes the files of one evaluation.
"""

import base64
import io
import itertools
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path, PurePath
from typing import Any

import matplotlib
import numpy as np
import yaml
from PIL import Image

from data_pipeline.files import UserError, atomic_file
from data_pipeline.tables import Cell, Marked, Table
from fm.evaluation.errors import ErrorFile, find_errors
from fm.evaluation.pictures import gif, overview, strip
from fm.evaluation.plots import QUANTILES, encode, growth_figure, rasterize, spectra_figure
from fm.evaluation.protocol import PROTOCOLS, Protocol
from fm.evaluation.samples import Sample, load_samples, save_samples
from fm.evaluation.tables import about, eps_effect, marked, rescore, score_document, score_table, write_tables

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
    numbered = enumerate(zip(content.text_rows(), content.rows, strict=True))
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


ZOOM = 0.7  # pictures are drawn at 160 dots an inch; a page has 96 pixels an inch, and text should be readable
EPS_MATTERS = 0.01  # relative change of a score from which on the page lists it


def page(
    errors: ErrorFile,
    scores: Mapping[str, Any],
    samples: Sequence[Sample],
    pictures: Mapping[str, bytes],
    videos: Mapping[str, bytes],
) -> str:
    """The HTML of a report. `pictures`: image files by name, overview, growth, spectra and the datasets' strips;
    `videos`: GIFs by dataset. A picture that is not there is left out.
    """
    title = _title(scores["origin"])
    shown = {sample.dataset: sample for sample in samples}
    sections = [
        ("summary", "Summary", _summary(scores)),
        ("one-step", "One step", _one_step(scores)),
        ("rollouts", "Rollouts", _rollouts(scores)),
        ("pictures", "Pictures", _pictures(errors.protocol, pictures)),
        (
            "datasets",
            "Datasets",
            "\n".join(_dataset(name, scores, shown.get(name), pictures, videos) for name in scores["datasets"]),
        ),
        ("eps", "Effect of eps", _eps(errors)),
        ("again", "The same numbers again", _again(errors, scores)),
    ]
    below = {"datasets": [(_anchor(name), name) for name in scores["datasets"]]}
    listed = contents([(anchor, name, below.get(anchor, ())) for anchor, name, _ in sections])
    head = f"<header>\n<h1>{escape(title)}</h1>\n{_origin(scores)}\n</header>"
    body = [f'<section id="{anchor}">\n<h2>{escape(name)}</h2>\n{text}\n</section>' for anchor, name, text in sections]
    return document(title, listed, "\n".join([head, *body]))


def _title(origin: Mapping[str, Any]) -> str:
    """Which run, where the checkpoint's path says so: <run>/checkpoints/<step>."""
    checkpoint = PurePath(str(origin.get("checkpoint", "")))
    run = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.name
    run = run or PurePath(str(origin.get("prediction", ""))).name
    return " ".join(
        filter(None, ["Evaluation", run and f"of {run}", f"at step {origin['step']}" if "step" in origin else ""])
    )


def _origin(scores: Mapping[str, Any]) -> str:
    """Whose scores they are."""
    pairs = [(name, str(value)) for name, value in scores["origin"].items()]
    names = scores["datasets"]
    trajectories = sum(part["trajectories"] for part in names.values())
    pairs.append(("data", f"{len(names)} datasets, {trajectories} trajectories, {scores['protocol']['split']} split"))
    return facts(pairs)


def _summary(scores: Mapping[str, Any]) -> str:
    protocol = Protocol.from_json(scores["protocol"])
    measured = any(part["one_step"] is not None for part in scores["datasets"].values())
    means = {"one step": scores["geometric_mean_ratio_to_persistence"]} if measured else {}
    means |= scores["geometric_mean_ratio_to_persistence_windows"]
    rows: list[list[Cell]] = [[name, value, *_wins(scores, name)] for name, value in means.items()]
    content = Table("", ["scores", "VRMSE / persistence", "below persistence", "below the mean field"], rows)
    caption = (
        "<b>All datasets.</b> Geometric mean over datasets of the model's VRMSE over persistence's, and on how many "
        "datasets the model is better than the two predictors that know no physics."
    )
    return "\n".join([f"<p>{escape(about(protocol))}</p>", _divergence(scores), table(content, caption)])


def _wins(scores: Mapping[str, Any], block: str) -> list[Cell]:
    """On how many datasets the model beats persistence, and the mean field; a score that is not finite beats none."""
    lead = scores["protocol"]["trajectories"]
    cells = [_block(part, block) for part in scores["datasets"].values()]
    covered = [cell for cell in cells if cell is not None]
    wins = [
        sum(cell[lead] is not None and (cell[other] is None or cell[lead] < cell[other]) for cell in covered)
        for other in ("persistence", "mean_field")
    ]
    return [f"{count} of {len(covered)}" if covered else None for count in wins]


def _block(part: Mapping[str, Any], block: str) -> Mapping[str, Any] | None:
    return part["one_step"] if block == "one step" else part["windows"][block]


def _divergence(scores: Mapping[str, Any]) -> str:
    """A diverged rollout is counted and named, a one-step prediction counted; no average leaves them out."""
    total = sum(part["trajectories"] for part in scores["datasets"].values())
    one_step = [part["one_step"] for part in scores["datasets"].values() if part["one_step"] is not None]
    failed, windows = (sum(cell[key] for cell in one_step) for key in ("diverged", "count"))
    single = (
        f'<p><span class="alarm">{failed} of {windows} one-step predictions are not finite.</span> They count as '
        "infinitely wrong.</p>"
        if failed
        else ""
    )
    if not scores["diverged"]:
        return f"{single}<p>None of {total} rollouts diverged: all their predictions are finite.</p>"
    failures = [
        f"{name}: " + ", ".join(f"trajectory {key} at step {step}" for key, step in part["diverged"].items())
        for name, part in scores["datasets"].items()
        if part["diverged"]
    ]
    items = "".join(f"<li>{escape(line)}</li>" for line in failures)
    return (
        f'{single}<p><span class="alarm">{scores["diverged"]} of {total} rollouts diverged.</span> They count as '
        f"infinitely wrong in every average below.</p>\n<ul>{items}</ul>"
    )


def _one_step(scores: Mapping[str, Any]) -> str:
    *tables, _ = score_document(scores).tables
    if not tables:
        return "<p>Only rollouts were measured.</p>"
    (content,) = tables
    caption = f"<b>One-step VRMSE</b>, one frame to the next. {_hint(scores)}"
    return table(content, caption, _shade(content))


def _rollouts(scores: Mapping[str, Any]) -> str:
    content = score_document(scores).tables[-1]
    caption = f"<b>Rollout VRMSE</b> over the protocol's windows of steps. {_hint(scores)}"
    return table(content, caption, _shade(content), names=2)


def _hint(scores: Mapping[str, Any]) -> str:
    return (
        f"Last column: the model's {escape(scores['protocol']['trajectories'])} over persistence's; shaded blue below "
        "1, orange above."
    )


def _shade(content: Table) -> Callable[[int, int], str]:
    """The class of a cell: whether the ratio in the last column is below 1."""

    def shade(row: int, column: int) -> str:
        value = content.rows[row][column]
        if column < len(content.head) - 1 or not isinstance(value, float):
            return ""
        return "better" if value < 1 else "worse"

    return shade


def _pictures(protocol: Protocol, pictures: Mapping[str, bytes]) -> str:
    low, high = (f"{100 * quantile:.0f}%" for quantile in QUANTILES)
    captions = {
        "overview": (
            "Truth, prediction and error of every dataset.",
            "<b>Overview.</b> Truth, prediction and error (prediction - truth) of one channel of the longest rollout "
            "of each dataset, at the middle of its shown steps.",
        ),
        "growth": (
            "VRMSE against rollout step for every dataset: the model, persistence and the mean field.",
            "<b>Error growth.</b> VRMSE, mean over channels, against the step of a rollout: the median over "
            f"trajectories and, for the model, the range from {low} to {high} of them. A trajectory that is not finite "
            "counts as infinite. Every other window of the protocol is shaded.",
        ),
        "spectra": (
            "Power against wavenumber for every dataset: truth, prediction and error at three steps.",
            "<b>Spectra.</b> Radial power spectra of truth, prediction and error at the first, middle and last shown "
            "step: a prediction that is too smooth lies below the truth at large wavenumbers, one with noise of its "
            "own above it. Where error and prediction meet, nothing of the truth is left at that scale.",
        ),
    }
    return "\n".join(
        figure(pictures[name], alt, caption, ZOOM) for name, (alt, caption) in captions.items() if name in pictures
    )


def _dataset(
    name: str,
    scores: Mapping[str, Any],
    sample: Sample | None,
    pictures: Mapping[str, bytes],
    videos: Mapping[str, bytes],
) -> str:
    """Scores by channel, the strip and the video of one dataset."""
    parts = [f'<h3 id="{escape(_anchor(name))}">{escape(name)}</h3>', _channels(name, scores)]
    if sample:
        what = f"{sample.channel} of trajectory {sample.trajectory}"
        where = f"{sample.extent_text}; frames {sample.dt:.4g} apart in time; physical units"
        if name in pictures:
            caption = (
                f"<b>{escape(name)}</b>, {escape(what)}: truth, prediction and error. {escape(where)}. Truth and "
                "prediction have the same colours at all steps; so has the error, with limits of its own."
            )
            parts.append(figure(pictures[name], f"{what}: truth, prediction and error", caption, ZOOM))
        if name in videos:
            steps = f"steps {sample.steps[0]} to {sample.steps[-1]}, {len(sample.steps)} of them"
            caption = f"<b>{escape(name)}</b>, the same rollout moving: {steps}."
            parts.append(figure(videos[name], f"Animation of {what}", caption))
    return "\n".join(parts)


def _channels(name: str, scores: Mapping[str, Any]) -> str:
    """The model's scores of each channel, one step and in every window that the rollouts cover."""
    part, lead = scores["datasets"][name], scores["protocol"]["trajectories"]
    blocks = {"one step": part["one_step"]} | part["windows"]
    blocks = {key: cell for key, cell in blocks.items() if cell is not None}
    rows: list[list[Cell]] = [
        [channel, *(cell["per_channel"][channel][lead] for cell in blocks.values())] for channel in part["channels"]
    ]
    rows.append(["all channels", *(marked(cell, lead) for cell in blocks.values())])
    heads = [key if key == "one step" else f"{key} ({cell['first']}-{cell['last']})" for key, cell in blocks.items()]
    height, width = part["grid"]
    caption = (
        f"<b>VRMSE by channel</b>, {escape(lead)}; {height} x {width} grid points, {part['trajectories']} "
        f"trajectories, rollouts of up to {part['horizon']} steps."
    )
    return table(Table("", ["channel", *heads], rows), caption)


def _eps(errors: ErrorFile) -> str:
    """The scores that depend on eps, and how many do not."""
    whole = eps_effect(errors)
    ratios = [(row, row[-1]) for row in whole.rows if isinstance(row[-1], float) and row[-1] > 0]
    rows = [row for row, ratio in ratios if abs(math.log(ratio)) > EPS_MATTERS]
    text = (
        "eps is added to the variance of the target, so that it tells where a field is all but constant. Published "
        f"numbers differ in it. {len(ratios) - len(rows)} of {len(ratios)} scores change by less than "
        f"{100 * EPS_MATTERS:g}%"
    )
    if not rows:
        return f"<p>{escape(text)}: none is above that.</p>"
    caption = f"<b>{escape(whole.title)}</b>, where it changes by more than {100 * EPS_MATTERS:g}%."
    content = Table(whole.title, whole.head, rows)
    return f"<p>{escape(text)}; the others:</p>\n{table(content, caption, names=3)}"


def _again(errors: ErrorFile, scores: Mapping[str, Any]) -> str:
    """Commands, digests and versions."""
    protocol, predicted = errors.protocol, "prediction" in errors.origin
    rows: list[list[Cell]] = [[name, part["data_digest"]] for name, part in scores["datasets"].items()]
    what = "the truth and the numbers of its trajectories" if predicted else "the shards' manifest"
    digests = Table("", ["dataset", f"SHA-256 of {what}"], rows)
    commands = (
        "# from the stored errors beside this page, without the model; other windows, averages or eps with --protocol\n"
        "# and --eps\n"
        f"fm score errors.npz --out DIR\n\n{_from_weights(protocol, 'PRED --truth FILE' if predicted else 'RUN')}"
    )
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, matplotlib {matplotlib.__version__}"
    # As a protocol's file has it: JSON's 1e-07 is a text in YAML, and no parts are left out.
    windows = {name: {k: v for k, v in asdict(window).items() if v} for name, window in protocol.windows.items()}
    content = {**protocol.to_json(), "windows": windows}
    written = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10_000).strip()
    caption = "<b>Data.</b> The same digest means the same bytes."
    return "\n".join(
        [
            f"<pre>{escape(commands)}</pre>",
            table(digests, caption, lambda row, column: "digest", names=2),
            facts([("page drawn by", versions), ("protocol", written)]),
        ]
    )


def _from_weights(protocol: Protocol, what: str) -> str:
    """The commands that measure `what` anew. A protocol that no name and option gives has to be in a file."""
    known = PROTOCOLS.get(protocol.name, protocol)
    count, eps = protocol.one_step_windows, protocol.eps  # what options set
    named = protocol.name in PROTOCOLS and protocol == replace(
        known, split=protocol.split, one_step_windows=count, eps=eps
    )
    subset = f" --windows {count}" if count else ""
    which = f"{protocol.name} --split {protocol.split}{subset}" if named else "PROTOCOL.yaml"
    head = "# from the weights" if named else "# from the weights, with the protocol below in a file PROTOCOL.yaml"
    if known.eps == eps or not named:
        return f"{head}\nfm evaluate {what} --protocol {which} --out DIR"
    rescored = f"fm score MEASURED --eps {eps!r} --out DIR"
    return f"{head}\nfm evaluate {what} --protocol {which} --out MEASURED\n{rescored}"


def _anchor(name: str) -> str:
    return f"dataset-{name}"


DPI = 160


def write_report(out: Path, errors: ErrorFile, scores: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """The files of one evaluation. An older scores.json goes first, the new one comes last: where it is, all is.

    index.html holds everything; pictures/ has the same pictures one by one, errors.npz and samples.npz what all of it
    is made from.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").unlink(missing_ok=True)
    errors.save(out / "errors.npz")
    save_samples(out / "samples.npz", samples)
    figures = {"overview": overview(samples), "spectra": spectra_figure(samples)} if samples else {}
    figures["growth"] = growth_figure(errors.datasets, errors.protocol)
    figures |= {sample.dataset: strip(sample) for sample in samples}
    images = {name: rasterize(figure, DPI) for name, figure in figures.items()}
    videos = {sample.dataset: gif(sample) for sample in samples}
    for name, image in images.items():
        _write(out / "pictures" / f"{name}.png", encode(image, "PNG", dpi=(DPI, DPI)))
    for name, video in videos.items():
        _write(out / "pictures" / f"{name}.gif", video)
    # A page of PNGs would be three times as large.
    small = {name: encode(image, "WEBP", quality=90, use_sharp_yuv=True) for name, image in images.items()}
    _write(out / "index.html", page(errors, scores, samples, small, videos).encode())
    pictures = "\n".join(f"![{name}](pictures/{name}.png)\n" for name in images)
    _write(out / "scores.md", f"# Scores\n\n{score_table(scores)}\n{pictures}".encode())
    _write(out / "scores.json", (json.dumps(scores, indent=1, allow_nan=False) + "\n").encode())


def rescore_errors(place: Path, protocol: str | None, eps: float | None, out: Path | None) -> str:
    """Return a table of scores from the stored errors of an evaluation and, with `out`, write a report there.

    `place` is an errors.npz, a report folder or a run; `protocol` is a name or a file, None for that of the errors.
    """
    file = find_errors(place)
    measured = ErrorFile.load(file)
    errors, scores = rescore(measured, protocol, eps)
    if out is None:
        return score_table(scores)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: expected a folder to write a report into, got a file")
    if out.resolve() == file.resolve().parent and errors.protocol != measured.protocol:
        raise UserError(
            f"--out {out}: expected another folder than that of {file}, whose errors were measured under "
            f"protocol {measured.protocol.name}: that evaluation would be replaced"
        )
    stored, samples = file.with_name("samples.npz"), []
    for sample in load_samples(stored) if stored.is_file() else []:
        try:
            part = errors.datasets[sample.dataset]
            vrmse = part.rollout_vrmse(sample.trajectory, sample.channel, sample.steps, errors.protocol.eps)
        except (LookupError, ValueError):
            raise UserError(
                f"{stored}: expected fields of rollouts in the errors.npz beside it, got {sample.dataset}, trajectory "
                f"{sample.trajectory}, {sample.channel}, which that does not have: bring the two files of one "
                "evaluation together, or remove samples.npz for a report without pictures of fields"
            ) from None
        samples.append(replace(sample, vrmse=vrmse))
    write_tables(out, scores)
    write_report(out, errors, scores, samples)
    return score_table(scores)


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)
