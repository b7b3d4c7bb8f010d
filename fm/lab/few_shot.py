"""The few-shot curve: how well a model learns a dataset from few trajectories, pretrained or from scratch.

For each number of trajectories there are two runs of one architecture. Both draw windows of this dataset alone, the
same windows in the same order for the same number of steps, and train one step ahead. All parts of the model learn: the
recipe's section `adapt` protects other datasets, and here there are none. The two runs differ in their initial weights
and, if so requested, in the learning rates. A sweep runs them (fm/lab/sweep.py).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter

from data_pipeline.errors import UserError, brief
from data_pipeline.files import write_whole
from data_pipeline.schema import parse_yaml
from data_pipeline.tables import Document, Marked, Table, render
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import load_pretrained
from fm.config import Recipe
from fm.datasets import check_context, load_own_recipe
from fm.distributed import EXIT_DONE, EXIT_INTERRUPTED
from fm.evaluation.page import Facts, PageTable, Paragraph, Picture, Section, render_page
from fm.evaluation.plots import (
    BLUE,
    DOTTED,
    GRAY,
    ORANGE,
    encode,
    legend_above,
    log_ticks,
    panel_figure,
    rasterize,
    style_panel,
)
from fm.evaluation.protocol import load_protocol
from fm.evaluation.scores import ONE_STEP
from fm.evaluation.trained import TrainedModel
from fm.lab.sweep import EXIT_FAILED, finish_trials
from fm.lab.sweep_file import Sweep, plan
from fm.lab.sweep_table import DONE, sweep_results
from fm.model.spec import to_json

PRETRAINED, SCRATCH = ARMS = ("pretrained", "from scratch")
Curves: TypeAlias = Mapping[str, Mapping[str, Sequence[float | None]]]  # arm -> block -> VRMSE at each count
ADAMW_RATE, MUON_RATE = "train.learning_rate", "train.muon_learning_rate"
DPI = 160
# Settings that a run of one dataset cannot have, or does not need: shares and protection of others, validations.
ALONE = {
    "adapt": None,
    "sampling.scheme": "uniform",
    "sampling.weights": None,
    "tracking.gradient_cosine_every": 0,
    "validation.every": 0,
    "checkpoint.keep": 1,
}


@dataclass(frozen=True)
class FewShot:
    """A few-shot study: the sweep that runs it, and what its runs have in common."""

    sweep: Sweep
    dataset: str
    pretrained: str  # the initial model of the first arm
    counts: tuple[int, ...]  # of trajectories
    windows: tuple[int, ...]  # one-step windows of so many trajectories
    steps: int  # of each run
    seen: int  # windows that each run draws
    rates: dict[str, float]  # arm -> peak learning rate
    muon_rates: dict[str, float]  # arm -> Muon's peak learning rate; empty if the recipe has another optimizer


def run_few_shot(
    file: Path,
    dataset: str,
    trajectories: str,
    out: Path,
    overrides: Sequence[str] = (),
    scratch_rate: float | None = None,
    windows: int | None = None,
    processes: int = 1,
) -> int:
    """Train and score the runs that are not finished, print the table, write the report; return the exit code.

    0: done, 1: a run failed, 130: interrupted. With `windows`, only so many one-step windows are scored. `processes`
    share each run. Raises UserError, before anything runs, for settings that do not fit together.
    """
    study = plan_few_shot(file, dataset, trajectories, overrides, scratch_rate)
    study = replace(study, sweep=replace(study.sweep, windows=windows))
    trials = plan(study.sweep, out)
    failed = finish_trials(study.sweep, trials, out, None, f"few-shot {dataset}", processes)
    if failed is None:
        return EXIT_INTERRUPTED
    results = sweep_results(study.sweep, trials, failed)
    print(write_report(out, study, results), end="")
    return EXIT_FAILED if failed else EXIT_DONE


def plan_few_shot(
    file: Path, dataset: str, trajectories: str, overrides: Sequence[str] = (), scratch_rate: float | None = None
) -> FewShot:
    """Return the study with its runs. `trajectories` are numbers, or all, separated by commas."""
    recipe = load_own_recipe(file, overrides)
    reader, counts = check_few_shot(recipe, dataset, trajectories)
    assert recipe.finetune is not None
    given = _checked_overrides(overrides)
    pretrained = load_pretrained(recipe.finetune.pretrained)
    check_context(recipe, pretrained, recipe.finetune.pretrained)
    peaks = _peak_rates(recipe, recipe.finetune.pretrained, given)
    rates = {PRETRAINED: peaks, SCRATCH: dict(peaks)}
    if scratch_rate is not None:  # Muon's keeps its ratio to AdamW's
        rates[SCRATCH] = {key: scratch_rate * (rate / peaks[ADAMW_RATE]) for key, rate in peaks.items()}
    model = to_json(pretrained.config)
    starts: dict[str, dict[str, Any]] = {
        PRETRAINED: {**rates[PRETRAINED], "finetune.gate": None, "finetune.unroll_override": {}},
        SCRATCH: {**rates[SCRATCH], "finetune": None, pretrained.section: model},
    }
    variants = {
        variant_name(arm, count): {**starts[arm], "data.trajectories": {dataset: count}}
        for count in counts
        for arm in ARMS
    }
    sweep = Sweep(
        file=file,
        title=f"Few-shot learning of {dataset}",
        variants=variants,
        base=file.name,
        overrides={**given, **ALONE, "data.datasets": [dataset]},
        protocol=recipe.validation.protocol,
    )
    length = recipe.window_length(dataset)
    return FewShot(
        sweep,
        dataset,
        recipe.finetune.pretrained,
        counts,
        windows=tuple(len(reader.restricted_to(count).index(length)) for count in counts),
        steps=recipe.train.steps,
        seen=recipe.train.steps * recipe.train.global_batch,
        rates={arm: of_arm[ADAMW_RATE] for arm, of_arm in rates.items()},
        muon_rates={arm: of_arm[MUON_RATE] for arm, of_arm in rates.items() if MUON_RATE in of_arm},
    )


def check_few_shot(recipe: Recipe, dataset: str, trajectories: str) -> tuple[ShardReader, tuple[int, ...]]:
    """Return the reader of the dataset's train split, and the numbers of trajectories; UserError if they do not fit."""
    if recipe.finetune is None or recipe.finetune.unroll_of(dataset) != 1:
        raise UserError(
            f"few-shot {dataset}: expected a recipe that goes on from a pretrained model one step at a time "
            "(finetune.pretrained, finetune.unroll_steps=1), since training from scratch takes one step at a time too"
        )
    reader = open_readers(recipe.data.shards, [dataset], "train", stream=recipe.stream())[dataset]
    return reader, parse_counts(trajectories, reader)


