"""What a run has learnt of each dataset, against how much of it the run has seen: read from its directory.

Does training on datasets together help or hurt, and whom? A joint run beside runs of one dataset each.

They are compared at equal numbers of training windows of that dataset: the largest that both have reached. By then the
joint run has trained on windows of the other datasets as well; whether that helped is the ratio.

Learning curves of a joint run beside those of runs of one dataset, one panel a dataset.

`fm transfer`: the comparison of fm/lab/transfer.py as a table, a file for programs and pictures.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from data_pipeline.files import UserError, atomic_file
from data_pipeline.tables import Document, Marked, Table, render
from fm.checkpoint import find_checkpoint, load_pretrained, read_state
from fm.config import Recipe, changed_settings, recipe_to_dict, resolve
from fm.evaluation.plots import Cosines, cosine_figure, mean_cosines
from fm.evaluation.scores import geometric_mean
from fm.training.runlog import parse_lines


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """One-step VRMSE of a dataset's validations, against the windows of it that the run was trained on by then."""

    windows: np.ndarray  # (n,), ascending, above 0
    vrmse: np.ndarray  # (n,); inf where a prediction was not finite

    def at(self, windows: float) -> float:
        """VRMSE at a number of windows between the first and the last; linear in its logarithm between validations."""
        assert self.windows[0] <= windows <= self.windows[-1]
        before = int(np.searchsorted(self.windows, windows, side="right")) - 1
        if self.windows[before] == windows:
            return float(self.vrmse[before])
        start, stop = self.vrmse[before : before + 2].tolist()
        first, last = np.log(self.windows[before : before + 2]).tolist()
        share = (math.log(windows) - first) / (last - first)
        return start + share * (stop - start) if math.isfinite(start) and math.isfinite(stop) else math.inf


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What a run directory says of its training."""

    path: Path
    recipe: Recipe
    shards: Mapping[str, str]  # dataset -> digest of its training shards
    parameters: int
    curves: Mapping[str, LearningCurve]  # by dataset, of those with a validation after their first windows
    cosines: Sequence[tuple[int, Cosines]]  # step and measurement


def read_run(path: Path) -> TrainedRun:
    """UserError where the directory is no run's, its logs have gaps, or it was never validated."""
    for name in ("log.jsonl", "events.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path}: not a run directory, it has no {name}. Expected one such as runs/quickstart")
    checkpoint = find_checkpoint(path)
    state = read_state(checkpoint)
    recipe = resolve(state["recipe"], str(checkpoint / "state.json"))
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
    return TrainedRun(path, recipe, state["shards"], load_pretrained(checkpoint).num_parameters(), curves, cosines)


def _windows_seen(log: Path, last: int, batch: int) -> dict[str, np.ndarray]:
    """By dataset, the windows drawn after 0, 1, ... `last` steps, (last + 1,)."""
    lines, _ = parse_lines(log.read_text(errors="replace"))
    lines = lines[:last]
    if [line["step"] for line in lines] != list(range(1, last + 1)):
        raise UserError(
            f"{log}: expected a line for each of the steps 1 to {last}, the last validation's; lines are missing, so "
            "what the run has seen cannot be counted. Restore the file from a copy"
        )
    drawn: dict[str, np.ndarray] = {}
    for line in lines:
        for name in line["dataset"].split("+"):  # one per draw
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


HELPS, HURTS = 0.97, 1.03  # joint VRMSE / bespoke VRMSE, below and above which the difference has a name
VERDICTS = ("helps", "equal", "hurts", "neither finite", "not comparable")


@dataclass(frozen=True, eq=False)
class Comparison:
    """One dataset in the joint run and in one of its own, after `windows` of its windows each."""

    dataset: str
    bespoke: TrainedRun
    windows: int | None  # None: the two have no number of windows in common
    joint_vrmse: float  # inf where a prediction was not finite, NaN where there is no common number
    bespoke_vrmse: float

    @property
    def ratio(self) -> float:
        """Joint over bespoke; NaN where neither is finite."""
        return self.joint_vrmse / self.bespoke_vrmse

    @property
    def verdict(self) -> str:
        """What training together does: one of VERDICTS."""
        if self.windows is None:
            return "not comparable"
        if math.isnan(self.ratio):
            return "neither finite"
        return "helps" if self.ratio < HELPS else "hurts" if self.ratio > HURTS else "equal"


