"""The few-shot curve: error against number of trajectories, one panel a kind of score.

`fm few-shot`: the curve as a table, a file for programs, a picture and a page.

The few-shot curve: how well a model learns a dataset from few trajectories, pretrained or from scratch.

For each number of trajectories there are two runs of one architecture. They draw only this dataset, the same windows in
the same order for the same number of steps, one step at a time, and all parts of the model move (the recipe's section
`adapt` protects other datasets, of which there are none here); they differ in the weights that they begin with, and in
the learning rate if so asked. A sweep runs them (fm/lab/sweep.py).
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullFormatter

from data_pipeline.files import UserError, atomic_file
from data_pipeline.tables import Document, Marked, Table, render
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import load_pretrained
from fm.config import Recipe, load_recipe
from fm.distributed import EXIT_DONE, EXIT_INTERRUPTED
from fm.evaluation.evaluate import TrainedModel
from fm.evaluation.page import Block, Facts, PageTable, Paragraph, Picture, Section, render_page
from fm.evaluation.protocol import load_protocol
from fm.lab.sweep import EXIT_FAILED, finish_trials, sweep_results
from fm.lab.sweep_file import Sweep, Variant, plan
from fm.model.spec import to_json

# Distinct to colour-blind readers (Okabe and Ito 2008).
COLOURS, PERSISTENCE = ("#0072B2", "#D55E00"), "#595959"


def few_shot_figure(
    counts: Sequence[int],
    curves: Mapping[str, Mapping[str, Sequence[float | None]]],
    persistence: Mapping[str, float | None],
    subtitle: str,
) -> Figure:
    """VRMSE by arm and block at each number of trajectories in `counts`; `persistence` by block is a line."""
    shown = [block for block, value in persistence.items() if value is not None]
    figure = Figure(figsize=(max(2.45 * len(shown), 4.6), 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(len(shown), 1), squeeze=False)[0]
    for axes, block in zip(panels, shown, strict=False):
        value = persistence[block]
        assert value is not None
        axes.axhline(value, color=PERSISTENCE, linewidth=0.9, linestyle=(0, (1, 1.5)), label="persistence")
        for colour, (arm, blocks) in zip(COLOURS, curves.items(), strict=True):
            values = np.array([np.nan if one is None else one for one in blocks[block]], np.float64)
            axes.plot(counts, values, "o-", color=colour, markersize=3.5, linewidth=1.3, label=arm)
        _style(axes, counts)
        axes.set_title(block.replace("_", " "), fontsize=8)
    panels[0].set_ylabel("VRMSE, test split", fontsize=8)
    figure.supxlabel(f"training trajectories\n{subtitle}", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _style(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(counts)))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", linewidth=0.3, color="#D0D0D0")
    axes.tick_params(labelsize=7, width=0.5, length=2.5)


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
    """Return the HTML page: the curve, and a table for each kind of score."""
    intro: list[Block] = [
        Paragraph(document.about),
        Facts([("pretrained model", curve.pretrained), ("dataset", curve.dataset), ("steps", str(curve.steps))]),
    ]
    shown = Picture(picture, f"{title}: error against trajectories", "Error against training trajectories.", zoom=0.6)
    sections = [Section("curve", "Curve", [shown, *map(Paragraph, document.notes)])]
    for number, table in enumerate(document.tables):
        caption = "VRMSE, test split; change: pretrained against from scratch"
        sections.append(Section(f"table-{number}", table.title, [PageTable(table, caption, cell_class=_shade(table))]))
    return render_page(title, intro, sections)


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


LENGTH = 2  # frames of a window of one-step training
# What a run of one dataset cannot have, or need not: other datasets' shares and their protection, validations.
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
    """What is compared."""

    recipe: Recipe
    dataset: str
    counts: tuple[int, ...]  # of trajectories
    windows: tuple[int, ...]  # that so many trajectories have
    rates: dict[str, float]  # arm -> peak learning rate
    sweep: Sweep


def run_few_shot(
    file: Path,
    dataset: str,
    trajectories: str,
    out: Path,
    overrides: Sequence[str] = (),
    scratch_rate: float | None = None,
    launch_config: Path | None = None,
) -> int:
    """Train and score what is not done yet, print the table, and write it with picture and page. Returns the exit code.

    0: done, 1: a run failed, 130: interrupted. UserError, before anything runs, for what does not fit together.
    """
    study = plan_few_shot(file, dataset, trajectories, overrides, scratch_rate)
    trials = plan(study.sweep, out)
    failed = finish_trials(study.sweep, trials, out, launch_config)
    if failed is None:
        return EXIT_INTERRUPTED
    results = sweep_results(study.sweep, trials, failed)
    print(write_report(out, study.sweep, curve_of(study, results)), end="")
    return EXIT_FAILED if failed else EXIT_DONE


def plan_few_shot(
    file: Path, dataset: str, trajectories: str, overrides: Sequence[str] = (), scratch_rate: float | None = None
) -> FewShot:
    """The runs that the study takes. `trajectories` are numbers, or all, with commas between."""
    recipe = load_recipe(file, overrides)
    if recipe.finetune is None or recipe.finetune.unroll_of(dataset) != 1:
        raise UserError(
            f"{file}: expected a recipe that goes on from a pretrained model one step at a time (finetune.pretrained, "
            "finetune.unroll_steps=1), since training from scratch takes one step at a time too"
        )
    given = _given(overrides)
    if scratch_rate is not None and not 0 < scratch_rate < float("inf"):
        raise UserError(f"--scratch-learning-rate: expected a number above 0, got {scratch_rate}")
    pretrained = load_pretrained(recipe.finetune.pretrained)
    reader = open_readers(recipe.data.shards, [dataset], "train")[dataset]
    counts = parse_counts(trajectories, reader)
    rate = recipe.train.learning_rate
    if "train.learning_rate" not in given:
        rate = _rate_of(recipe.finetune.pretrained) or rate
    rates = {PRETRAINED: rate, SCRATCH: scratch_rate or rate}
    model = to_json(pretrained.config)
    starts: dict[str, dict[str, Any]] = {
        PRETRAINED: {"finetune.gate": None, "finetune.unroll_override": {}},
        SCRATCH: {"finetune": None, pretrained.section: model},
    }
    variants = tuple(
        Variant(
            variant_name(arm, count),
            file,
            {**starts[arm], "train.learning_rate": rates[arm], "data.trajectories": {dataset: count}},
        )
        for count in counts
        for arm in ARMS
    )
    sweep = Sweep(
        file,
        f"Few-shot learning of {dataset}",
        variants,
        {**given, **ALONE, "data.datasets": [dataset]},
        protocol=recipe.validation.protocol,
    )
    windows = tuple(len(reader.restricted_to(count).index(LENGTH)) for count in counts)
    return FewShot(recipe, dataset, counts, windows, rates, sweep)


def variant_name(arm: str, count: int) -> str:
    """A row of the sweep: an arm at a number of trajectories."""
    return f"{arm}, {count}"


def parse_counts(text: str, reader: ShardReader) -> tuple[int, ...]:
    """Numbers of trajectories, ascending, each once; those that the dataset has not are left out, and it is said."""
    total, words = reader.num_trajectories, [word.strip() for word in text.split(",")]
    if not all(word == "all" or (word.isdecimal() and int(word) > 0) for word in words):
        raise UserError(f"--trajectories: expected numbers above 0, or all, with commas between, got {text!r}")
    asked = {total if word == "all" else int(word) for word in words}
    counts = tuple(sorted(count for count in asked if count <= total))
    if missing := sorted(asked - set(counts)):
        print(f"{reader.dataset} has {total} training trajectories: {', '.join(map(str, missing))} left out")
    if not counts:
        raise UserError(f"--trajectories: {reader.dataset} has {total}, expected one number that is not above, or all")
    return counts


def curve_of(study: FewShot, results: Mapping[str, Any]) -> Curve:
    """The numbers of the sweep as two curves; None where a run has no finite score."""
    rows = {row["variant"]: row for row in results["variants"]}
    blocks = tuple(results["blocks"])
    vrmse = {
        arm: {
            block: [_score(rows[variant_name(arm, count)], block, study.dataset) for count in study.counts]
            for block in blocks
        }
        for arm in ARMS
    }
    references = results["references"].get(study.dataset, {})
    train = study.recipe.train
    assert study.recipe.finetune is not None
    return Curve(
        dataset=study.dataset,
        pretrained=study.recipe.finetune.pretrained,
        counts=study.counts,
        windows=study.windows,
        steps=train.steps,
        seen=train.steps * train.global_batch,
        rates=study.rates,
        vrmse=vrmse,
        persistence={block: references.get(block, {}).get("persistence") for block in blocks},
        unfinished=tuple(name for name, row in rows.items() if row["status"] != "done"),
    )


def _score(row: Mapping[str, Any], block: str, dataset: str) -> float | None:
    return row["scores"][block]["vrmse"].get(dataset) if row["status"] == "done" else None


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides of all runs, whose form the recipe's loader has checked. UserError for those that are ours."""
    given = {}
    for override in overrides:
        key, _, text = override.partition("=")
        if key.partition(".")[0] in ("run", "adapt") or key in {*ALONE, "data.datasets", "data.trajectories"}:
            raise UserError(
                f"override {override!r}: few-shot names and places its runs, chooses their data itself, and lets all "
                "parts of the model move"
            )
        given[key] = yaml.safe_load(text)
    return given


def _rate_of(pretrained: str) -> float | None:
    """The peak learning rate of the run that made a model, as far as it is known."""
    try:
        return TrainedModel.open(pretrained).recipe.train.learning_rate
    except UserError:  # weights alone
        return None
