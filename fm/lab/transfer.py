"""Compare a run on several datasets together with runs on one dataset each: does training together help or hurt?

A joint run and a bespoke run are compared after equal numbers of training windows of the bespoke run's dataset: the
largest number that both have reached. The joint run has by then also trained on windows of the other datasets. The
ratio of the two VRMSEs shows whether that helped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic_core import to_json

from data_pipeline.errors import UserError
from data_pipeline.files import inside, write_whole
from data_pipeline.progress import progress_bar
from data_pipeline.tables import Cell, Document, Marked, Table, render
from fm.checkpoint import load_pretrained, read_state, use_checkpoint
from fm.config import Recipe, changed_settings, recipe_to_dict, resolve
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
from fm.evaluation.scores import geometric_mean
from fm.training.runlog import parse_lines

DPI = 160
HELPS, HURTS = 0.97, 1.03  # joint VRMSE / bespoke VRMSE; a ratio between them counts as equal
VERDICTS = ("helps", "equal", "hurts", "neither finite", "not comparable")
# Settings that may differ without a note: they change what is written, not what is learned.
UNREMARKABLE = ("run.name", "run.dir", "run.stop_at", "data.", "checkpoint.", "validation.", "tracking.", "guard.")


def transfer(joint: Path, bespoke: Sequence[Path], out: Path | None = None, form: str = "md") -> str:
    """Compare a run on several datasets with runs on one each; return the table in the format `form`.

    Writes transfer.md, transfer.json, transfer.png and, if there are cosines, cosines.png into `out`, by default
    <joint>/report/transfer. Raises UserError if the runs cannot be compared.
    """
    together, *alone = map(read_run, progress_bar([joint, *bespoke], desc="transfer", unit="run", leave=False))
    comparisons = sorted((compare(together, run) for run in alone), key=lambda one: one.dataset)
    document = describe(together, comparisons)
    text = render(document, form)
    out = out or inside(joint, "report/transfer")
    figures = {"transfer": transfer_figure(together, comparisons)}
    if together.cosines:
        steps = [step for step, _ in together.cosines]
        title = f"mean of {len(steps)} measurements, steps {steps[0]} to {steps[-1]}"
        figures["cosines"] = cosine_figure(mean_cosines([cosines for _, cosines in together.cosines]), title)
    # transfer.json is removed first and written last: a folder that has it is complete.
    (out / "transfer.json").unlink(missing_ok=True)
    for name, figure in figures.items():
        write_whole(out / f"{name}.png", encode(rasterize(figure, DPI)))
    pictures = "\n".join(f"![{name}]({name}.png)\n" for name in figures)
    write_whole(out / "transfer.md", f"# Transfer\n\n{render(document, 'md')}\n{pictures}".encode())
    numbers = to_json(_numbers(together, comparisons), indent=1, inf_nan_mode="null", fallback=np.ndarray.tolist)
    write_whole(out / "transfer.json", numbers + b"\n")
    return text


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """One-step VRMSE of a dataset's validations against the number of its windows that the run had trained on."""

    windows: np.ndarray  # (n,), ascending, above 0
    vrmse: np.ndarray  # (n,); inf if a prediction was not finite

    def at(self, windows: float) -> float:
        """Return the VRMSE after a number of windows between the first and the last validation.

        Between validations it is linear in the logarithm of the number of windows.
        """
        assert self.windows[0] <= windows <= self.windows[-1]
        return float(np.interp(np.log(windows), np.log(self.windows), self.vrmse))


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The training of a run, as its directory records it."""

    path: Path
    recipe: Recipe
    shards: Mapping[str, str]  # dataset -> digest of its training shards
    parameters: int
    curves: Mapping[str, LearningCurve]  # by dataset, of those with a validation after their first windows
    cosines: Sequence[tuple[int, Cosines]]  # step and measurement


def read_run(path: Path) -> TrainedRun:
    """Read a run directory. Raises UserError if it is none, its logs have gaps, or it was never validated."""
    for name in ("log.jsonl", "events.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path}: not a run directory, it has no {name}. Expected one such as runs/quickstart")
    state, model = use_checkpoint(path, lambda found: (read_state(found), load_pretrained(found)))
    recipe = resolve(state["recipe"], f"state.json of the newest checkpoint in {path}")
    events, _ = parse_lines((path / "events.jsonl").read_text(errors="replace"))
    validations = {line["step"]: line for line in events if line.get("kind") == "validation"}
    if not validations:
        raise UserError(
            f"{path}: expected validations in events.jsonl, found none; train it with validation.every > 0, several "
            "times smaller than train.steps"
        )
    seen = _windows_seen(path / "log.jsonl", max(validations), recipe.train.batch)
    try:
        curves = _curves(validations, seen)
        cosines = [(line["step"], Cosines.from_json(line)) for line in events if line.get("kind") == "cosine"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'events.jsonl'}: a damaged line ({type(error).__name__}: {error}); remove it"
        ) from error
    return TrainedRun(path, recipe, state["shards"], model.num_parameters(), curves, cosines)


def _windows_seen(log: Path, last: int, batch: int) -> dict[str, np.ndarray]:
    """Return, by dataset, the number of windows drawn after 0, 1, ... `last` steps, (last + 1,)."""
    lines, _ = parse_lines(log.read_text(errors="replace"))
    lines = lines[:last]
    if [line["step"] for line in lines] != list(range(1, last + 1)):
        raise UserError(
            f"{log}: expected a line for each of the steps 1 to {last}, the last validation's; lines are missing, so "
            "what the run has seen cannot be counted. Restore the file from a copy"
        )
    drawn: dict[str, np.ndarray] = {}
    for line in lines:
        for name in line["dataset"].split("+"):  # one name per draw
            drawn.setdefault(name, np.zeros(last + 1, np.int64))[line["step"]] += batch
    return {name: np.cumsum(counts) for name, counts in drawn.items()}


def _curves(validations: Mapping[int, Mapping[str, Any]], seen: Mapping[str, np.ndarray]) -> dict[str, LearningCurve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for step, line in sorted(validations.items()):
        for name, cell in line["datasets"].items():
            if name in seen and seen[name][step]:
                vrmse = cell["vrmse"]
                points.setdefault(name, []).append((int(seen[name][step]), math.inf if vrmse is None else float(vrmse)))
    return {name: LearningCurve(*np.array(found, np.float64).T) for name, found in points.items()}


@dataclass(frozen=True, eq=False)
class Comparison:
    """One dataset in the joint run and in a bespoke run, after `windows` of its windows each."""

    dataset: str
    bespoke: TrainedRun
    windows: int | None  # None: the two have no number of windows in common
    joint_vrmse: float  # inf if a prediction was not finite, NaN if there is no common number
    bespoke_vrmse: float

    @property
    def ratio(self) -> float:
        """Joint over bespoke; NaN if neither is finite."""
        return self.joint_vrmse / self.bespoke_vrmse

    @property
    def verdict(self) -> str:
        """The effect of training together, one of VERDICTS."""
        if self.windows is None:
            return "not comparable"
        if math.isnan(self.ratio):
            return "neither finite"
        return "helps" if self.ratio < HELPS else "hurts" if self.ratio > HURTS else "equal"


def compare(joint: TrainedRun, bespoke: TrainedRun) -> Comparison:
    """Compare the dataset of `bespoke` in both runs. Raises UserError if the two runs do not compare."""
    if len(bespoke.shards) != 1:
        raise UserError(
            f"transfer: expected runs of one dataset after the first, got {bespoke.path} of "
            f"{', '.join(sorted(bespoke.shards))}; make them with 'data.datasets=[NAME]' run.name=bespoke_NAME"
        )
    (dataset,) = bespoke.shards
    if dataset not in joint.shards:
        raise UserError(
            f"transfer: expected a run of one of the datasets of {joint.path} ({', '.join(sorted(joint.shards))}), got "
            f"{bespoke.path} of {dataset}; leave it out"
        )
    for key in ("windows", "protocol"):
        ours, theirs = getattr(joint.recipe.validation, key), getattr(bespoke.recipe.validation, key)
        if ours != theirs:
            raise UserError(
                f"transfer: expected the same validations, got validation.{key}={ours} in {joint.path} and {theirs} in "
                f"{bespoke.path}; train one of them again with the other's"
            )
    if joint.shards[dataset] != bespoke.shards[dataset]:
        raise UserError(
            f"transfer: expected the same {dataset} data, got shards with digests {joint.shards[dataset][:12]} in "
            f"{joint.path} and {bespoke.shards[dataset][:12]} in {bespoke.path}; train both on the same data.shards"
        )
    curves = [run.curves[dataset] for run in (joint, bespoke) if dataset in run.curves]
    if len(curves) == 2:
        windows = min(curve.windows[-1] for curve in curves)
        if windows >= max(curve.windows[0] for curve in curves):  # else one ends before the other begins
            return Comparison(dataset, bespoke, int(windows), *(curve.at(windows) for curve in curves))
    return Comparison(dataset, bespoke, None, math.nan, math.nan)


def describe(joint: TrainedRun, comparisons: Sequence[Comparison]) -> Document:
    """Return the comparisons as a table, with notes."""
    validation, measured = joint.recipe.validation, [cosines for _, cosines in joint.cosines]
    last, mean = (measured[-1].with_others(), mean_cosines(measured).with_others()) if measured else ({}, {})
    rows = []
    for one in comparisons:
        columns: dict[str, Cell] = {
            "dataset": one.dataset,
            "bespoke run": str(one.bespoke.path),
            "windows seen": one.windows,
            "joint": _score(one.joint_vrmse),
            "bespoke": _score(one.bespoke_vrmse),
            "joint / bespoke": _finite(one.ratio),
            "verdict": one.verdict,
            "bespoke parameters": one.bespoke.parameters,
        }
        if measured:
            columns |= {"cosine, last": _finite(last[one.dataset]), "cosine, mean": _finite(mean[one.dataset])}
        rows.append(columns)
    about = (
        f"Validation VRMSE, one step, averaged weights, {validation.windows} windows a dataset, protocol "
        f"{validation.protocol}; lower is better. {joint.path}, {joint.parameters} parameters, was trained on "
        f"{len(joint.shards)} datasets together; beside it runs of one dataset, after as many training windows of it."
    )
    table = Table("Training together", list(rows[0]), [list(row.values()) for row in rows])
    return Document(about, [table], _notes(joint, comparisons))


def _score(vrmse: float) -> Cell:
    return Marked(None, "not finite") if math.isinf(vrmse) else _finite(vrmse)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _notes(joint: TrainedRun, comparisons: Sequence[Comparison]) -> list[str]:
    notes = [
        _summary(comparisons),
        f"joint / bespoke below {HELPS}: training together helps; above {HURTS}: it hurts. Between validations VRMSE "
        "is linear in the logarithm of the windows seen; beyond them there is no comparison.",
        f"cosine: of the dataset's gradient with the others', their mean, in the last and over all of "
        f"{len(joint.cosines)} measurements."
        if joint.cosines
        else "No cosines of gradients: the joint run has measured none (tracking.gradient_cosine_every).",
    ]
    notes += [_ranges(joint, one) for one in comparisons if one.windows is None]
    runs: dict[str, list[str]] = {}
    for run in (one.bespoke for one in comparisons):
        lines = changed_settings(recipe_to_dict(run.recipe), recipe_to_dict(joint.recipe))
        if different := "; ".join(line for line in lines if not line.startswith(UNREMARKABLE)):
            runs.setdefault(different, []).append(str(run.path))
    notes += [f"Settings of {', '.join(paths)} -> {joint.path}: {different}." for different, paths in runs.items()]
    missing = sorted(joint.shards.keys() - {one.dataset for one in comparisons})
    if missing:
        command = f"accelerate launch RECIPE 'data.datasets=[{missing[0]}]' run.name=bespoke_{missing[0]}"
        notes.append(f"No run of {', '.join(missing)} alone; `{command}` makes one.")
    return notes


def _summary(comparisons: Sequence[Comparison]) -> str:
    verdicts = [one.verdict for one in comparisons]
    counts = ", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in VERDICTS if verdict in verdicts)
    comparable = [one for one in comparisons if one.windows is not None]
    diverged = [one.dataset for one in comparable if not 0 < one.ratio < math.inf]
    if diverged:
        return f"{counts}. No mean of joint / bespoke, a score is not finite or 0: {', '.join(diverged)}."
    mean = geometric_mean([one.ratio for one in comparable])
    return counts + (f". Geometric mean of joint / bespoke: {mean:.4f}." if mean is not None else ".")


def _ranges(joint: TrainedRun, one: Comparison) -> str:
    """Explain why two curves have no point in common."""

    def reach(run: TrainedRun) -> str:
        curve = run.curves.get(one.dataset)
        return f"after {curve.windows[0]:.0f} to {curve.windows[-1]:.0f} windows" if curve else "before any window"

    return (
        f"{one.dataset}: validated {reach(joint)} of it in {joint.path}, {reach(one.bespoke)} in {one.bespoke.path}. "
        "Train on the run that has seen less, or lower the other's validation.every."
    )


def transfer_figure(joint: TrainedRun, comparisons: Sequence[Comparison]) -> Figure:
    """Draw VRMSE against windows of the dataset seen, a panel a dataset; a line marks where the two were compared."""
    names = sorted({one.dataset for one in comparisons})
    figure, panels = panel_figure(len(names), 1.95, ("windows of it seen", "VRMSE"))
    legend: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(name, fontsize=8)
        if name in joint.curves:
            _draw(axes, joint.curves[name], BLUE, "together")
        for one in (one for one in comparisons if one.dataset == name):
            if one.windows is not None:
                axes.axvline(one.windows, color=GRAY, linewidth=0.8, linestyle=DOTTED, label="compared here")
            if name in one.bespoke.curves:
                _draw(axes, one.bespoke.curves[name], ORANGE, "alone")
        axes.set_xscale("log")
        axes.set_yscale("log")
        log_ticks(axes.xaxis, (1, 2, 3, 5))
        log_ticks(axes.yaxis, (1, 2, 3, 5))
        style_panel(axes)
        handles, labels = axes.get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True)) | legend
    legend_above(figure, list(legend.values()), list(legend))
    return figure


def _draw(axes: Axes, curve: LearningCurve, color: str, label: str) -> None:
    shown = np.where(np.isfinite(curve.vrmse), curve.vrmse, np.nan)
    axes.plot(curve.windows, shown, "o-", color=color, markersize=2.5, linewidth=1.2, label=label)


def _numbers(joint: TrainedRun, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the content of transfer.json."""

    def run(one: TrainedRun) -> dict[str, Any]:
        return {"run": str(one.path), "parameters": one.parameters, "curves": one.curves}

    return {
        "joint": run(joint),
        "comparisons": [
            {**vars(one), "bespoke": run(one.bespoke), "ratio": one.ratio, "verdict": one.verdict}
            for one in comparisons
        ],
        "thresholds": {"helps": HELPS, "hurts": HURTS},
        "cosines": [{"step": step, **cosines.to_json()} for step, cosines in joint.cosines],
    }
