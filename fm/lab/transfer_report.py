"""`fm transfer`: the comparison of fm/lab/transfer.py as a table, a file for programs and pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import atomic_file
from fm.lab.learning_curves import TrainedRun, read_run
from fm.lab.transfer import HELPS, HURTS, VERDICTS, Comparison, compare
from fm.lab.transfer_figure import transfer_figure
from fm.recipe_file import changed_settings, recipe_to_dict
from fm.report.cosines import cosine_figure, mean_cosines
from fm.scores.formats import Document, Marked, Table, render
from fm.scores.scoring import geometric_mean

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