def compare(joint: TrainedRun, bespoke: TrainedRun) -> Comparison:
    """The dataset of `bespoke` in both runs. UserError where the two do not compare."""
    dataset = _only_dataset(joint, bespoke)
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
    windows = _common(joint.curves.get(dataset), bespoke.curves.get(dataset))
    if windows is None:
        return Comparison(dataset, bespoke, None, math.nan, math.nan)
    return Comparison(dataset, bespoke, int(windows), *(run.curves[dataset].at(windows) for run in (joint, bespoke)))


def _only_dataset(joint: TrainedRun, bespoke: TrainedRun) -> str:
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
    return dataset


def _common(joint: LearningCurve | None, bespoke: LearningCurve | None) -> float | None:
    """The largest number of windows that both curves reach, None where one ends before the other begins."""
    if joint is None or bespoke is None:
        return None
    reached = min(joint.windows[-1], bespoke.windows[-1])
    return float(reached) if reached >= max(joint.windows[0], bespoke.windows[0]) else None


# Distinct to colour-blind readers (Okabe and Ito 2008).
JOINT, BESPOKE, MARK = "#0072B2", "#D55E00", "#595959"


def transfer_figure(joint: TrainedRun, comparisons: Sequence[Comparison]) -> Figure:
    """VRMSE against windows of the dataset seen, four panels a row; a line marks where the two were compared."""
    names = sorted({one.dataset for one in comparisons})
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(2.45 * columns, 3.4), 1.95 * rows + 0.55), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(grid, names, strict=False):
        _panel(axes, joint.curves.get(name), [one for one in comparisons if one.dataset == name])
        axes.set_title(name, fontsize=8)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("VRMSE", fontsize=8)
    for axes in grid[len(names) - columns : len(names)]:
        axes.set_xlabel("windows of it seen", fontsize=8)
    handles, labels = [], []
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, joint: LearningCurve | None, comparisons: Sequence[Comparison]) -> None:
    dataset = comparisons[0].dataset
    if joint is not None:
        _draw(axes, joint, JOINT, "together")
    for one in comparisons:
        if one.windows is not None:
            axes.axvline(one.windows, color=MARK, linewidth=0.8, linestyle=(0, (1, 1.5)), label="compared here")
        if dataset in one.bespoke.curves:
            _draw(axes, one.bespoke.curves[dataset], BESPOKE, "alone")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", linewidth=0.3, color="#D0D0D0")
    axes.tick_params(labelsize=7, width=0.5, length=2.5)


def _draw(axes: Axes, curve: LearningCurve, colour: str, label: str) -> None:
    shown = np.where(np.isfinite(curve.vrmse), curve.vrmse, np.nan)
    axes.plot(curve.windows, shown, "o-", color=colour, markersize=2.5, linewidth=1.2, label=label)


DPI = 160
HEAD = (
    "dataset",
    "bespoke run",
    "windows seen",
    "joint",
    "bespoke",
    "joint / bespoke",
    "verdict",
    "bespoke parameters",
)
COSINES = ("cosine, last", "cosine, mean")
# Settings in which two runs may differ without a word: they change what is written, not what is learnt.
_UNREMARKABLE = ("run.name", "run.dir", "run.stop_at", "data.", "checkpoint.", "validation.", "tracking.", "guard.")


def transfer(joint: Path, bespoke: Sequence[Path], out: Path | None = None, form: str = "md") -> str:
    """Compare a run of several datasets with runs of one each; returns the table in the format `form`.

    Writes transfer.md, transfer.json, transfer.png and, where there are cosines, cosines.png into `out`, which defaults
    to <joint>/report/transfer. UserError where the runs do not compare.
    """
    together, alone = read_run(joint), [read_run(path) for path in bespoke]
    comparisons = sorted((compare(together, run) for run in alone), key=lambda one: one.dataset)
    document = describe(together, comparisons)
    text = render(document, form)
    _write(out or joint / "report" / "transfer", together, comparisons, document)
    return text


def describe(joint: TrainedRun, comparisons: Sequence[Comparison]) -> Document:
    """The comparisons as a table, with remarks."""
    validation, measured = joint.recipe.validation, [cosines for _, cosines in joint.cosines]
    last, mean = (measured[-1].with_others(), mean_cosines(measured).with_others()) if measured else ({}, {})
    rows = [
        [
            *(one.dataset, str(one.bespoke.path), one.windows),
            *(_shown(value) for value in (one.joint_vrmse, one.bespoke_vrmse)),
            *(_finite(one.ratio), one.verdict, one.bespoke.parameters),
            *([_finite(last[one.dataset]), _finite(mean[one.dataset])] if measured else []),
        ]
        for one in comparisons
    ]
    about = (
        f"Validation VRMSE, one step, averaged weights, {validation.windows} windows a dataset, protocol "
        f"{validation.protocol}; lower is better. {joint.path}, {joint.parameters} parameters, was trained on "
        f"{len(joint.shards)} datasets together; beside it runs of one dataset, after as many training windows of it."
    )
    head = [*HEAD, *(COSINES if measured else ())]
    return Document(about, [Table("Training together", head, rows)], _notes(joint, comparisons))


