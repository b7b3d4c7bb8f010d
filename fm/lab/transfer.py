"""Compare runs on several datasets together with runs on one dataset each: does training together help or hurt?

fm/lab/learning_curves.py reads the runs and compares them. This file makes the table and the figures. Several joint
runs are of different seeds; each bespoke run is then compared with the joint run of its seed, and medians are given.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic_core import to_json

from data_pipeline.files import inside, write_whole
from data_pipeline.progress import progress_bar
from data_pipeline.registry import load_registry
from data_pipeline.tables import Cell, Document, Marked, Table, render
from fm.config import changed_settings, recipe_to_dict
from fm.evaluation.cosines import Cosines, mean_cosines
from fm.evaluation.plots import (
    BLUE,
    DOTTED,
    GRAY,
    ORANGE,
    cosine_figure,
    encode,
    legend_above,
    log_ticks,
    panel_figure,
    rasterize,
    style_panel,
)
from fm.evaluation.published import BESPOKE, JOINT, joint_over_bespoke
from fm.evaluation.scores import geometric_mean, spearman
from fm.lab.learning_curves import (
    HELPS,
    HURTS,
    VERDICTS,
    Comparison,
    LearningCurve,
    Match,
    TrainedRun,
    compare_all,
    read_run,
)

DPI = 160
TERA = 1e12
WIDE = 20  # an axis from x to more than 20 x has no room for four labels a decade
MIN_AGREEMENT = 3  # datasets that a rank correlation needs
MEDIANS = (
    "Medians: of several bespoke runs of a seed, such as a short and a long one, the run counts whose comparison is "
    "closest to the ends of both runs, where their learning rates have decayed alike."
)
# Settings that may differ without a note: they change what is written, not what is learned.
UNREMARKABLE = ("run.name", "run.dir", "run.stop_at", "data.", "checkpoint.", "validation.", "tracking.", "guard.")


def transfer(joint: Path, others: Sequence[Path], out: Path | None = None, form: str = "md") -> str:
    """Compare runs on several datasets with runs on one each; return the table in the format `form`.

    Those of `others` that are of several datasets are joint runs of other seeds than `joint`. Writes transfer.md,
    transfer.json, transfer.png and, if there are cosines, cosines.png into `out`, by default <joint>/report/transfer.
    Raises UserError if the runs cannot be compared.
    """
    first, *rest = map(read_run, progress_bar([joint, *others], desc="transfer", unit="run", leave=False))
    joints, comparisons = compare_all(first, rest)
    document = describe(joints, comparisons)
    text = render(document, form)
    out = out or inside(joint, "report/transfer")
    figures = {"transfer": transfer_figure(joints, comparisons)}
    if measured := _cosines(joints):
        steps = sorted({step for run in joints for step, _ in run.cosines})
        title = f"mean of {len(measured)} measurements, steps {steps[0]} to {steps[-1]}"
        figures["cosines"] = cosine_figure(mean_cosines(measured), title)
    # transfer.json is removed first and written last: a folder that has it is complete.
    (out / "transfer.json").unlink(missing_ok=True)
    for name, figure in figures.items():
        write_whole(out / f"{name}.png", encode(rasterize(figure, DPI)))
    pictures = "\n".join(f"![{name}]({name}.png)\n" for name in figures)
    write_whole(out / "transfer.md", f"# Transfer\n\n{render(document, 'md')}\n{pictures}".encode())
    numbers = to_json(_numbers(joints, comparisons), indent=1, inf_nan_mode="null", fallback=np.ndarray.tolist)
    write_whole(out / "transfer.json", numbers + b"\n")
    return text


def _cosines(joints: Sequence[TrainedRun]) -> list[Cosines]:
    return [cosines for run in joints for _, cosines in run.cosines]


def describe(joints: Sequence[TrainedRun], comparisons: Sequence[Comparison]) -> Document:
    """Return the comparisons as a table, medians over seeds as another, and notes."""
    measured, paper = _cosines(joints), _paper_ratios(comparisons)
    last, mean = (measured[-1].with_others(), mean_cosines(measured).with_others()) if measured else ({}, {})
    rows = []
    for one in comparisons:
        columns: dict[str, Cell] = {
            "dataset": one.dataset,
            **({"joint run": str(one.joint.path)} if len(joints) > 1 else {}),
            "bespoke run": str(one.bespoke.path),
            "windows seen": None if one.windows.amount is None else int(one.windows.amount),
            "joint": _score(one.windows.joint),
            "bespoke": _score(one.windows.bespoke),
            "joint / bespoke": _finite(one.windows.ratio),
            "verdict": one.windows.verdict,
            "TFLOP": None if one.flops.amount is None else one.flops.amount / TERA,
            "joint / bespoke, equal FLOPs": _finite(one.flops.ratio),
            "paper": paper[one.dataset],
            "bespoke parameters": one.bespoke.parameters,
        }
        if measured:
            columns |= {"cosine, last": _finite(last[one.dataset]), "cosine, mean": _finite(mean[one.dataset])}
        rows.append(columns)
    first, validation = joints[0], joints[0].recipe.validation
    which = f"{first.path}, {first.parameters} parameters, was"
    if len(joints) > 1:
        seeds = ", ".join(str(run.seed) for run in joints)
        which = f"{len(joints)} runs of {first.parameters} parameters, seeds {seeds}, were"
    about = (
        f"Validation VRMSE, one step, averaged weights, {validation.windows} windows a dataset, protocol "
        f"{validation.protocol}; lower is better. {which} trained on {len(first.shards)} datasets together; beside "
        "it runs of one dataset, after as many training windows of it, and after as many FLOPs."
    )
    tables = [Table("Training together", list(rows[0]), [list(row.values()) for row in rows])]
    if len(comparisons) > len(paper):
        head = ["dataset", *(f"joint / bespoke, equal {what}" for what in AMOUNTS), "paper"]
        body = [
            [name, *(_median_cell(_ratios(comparisons, name, of)) for of in AMOUNTS.values()), paper[name]]
            for name in paper
        ]
        tables.append(Table("Medians over seeds", head, body))
    return Document(about, tables, _notes(joints, comparisons, paper))


AMOUNTS: Mapping[str, Callable[[Comparison], Match]] = {
    "windows": lambda one: one.windows,
    "FLOPs": lambda one: one.flops,
}


def _ratios(comparisons: Sequence[Comparison], dataset: str, of: Callable[[Comparison], Match]) -> list[float]:
    """Return joint / bespoke of a dataset, one for each seed that has one; inf where only the joint's is not finite.

    MEDIANS says which of several bespoke runs of a seed counts.
    """
    chosen: dict[tuple[Path, int], Match] = {}
    for one in comparisons:
        key = (one.joint.path, one.bespoke.seed)
        if one.dataset == dataset and not math.isnan(of(one).ratio):
            chosen[key] = max(chosen.get(key, Match()), of(one), key=lambda match: match.reach)
    return [match.ratio for match in chosen.values()]


def _median_cell(ratios: Sequence[float]) -> Cell:
    """Return the median, marked with the number of seeds, the lowest and the highest."""
    if not ratios:
        return None
    mark = f"{len(ratios)} seeds, {min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else "1 seed"
    return Marked(_finite(statistics.median(ratios)), mark)


def _paper_ratios(comparisons: Sequence[Comparison]) -> dict[str, Cell]:
    """Return the paper's joint / bespoke by dataset; None where nothing is published."""
    cards = load_registry().cards
    return {
        one.dataset: joint_over_bespoke(cards[one.dataset]) if one.dataset in cards else None for one in comparisons
    }


