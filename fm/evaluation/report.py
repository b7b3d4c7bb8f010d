"""The report of one evaluation: errors, scores, tables, pictures, and one page that shows all of it.

    <report>/
        index.html               the page: everything below, self-contained
        scores.json  scores.md   fm/evaluation/scores.py
        errors.npz  samples.npz  the files that everything is made from
        pictures/                the pictures of the page, one by one

scores.json is written last, so a report that has one is complete.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

import matplotlib
import numpy as np
import yaml

from data_pipeline.errors import UserError
from data_pipeline.files import inside, write_whole
from data_pipeline.tables import Cell, Table, render
from fm.evaluation.errors import BASELINES, ERRORS_FILE, ErrorFile, find_errors
from fm.evaluation.page import PAGE, Block, Code, Facts, PageTable, Paragraph, Picture, Section, render_page
from fm.evaluation.pictures import gif, overview, strip
from fm.evaluation.plots import QUANTILES, encode, growth_figure, rasterize, spectra_figure
from fm.evaluation.protocol import PROTOCOLS, VERSIONS, Protocol, load_protocol
from fm.evaluation.samples import SAMPLES_FILE, Sample, load_samples, save_samples
from fm.evaluation.scores import SCORES_FILE, Averages, Scores, WindowScores, score
from fm.evaluation.tables import STENCIL_TEXT, about, failures, score_document, score_table, vrmse_cell

DPI = 160
ZOOM = 0.7  # a page has 96 pixels an inch; the text in pictures should stay readable


def write_report(out: Path, errors: ErrorFile, scores: Scores, samples: Sequence[Sample]) -> None:
    """Write the report of an evaluation into `out`; an older scores.json is removed first."""
    out.mkdir(parents=True, exist_ok=True)
    inside(out, "pictures")
    (out / SCORES_FILE).unlink(missing_ok=True)
    errors.save(out / ERRORS_FILE)
    save_samples(out / SAMPLES_FILE, samples)
    figures = {"overview": overview(samples), "spectra": spectra_figure(samples)} if samples else {}
    figures["growth"] = growth_figure(errors.datasets, errors.protocol)
    figures |= {sample.dataset: strip(sample) for sample in samples}
    images = {name: rasterize(figure, DPI) for name, figure in figures.items()}
    videos = {sample.dataset: gif(sample) for sample in samples}
    for name, image in images.items():
        write_whole(out / "pictures" / f"{name}.png", encode(image, dpi=(DPI, DPI)))
    for name, video in videos.items():
        write_whole(out / "pictures" / f"{name}.gif", video)
    # A page of PNGs would be three times as large.
    small = {name: encode(image, "WEBP", quality=90, use_sharp_yuv=True) for name, image in images.items()}
    write_whole(out / PAGE, report_page(errors, scores, samples, small, videos).encode())
    pictures = "\n".join(f"![{name}](pictures/{name}.png)\n" for name in images)
    write_whole(out / "scores.md", f"# Scores\n\n{score_table(scores)}\n{pictures}".encode())
    scores.save(out / SCORES_FILE)


def rescore_errors(place: Path, protocol: str | None, eps: float | None, out: Path | None) -> str:
    """Return a table of scores from the stored errors of an evaluation and, with `out`, write a report there.

    `place` is an errors.npz, a report folder or a run; `protocol` is a name or a file, None for that of the errors. The
    report has the tables as CSV and LaTeX too. UserError if the protocol needs rollouts that were not measured.
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
    stored, samples = file.with_name(SAMPLES_FILE), []
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
    document = score_document(scores)
    write_whole(out / "scores.csv", render(document, "csv").encode())
    write_whole(out / "scores.tex", render(document, "latex").encode())
    write_report(out, errors, scores, samples)
    return score_table(scores)