def _notes(joint: TrainedRun, comparisons: Sequence[Comparison]) -> list[str]:
    notes = [_summary(comparisons)]
    notes.append(
        f"joint / bespoke below {HELPS}: training together helps; above {HURTS}: it hurts. Between validations VRMSE "
        "is linear in the logarithm of the windows seen; beyond them nothing is said."
    )
    notes.append(
        f"cosine: of the dataset's gradient with the others', their mean, in the last and over all of "
        f"{len(joint.cosines)} measurements."
        if joint.cosines
        else "No cosines of gradients: the joint run has measured none (tracking.gradient_cosine_every)."
    )
    notes += [_ranges(joint, one) for one in comparisons if one.windows is None]
    notes += _differences(joint, comparisons)
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
    """Why two curves have no point in common."""

    def reach(run: TrainedRun) -> str:
        curve = run.curves.get(one.dataset)
        return f"after {curve.windows[0]:.0f} to {curve.windows[-1]:.0f} windows" if curve else "before any window"

    return (
        f"{one.dataset}: validated {reach(joint)} of it in {joint.path}, {reach(one.bespoke)} in {one.bespoke.path}. "
        "Train on the run that has seen less, or lower the other's validation.every."
    )


def _differences(joint: TrainedRun, comparisons: Sequence[Comparison]) -> list[str]:
    """What else is not the same in the recipes, for people to judge."""
    runs: dict[str, list[str]] = {}
    for run in (one.bespoke for one in comparisons):
        lines = changed_settings(recipe_to_dict(run.recipe), recipe_to_dict(joint.recipe))
        told = [line for line in lines if not line.startswith(_UNREMARKABLE)]
        if told:
            runs.setdefault("; ".join(told), []).append(str(run.path))
    return [f"Settings of {', '.join(paths)} -> {joint.path}: {told}." for told, paths in runs.items()]


def _write(out: Path, joint: TrainedRun, comparisons: Sequence[Comparison], document: Document) -> None:
    """An older transfer.json goes first, the new one comes last: where it is, all is."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "transfer.json").unlink(missing_ok=True)
    figures = {"transfer": transfer_figure(joint, comparisons)}
    if joint.cosines:
        steps = [step for step, _ in joint.cosines]
        title = f"mean of {len(steps)} measurements, steps {steps[0]} to {steps[-1]}"
        figures["cosines"] = cosine_figure(mean_cosines([cosines for _, cosines in joint.cosines]), title)
    for name, figure in figures.items():
        with atomic_file(out / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=DPI)
    pictures = "\n".join(f"![{name}]({name}.png)\n" for name in figures)
    _write_text(out / "transfer.md", f"# Transfer\n\n{render(document, 'md')}\n{pictures}")
    _write_text(out / "transfer.json", json.dumps(_to_json(joint, comparisons), indent=1, allow_nan=False) + "\n")


def _to_json(joint: TrainedRun, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "joint": _run_to_json(joint),
        "comparisons": [
            {
                "dataset": one.dataset,
                "bespoke": _run_to_json(one.bespoke),
                "windows": one.windows,
                "joint_vrmse": _finite(one.joint_vrmse),
                "bespoke_vrmse": _finite(one.bespoke_vrmse),
                "ratio": _finite(one.ratio),
                "verdict": one.verdict,
            }
            for one in comparisons
        ],
        "thresholds": {"helps": HELPS, "hurts": HURTS},
        "cosines": [{"step": step, **cosines.to_json()} for step, cosines in joint.cosines],
    }


def _run_to_json(run: TrainedRun) -> Mapping[str, Any]:
    curves = {
        name: {"windows": curve.windows.tolist(), "vrmse": [_finite(value) for value in curve.vrmse.tolist()]}
        for name, curve in run.curves.items()
    }
    return {"run": str(run.path), "parameters": run.parameters, "curves": curves}


def _shown(vrmse: float) -> float | Marked | None:
    return Marked(None, "not finite") if math.isinf(vrmse) else _finite(vrmse)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