def _score(vrmse: float) -> Cell:
    return Marked(None, "not finite") if math.isinf(vrmse) else _finite(vrmse)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _notes(joints: Sequence[TrainedRun], comparisons: Sequence[Comparison], paper: Mapping[str, Cell]) -> list[str]:
    measured = _cosines(joints)
    notes = [
        _summary(comparisons),
        f"joint / bespoke below {HELPS}: training together helps; above {HURTS}: it hurts. Between validations VRMSE "
        "is linear in the logarithm of the windows seen, or of the FLOPs; beyond them there is no comparison.",
        "FLOPs: of forward and backward passes, all datasets of a run together, counted from its log.",
        *([MEDIANS] if len(comparisons) > len(paper) else []),
        *([_paper_note(comparisons, paper)] if any(cell is not None for cell in paper.values()) else []),
        f"cosine: of the dataset's gradient with the others', their mean, in the last and over all of "
        f"{len(measured)} measurements."
        if measured
        else "No cosines of gradients: the joint run has measured none (tracking.gradient_cosine_every).",
    ]
    notes += [_ranges(one) for one in comparisons if one.windows.amount is None and one.flops.amount is None]
    runs: dict[tuple[str, str], list[str]] = {}
    for one in comparisons:
        lines = changed_settings(recipe_to_dict(one.bespoke.recipe), recipe_to_dict(one.joint.recipe))
        if different := "; ".join(line for line in lines if not line.startswith(UNREMARKABLE)):
            runs.setdefault((str(one.joint.path), different), []).append(str(one.bespoke.path))
    notes += [f"Settings of {', '.join(paths)} -> {joint}: {different}." for (joint, different), paths in runs.items()]
    missing = sorted(joints[0].shards.keys() - {one.dataset for one in comparisons})
    if missing:
        command = f"accelerate launch RECIPE 'data.datasets=[{missing[0]}]' run.name=bespoke_{missing[0]}"
        notes.append(f"No run of {', '.join(missing)} alone; `{command}` makes one.")
    return notes