def _peak_rates(recipe: Recipe, pretrained: str, given: Mapping[str, Any]) -> dict[str, float]:
    """Return the peak learning rates by key: AdamW's, and Muon's if the recipe trains with Muon.

    A rate on the command line comes first, then the rate of the run that made the pretrained model, then the recipe's.
    The recipe's rates are for finetuning, and too low for a model from scratch.
    """
    train = recipe.train
    peaks = {ADAMW_RATE: train.learning_rate}
    if train.optimizer == "muon":
        peaks[MUON_RATE] = train.muon_learning_rate
    with suppress(UserError):  # a model without a recipe
        source = TrainedModel.open(pretrained).recipe.train
        if ADAMW_RATE not in given:
            peaks[ADAMW_RATE] = source.learning_rate
        if MUON_RATE in peaks and MUON_RATE not in given and source.optimizer == "muon":
            peaks[MUON_RATE] = source.muon_learning_rate
    return peaks


def variant_name(arm: str, count: int) -> str:
    """Return the name of the sweep's variant for an arm at a number of trajectories."""
    return f"{arm}, {count}"


def parse_counts(text: str, reader: ShardReader) -> tuple[int, ...]:
    """Return numbers of trajectories, ascending, each once. UserError for none, or more than the dataset has."""
    total, words = reader.num_trajectories, [word.strip() for word in text.split(",")]
    if not all(word == "all" or (word.isdecimal() and int(word) > 0) for word in words):
        raise UserError(f"--few-shot: expected numbers above 0, or all, with commas between, got {text!r}")
    counts = sorted({total if word == "all" else int(word) for word in words})
    if counts[-1] > total:
        raise UserError(
            f"--few-shot: {reader.dataset} has {total} training trajectories, expected numbers up to {total}, or all; "
            f"got {counts[-1]}"
        )
    return tuple(counts)