def rescore(measured: ErrorFile, protocol: str | None, eps: float | None) -> tuple[ErrorFile, Scores]:
    """Return the errors under a protocol (a name or a file, their own by default) or eps, and their scores."""
    wanted = measured.protocol if protocol is None else load_protocol(protocol)
    if eps is not None:
        if not 0 <= eps < math.inf:
            raise UserError(f"--eps: expected a number of at least 0, got {eps}")
        wanted = replace(wanted, eps=eps)
    return replace(measured, protocol=wanted), score(measured, wanted)


def report_page(
    errors: ErrorFile,
    scores: Scores,
    samples: Sequence[Sample],
    pictures: Mapping[str, bytes],
    videos: Mapping[str, bytes],
) -> str:
    """Return the HTML of a report; a picture that is missing is left out.

    `pictures`: encoded images by name (overview, growth, spectra and the strips by dataset). `videos`: GIFs by dataset.
    """
    shown = {sample.dataset: sample for sample in samples}
    datasets = [
        Section(f"dataset-{name}", name, _dataset_blocks(name, scores, shown.get(name), pictures, videos))
        for name in scores.datasets
    ]
    count = sum(part.trajectories for part in scores.datasets.values())
    origin = [(name, str(value)) for name, value in scores.origin.items()]
    windows = [block for part in scores.datasets.values() for block in part.windows.values()]
    data = f"{len(scores.datasets)} datasets, {count} trajectories, {scores.protocol.split} split"
    sections = [
        Section("summary", "Summary", _summary(scores, count)),
        Section("one-step", "One step", _one_step(scores)),
        Section("rollouts", "Rollouts", [_score_table_block(scores, score_document(scores).tables[-1], windows, 2)]),
        Section("pictures", "Pictures", _picture_blocks(pictures)),
        Section("datasets", "Datasets", subsections=datasets),
        Section("again", "The same numbers again", _reproduction(errors, scores)),
    ]
    return render_page(_title(scores.origin), [Facts([*origin, ("data", data)])], sections)


def _title(origin: Mapping[str, Any]) -> str:
    """The run's name is taken from the path of its checkpoint, <run>/checkpoints/<step>."""
    checkpoint = PurePath(str(origin.get("checkpoint", "")))
    run = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.name
    run = run or PurePath(str(origin.get("prediction", ""))).name
    words = ["Evaluation", run and f"of {run}", f"at step {origin['step']}" if "step" in origin else ""]
    return " ".join(filter(None, words))


def _summary(scores: Scores, num_trajectories: int) -> list[Block]:
    linear = scores.stencil_ratios()
    rows: list[list[Cell]] = [
        [name, ratio, linear[name], *_wins(scores, name)] for name, ratio in scores.mean_ratios().items()
    ]
    columns = ["below persistence", "below the mean field", "below the linear stencil"]
    table = Table("", ["scores", "VRMSE / persistence", "linear stencil / persistence", *columns], rows)
    caption = (
        "Geometric means over datasets of the model's VRMSE over persistence's and of the linear stencil's over "
        "persistence's, and on how many datasets the model is better than each of the three baselines. "
        f"{STENCIL_TEXT}"
    )
    blocks: list[Block] = [Paragraph(about(scores.protocol))]
    one_step = [part.one_step for part in scores.datasets.values() if part.one_step is not None]
    failed, windows = sum(block.diverged for block in one_step), sum(block.count for block in one_step)
    if failed:
        alarm = f"{failed} of {windows} one-step predictions are not finite."
        blocks.append(Paragraph("They count as infinitely wrong.", alarm))
    if scores.diverged:
        alarm = f"{scores.diverged} of {num_trajectories} rollouts diverged."
        lines = [f"{name}: {failures(part.diverged)}" for name, part in scores.datasets.items() if part.diverged]
        blocks.append(Paragraph("They count as infinitely wrong in every average below.", alarm, lines))
    else:
        blocks.append(Paragraph(f"None of {num_trajectories} rollouts diverged: all their predictions are finite."))
    return [*blocks, PageTable(table, caption, "All datasets")]