def _paper_note(comparisons: Sequence[Comparison], paper: Mapping[str, Cell]) -> str:
    """Describe the paper's ratios, and how far our datasets are in their order."""
    agreements = []
    for what, of in AMOUNTS.items():
        theirs, ours = [], []
        for name, cell in paper.items():
            published = cell.value if isinstance(cell, Marked) else cell
            ratios = _ratios(comparisons, name, of)
            if isinstance(published, float) and ratios:
                theirs.append(published)
                ours.append(statistics.median(ratios))
        if len(ours) >= MIN_AGREEMENT and (found := spearman(ours, theirs)) is not None:
            agreements.append(f"{found:.2f} at equal {what} over {len(ours)} datasets")
    order = f" Spearman's rank correlation of ours with it: {', '.join(agreements)}." if agreements else ""
    return (
        f"paper: {JOINT} over {BESPOKE} of the WaveLiT paper, one step, test split, after 1,000,000 steps on eight "
        f"datasets and 500,000 on one: neither equal windows nor equal FLOPs.{order}"
    )


def _summary(comparisons: Sequence[Comparison]) -> str:
    verdicts = [one.windows.verdict for one in comparisons]
    counts = ", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in VERDICTS if verdict in verdicts)
    comparable = [one for one in comparisons if one.windows.amount is not None]
    diverged = [one.dataset for one in comparable if not 0 < one.windows.ratio < math.inf]
    if diverged:
        return f"{counts}. No mean of joint / bespoke, a score is not finite or 0: {', '.join(diverged)}."
    mean = geometric_mean([one.windows.ratio for one in comparable])
    return counts + (f". Geometric mean of joint / bespoke: {mean:.4f}." if mean is not None else ".")


def _ranges(one: Comparison) -> str:
    """Explain why two curves have no point in common."""

    def reach(run: TrainedRun) -> str:
        curve = run.curves.get(one.dataset)
        return f"after {curve.windows[0]:.0f} to {curve.windows[-1]:.0f} windows" if curve else "before any window"

    return (
        f"{one.dataset}: validated {reach(one.joint)} of it in {one.joint.path}, {reach(one.bespoke)} in "
        f"{one.bespoke.path}. Train on the run that has seen less, or lower the other's validation.every."
    )


def transfer_figure(joints: Sequence[TrainedRun], comparisons: Sequence[Comparison]) -> Figure:
    """Draw VRMSE against windows of the dataset seen, a panel a dataset; a line marks where two were compared."""
    names = sorted({one.dataset for one in comparisons})
    figure, panels = panel_figure(len(names), 1.95, ("windows of it seen", "VRMSE"))
    legend: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(name, fontsize=8)
        for joint in joints:
            if name in joint.curves:
                _draw(axes, joint.curves[name], BLUE, "together")
        for one in (one for one in comparisons if one.dataset == name):
            if one.windows.amount is not None:
                label = "compared here"
                axes.axvline(one.windows.amount, color=GRAY, linewidth=0.8, linestyle=DOTTED, label=label)
            if name in one.bespoke.curves:
                _draw(axes, one.bespoke.curves[name], ORANGE, "alone")
        axes.set_xscale("log")
        axes.set_yscale("log")
        fewest, most = axes.get_xlim()
        log_ticks(axes.xaxis, (1, 2, 3, 5) if most < WIDE * fewest else (1, 3))
        log_ticks(axes.yaxis, (1, 2, 3, 5))
        style_panel(axes)
        handles, labels = axes.get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True)) | legend
    legend_above(figure, list(legend.values()), list(legend))
    return figure


def _draw(axes: Axes, curve: LearningCurve, color: str, label: str) -> None:
    shown = np.where(np.isfinite(curve.vrmse), curve.vrmse, np.nan)
    axes.plot(curve.windows, shown, "o-", color=color, markersize=2.5, linewidth=1.2, label=label)


def _numbers(joints: Sequence[TrainedRun], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the content of transfer.json."""

    def run(one: TrainedRun) -> dict[str, Any]:
        return {"run": str(one.path), "seed": one.seed, "parameters": one.parameters, "curves": one.curves}

    def match(one: Match) -> dict[str, Any]:
        return {"amount": one.amount, "joint": one.joint, "bespoke": one.bespoke, "ratio": one.ratio}

    return {
        "joints": [run(one) for one in joints],
        "comparisons": [
            {
                "dataset": one.dataset,
                "joint": str(one.joint.path),
                "bespoke": run(one.bespoke),
                "windows": match(one.windows),
                "flops": match(one.flops),
                "verdict": one.windows.verdict,
            }
            for one in comparisons
        ],
        "thresholds": {"helps": HELPS, "hurts": HURTS},
        "cosines": [
            {"run": str(run.path), "step": step, **cosines.to_json()} for run in joints for step, cosines in run.cosines
        ],
    }