def _checked_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the overrides of all runs by key. Raises UserError for keys that the study sets itself."""
    given = {}
    for override in overrides:
        key, _, text = override.partition("=")
        if key.partition(".")[0] in ("run", "adapt") or key in {*ALONE, "data.datasets", "data.trajectories"}:
            raise UserError(
                f"override {override!r}: few-shot names and places its runs, chooses their data itself, and lets all "
                "parts of the model move"
            )
        given[key] = parse_yaml(text.encode(errors="surrogateescape"), f"override {brief(override)}")
    return given


def write_report(out: Path, study: FewShot, results: Mapping[str, Any]) -> str:
    """Write few_shot.md, .png, .json and index.html into `out`; return the table as Markdown.

    `results` are the sweep's. None stands for the score of a run that has failed or is not finite.
    """
    rows = {row["variant"]: row for row in results["variants"]}
    unfinished = [name for name, row in rows.items() if row["status"] != DONE]

    def score(name: str, block: str) -> float | None:
        return None if name in unfinished else rows[name]["scores"][block]["vrmse"].get(study.dataset)

    blocks, references = results["blocks"], results["references"].get(study.dataset, {})
    vrmse: Curves = {
        arm: {block: [score(variant_name(arm, count), block) for count in study.counts] for block in blocks}
        for arm in ARMS
    }
    persistence = {block: references.get(block, {}).get("persistence") for block in blocks}
    title, document = study.sweep.title, describe(study, vrmse, persistence, unfinished)
    text = f"# {title}\n\n{render(document, 'md')}"
    subtitle = f"{study.steps} steps and {study.seen} windows of {study.dataset} each, same architecture"
    picture = encode(rasterize(few_shot_figure(study.counts, vrmse, persistence, subtitle), DPI))
    content = {"title": title, "protocol": load_protocol(study.sweep.protocol).to_json(), **vars(study)}
    content |= {"vrmse": vrmse, "persistence": persistence, "unfinished": unfinished}
    del content["sweep"]
    # few_shot.json is removed first and written last: a folder that has it is complete.
    (out / "few_shot.json").unlink(missing_ok=True)
    write_whole(out / "few_shot.png", picture)
    write_whole(out / "few_shot.md", f"{text}\n![{title}](few_shot.png)\n".encode())
    write_whole(out / "index.html", page(study, document, picture).encode())
    write_whole(out / "few_shot.json", f"{json.dumps(content, indent=1, allow_nan=False)}\n".encode())
    return f"{text}\npage: {out / 'index.html'}\n"


def describe(
    study: FewShot, vrmse: Curves, persistence: Mapping[str, float | None], unfinished: Sequence[str]
) -> Document:
    """Return a table for each kind of score, and notes on what is compared."""
    tables = []
    for block in (block for block, value in persistence.items() if value is not None):
        rows = []
        for place, (count, windows) in enumerate(zip(study.counts, study.windows, strict=True)):
            ours, theirs = (vrmse[arm][block][place] for arm in ARMS)
            change = None if ours is None or not theirs else ours / theirs - 1
            scores = [Marked(None, "none") if value is None else value for value in (ours, theirs)]
            passes = f"{study.seen / windows:.1f}"
            rows.append([str(count), windows, passes, *scores, change, persistence[block]])
        head = ["trajectories", "windows", "passes", *ARMS, "change", "persistence"]
        tables.append(Table("One step" if block == ONE_STEP else f"Rollout, {block}", head, rows, ("change",)))
    notes = [
        f"Both arms: {study.steps} steps, {study.seen} windows of {study.dataset} alone, the same windows in the same "
        "order, one step at a time; one architecture, with as many parameters. Fewer trajectories are passed over more "
        "often. Sets of trajectories are nested.",
        f"Pretrained: begins with {study.pretrained}, whose own training is not counted here; "
        f"{_rates_text(study, PRETRAINED)}. From scratch: {_rates_text(study, SCRATCH)}.",
        "Normalization statistics are those of the whole train split, for both. One seed.",
    ]
    if unfinished:
        notes.append(f"No scores, see train.out there: {', '.join(unfinished)}.")
    about = f"VRMSE of {study.dataset}, lower is better. {load_protocol(study.sweep.protocol).describe()}."
    return Document(about, tables, notes)


def _rates_text(study: FewShot, arm: str) -> str:
    muon = f", Muon's {study.muon_rates[arm]:g}" if arm in study.muon_rates else ""
    return f"peak learning rate {study.rates[arm]:g}{muon}"


def few_shot_figure(
    counts: Sequence[int], curves: Curves, persistence: Mapping[str, float | None], subtitle: str
) -> Figure:
    """Draw VRMSE by arm against the number of trajectories `counts`, a panel a block; `persistence` is a line."""
    shown = {block: value for block, value in persistence.items() if value is not None}
    figure, panels = panel_figure(len(shown), 2.5, ("", "VRMSE, test split"), least_width=4.6)
    for axes, (block, value) in zip(panels, shown.items(), strict=True):
        axes.axhline(value, color=GRAY, linewidth=0.9, linestyle=DOTTED, label="persistence")
        for color, (arm, blocks) in zip((BLUE, ORANGE), curves.items(), strict=True):
            values = np.array([np.nan if one is None else one for one in blocks[block]], np.float64)
            axes.plot(counts, values, "o-", color=color, markersize=3.5, linewidth=1.3, label=arm)
        axes.set_title(block.replace("_", " "), fontsize=8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(counts)))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        log_ticks(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
        style_panel(axes)
    figure.supxlabel(f"training trajectories\n{subtitle}", fontsize=8)
    if panels:
        legend_above(figure, *panels[0].get_legend_handles_labels())
    return figure


def page(study: FewShot, document: Document, picture: bytes) -> str:
    """Return the HTML page, one file that needs no other."""
    facts = Facts([("pretrained model", study.pretrained), ("dataset", study.dataset), ("steps", str(study.steps))])
    caption = "VRMSE, test split; change: pretrained against from scratch"
    alt = f"{study.sweep.title}: error against trajectories"
    figure = Picture(picture, alt, "Error against training trajectories.", zoom=0.6)
    sections = [Section("curve", "Curve", [figure, *map(Paragraph, document.notes)])]
    for number, table in enumerate(document.tables):
        content = PageTable(table, caption, cell_class=partial(_change_class, table))
        sections.append(Section(f"table-{number}", table.title, [content]))
    return render_page(study.sweep.title, [Paragraph(document.about), facts], sections)


def _change_class(table: Table, row: int, column: int) -> str:
    """Return the style class of a cell: a change of at least half a percent is better or worse."""
    value = table.rows[row][column]
    if table.head[column] != "change" or not isinstance(value, float) or abs(value) < 0.005:
        return ""
    return "better" if value < 0 else "worse"