def _wins(scores: Scores, name: str) -> list[Cell]:
    """On how many datasets the model beats each baseline; a score that is not finite beats none."""
    cells: list[Cell] = []
    for other in BASELINES:
        parts = [part for part in scores.datasets.values() if part.stencil is not None or other != "linear_stencil"]
        blocks = [block for part in parts if (block := part.blocks()[name]) is not None]
        pairs = [(block.vrmse(scores.statistic), getattr(block, other)) for block in blocks]
        won = sum(model is not None and (reference is None or model < reference) for model, reference in pairs)
        cells.append(f"{won} of {len(blocks)}" if blocks else None)
    return cells


def _one_step(scores: Scores) -> list[Block]:
    *tables, _ = score_document(scores).tables
    if not tables:
        return [Paragraph("Only rollouts were measured.")]
    blocks = [part.one_step for part in scores.datasets.values() if part.one_step is not None]
    return [_score_table_block(scores, tables[0], blocks, 1)]


SHADING = "shaded blue if it is below the best of persistence, mean field and linear stencil, else orange"


def _score_table_block(
    scores: Scores, table: Table, blocks: Sequence[Averages | None], num_text_columns: int
) -> PageTable:
    """A table of scores, one row for each of `blocks`, whose column of the protocol's statistic is shaded."""
    shaded = table.head.index(scores.statistic)
    what = "VRMSE over the protocol's windows of steps" if num_text_columns > 1 else "VRMSE, one frame to the next"
    caption = f"{what}. The model's {scores.statistic} is {SHADING}."
    return PageTable(
        table,
        caption,
        table.title,
        num_text_columns,
        lambda row, column: _shade(blocks[row], scores.statistic) if column == shaded else "",
    )


def _shade(block: Averages | None, statistic: str) -> str:
    """Return `better` if the model is below the best baseline, else `worse`; none where nothing was measured."""
    best = block.best_baseline() if block is not None else None
    if block is None or best is None:
        return ""
    value = block.vrmse(statistic)
    return "better" if value is not None and value < best else "worse"


def _picture_blocks(pictures: Mapping[str, bytes]) -> list[Block]:
    low, high = (f"{100 * quantile:.0f}%" for quantile in QUANTILES)
    texts = {
        "overview": (
            "Overview",
            "Truth, prediction and error of every dataset.",
            "Truth, prediction and error (prediction - truth) of one channel of the longest rollout of each dataset, "
            "at the middle of its shown steps.",
        ),
        "growth": (
            "Error growth",
            "VRMSE against rollout step for every dataset: the model and the baselines.",
            "VRMSE, mean over channels, against the step of a rollout: the median over trajectories and, for the "
            f"model, the range from {low} to {high} of them. A trajectory that is not finite counts as infinite. Every "
            "other window of the protocol is shaded.",
        ),
        "spectra": (
            "Spectra",
            "Power against wavenumber for every dataset: truth, prediction and error at three steps.",
            "Radial power spectra of truth, prediction and error at the first, middle and last shown step: a "
            "prediction that is too smooth lies below the truth at large wavenumbers, one with noise of its own above "
            "it. Where error and prediction meet, nothing of the truth is left at that scale.",
        ),
    }
    return [
        Picture(pictures[name], alt, caption, title, ZOOM)
        for name, (title, alt, caption) in texts.items()
        if name in pictures
    ]


def _dataset_blocks(
    name: str,
    scores: Scores,
    sample: Sample | None,
    pictures: Mapping[str, bytes],
    videos: Mapping[str, bytes],
) -> list[Block]:
    blocks: list[Block] = [_channel_table(name, scores)]
    if sample is None:
        return blocks
    what = f"{sample.channel} of trajectory {sample.trajectory}"
    if name in pictures:
        caption = (
            f"{what}: truth, prediction and error. {sample.extent_text}; {sample.apart_text}; "
            "physical units. Truth and prediction have the same colors at all steps; so has the error, with limits of "
            "its own."
        )
        blocks.append(Picture(pictures[name], f"{what}: truth, prediction and error", caption, name, ZOOM))
    if name in videos:
        steps = f"steps {sample.steps[0]} to {sample.steps[-1]}, {len(sample.steps)} of them"
        blocks.append(Picture(videos[name], f"Animation of {what}", f"The same rollout as a movie: {steps}.", name))
    return blocks


