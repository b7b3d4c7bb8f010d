"""One evaluation as a page: what was measured, the scores, the pictures, and how to get the numbers again."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import PurePath
from typing import Any

import matplotlib
import numpy as np
import yaml

from fm.report import html
from fm.report.curves import QUANTILES
from fm.report.sample import Sample
from fm.scores.errors import ErrorFile
from fm.scores.formats import Cell, Table
from fm.scores.protocol import PROTOCOLS, Protocol
from fm.scores.sensitivity import eps_effect
from fm.scores.tables import about, marked, score_document

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
    contents = html.contents([(anchor, name, below.get(anchor, ())) for anchor, name, _ in sections])
    head = f"<header>\n<h1>{escape(title)}</h1>\n{_origin(scores)}\n</header>"
    body = [f'<section id="{anchor}">\n<h2>{escape(name)}</h2>\n{text}\n</section>' for anchor, name, text in sections]
    return html.document(title, contents, "\n".join([head, *body]))


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
    return html.facts(pairs)


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
    return "\n".join([f"<p>{escape(about(protocol))}</p>", _divergence(scores), html.table(content, caption)])


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
    return html.table(content, caption, _shade(content))


def _rollouts(scores: Mapping[str, Any]) -> str:
    content = score_document(scores).tables[-1]
    caption = f"<b>Rollout VRMSE</b> over the protocol's windows of steps. {_hint(scores)}"
    return html.table(content, caption, _shade(content), names=2)


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
        html.figure(pictures[name], alt, caption, ZOOM) for name, (alt, caption) in captions.items() if name in pictures
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
            parts.append(html.figure(pictures[name], f"{what}: truth, prediction and error", caption, ZOOM))
        if name in videos:
            steps = f"steps {sample.steps[0]} to {sample.steps[-1]}, {len(sample.steps)} of them"
            caption = f"<b>{escape(name)}</b>, the same rollout moving: {steps}."
            parts.append(html.figure(videos[name], f"Animation of {what}", caption))
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
    return html.table(Table("", ["channel", *heads], rows), caption)


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
    return f"<p>{escape(text)}; the others:</p>\n{html.table(content, caption, names=3)}"


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
            html.table(digests, caption, lambda row, column: "digest", names=2),
            html.facts([("page drawn by", versions), ("protocol", written)]),
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