def _channel_table(name: str, scores: Scores) -> PageTable:
    """The model's VRMSE of each channel, in one step and in every window that the rollouts cover."""
    part, statistic = scores.datasets[name], scores.statistic
    blocks = {key: block for key, block in part.blocks().items() if block is not None}
    heads = [
        f"{key} ({block.first}-{block.last})" if isinstance(block, WindowScores) else key
        for key, block in blocks.items()
    ]
    rows: list[list[Cell]] = [
        [channel, *(block.per_channel[channel].vrmse(statistic) for block in blocks.values())]
        for channel in part.channels
    ]
    rows.append(["all channels", *(vrmse_cell(block, statistic) for block in blocks.values())])
    caption = (
        f"{statistic.capitalize()}; {part.grid[0]} x {part.grid[1]} grid points, {part.trajectories} trajectories, "
        f"rollouts of up to {part.horizon} steps. A score is {SHADING}."
    )
    if part.stencil is not None:
        caption += f" Linear stencil: frames, ridge {part.stencil.describe()} (one step / rollouts)."
    cells = [[block.per_channel[channel] for block in blocks.values()] for channel in part.channels]
    cells.append(list(blocks.values()))

    def shade(row: int, column: int) -> str:
        return _shade(cells[row][column - 1], statistic) if column else ""

    return PageTable(Table("", ["channel", *heads], rows), caption, "VRMSE by channel", cell_class=shade)


def _reproduction(errors: ErrorFile, scores: Scores) -> list[Block]:
    """Commands, digests, versions and the protocol."""
    protocol, predicted = errors.protocol, "prediction" in errors.origin
    rows: list[list[Cell]] = [[name, part.data_digest] for name, part in scores.datasets.items()]
    what = "the truth and the numbers of its trajectories" if predicted else "the shards' manifest"
    digests = Table("", ["dataset", f"SHA-256 of {what}"], rows)
    commands = (
        "# from the stored errors beside this page, without the model; other windows, averages or eps with --protocol\n"
        "# and --eps\n"
        f"fm score errors.npz --out DIR\n\n{_commands(protocol, 'PRED --truth FILE' if predicted else 'RUN')}"
    )
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, matplotlib {matplotlib.__version__}"
    # As a protocol file has it: JSON's 1e-07 is a text in YAML, and no parts are left out.
    windows = {name: {k: v for k, v in asdict(window).items() if v} for name, window in protocol.windows.items()}
    content = {**protocol.to_json(), "windows": windows}
    written = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10_000).strip()
    caption = "The same digest means the same bytes."
    return [
        Code(commands),
        PageTable(digests, caption, "Data", num_text_columns=2, cell_class=lambda row, column: "digest"),
        Facts([("page drawn by", versions), ("protocol", written)]),
    ]


def _commands(protocol: Protocol, what: str) -> str:
    """The commands that measure `what` again; a protocol that no name and options describe has to be in a file."""
    named = next((one for one in VERSIONS if one.reference == protocol.reference), None)
    count, eps = protocol.one_step_windows, protocol.eps  # set by options
    known = named is not None and protocol == replace(
        named, split=protocol.split, context=protocol.context, one_step_windows=count, eps=eps
    )
    subset = f" --windows {count}" if count else ""
    name = protocol.name if named in PROTOCOLS.values() else protocol.reference
    which = f"{name} --split {protocol.split}{subset}" if known else "PROTOCOL.yaml"
    head = "# from the weights" if known else "# from the weights, with the protocol below in a file PROTOCOL.yaml"
    if named is None or named.eps == eps or not known:
        return f"{head}\nfm evaluate {what} --protocol {which} --out DIR"
    rescored = f"fm score MEASURED --eps {eps!r} --out DIR"
    return f"{head}\nfm evaluate {what} --protocol {which} --out MEASURED\n{rescored}"
