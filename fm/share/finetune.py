"""Finetune a trained model on new datasets: extend it, train it, and score it before and after.

Extension (fm/share/extend.py), training (fm/training/trainer.py) and evaluation (fm/evaluation/evaluate.py) are those
of the commands `fm extend`, `fm train` and `fm evaluate`. Each of them keeps what is finished, so an interrupted
command continues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import inside, write_whole
from data_pipeline.registry import load_registry
from data_pipeline.remote import is_url
from data_pipeline.schema import nearest
from data_pipeline.tables import Cell, Document, Table, render
from data_pipeline.windows.loader import datasets_with_shards, open_readers
from fm.config import Recipe, apply_override, dump_recipe, recipe_to_dict, resolve
from fm.datasets import imported_sections
from fm.distributed import EXIT_DONE, launch
from fm.evaluation.evaluate import evaluate_run
from fm.evaluation.protocol import load_protocol
from fm.evaluation.scores import SCORES_FILE, Scores
from fm.evaluation.tables import about, vrmse_cell
from fm.evaluation.trained import TrainedModel
from fm.model.files import RECIPE_FILE, is_exported
from fm.model.imports import check_allowed
from fm.share.extend import extend
from fm.training.trainer import train

STEPS = 500  # optimizer steps unless train.steps is given
# While old datasets are replayed, so that the model keeps them: factor on the peak learning rates that the model was
# trained with, and another one on the trunk's. Without old datasets, the rates are the model's own.
RATE, TRUNK_RATE = 0.25, 0.25
SHARE = 0.25  # of the draws goes to the new datasets while old ones are replayed
FREEZABLE = ("embedding", "trunk")  # parts of the model, as in adapt.rates
EXTENDED, BEFORE = "extended", "before"  # folders in the run's: the model that training starts from, and its report
OURS = ("run", "model", "baseline", "data.shards", "data.datasets", "data.registry", "finetune.pretrained")


@dataclass(frozen=True)
class Finetuning:
    """One finetuning run, planned: nothing is written yet."""

    source: str  # the model
    trained: TrainedModel
    recipe: Recipe
    new: tuple[str, ...]  # datasets that the model does not know
    replayed: tuple[str, ...]  # datasets that it knows, and that are trained on too

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.recipe.run.directory


def plan_finetuning(
    source: str,
    data: Sequence[str],
    replay: str | None = None,
    freeze: Sequence[str] = (),
    out: Path | None = None,
    registry: str | None = None,
    overrides: Sequence[str] = (),
) -> Finetuning:
    """Return the run that teaches the model at `source` all datasets in the places `data` that it does not know.

    `replay` is a folder or URL with shards of datasets that the model knows, which are then trained on too. The parts
    `freeze`, of FREEZABLE, keep their weights. Loss, optimizer and protocol are those of the model's recipe;
    `overrides` are "section.key=value". Raises UserError for what does not fit together.
    """
    for part in freeze:
        if part not in FREEZABLE:
            why = "the heads of new datasets begin at zero and must learn. " if part == "head" else ""
            raise UserError(
                f"--freeze: expected some of {', '.join(FREEZABLE)}, got {part!r}: {why}{nearest(part, FREEZABLE)}"
            )
    for place in data:
        if not is_url(place) and not Path(place).is_dir():
            raise UserError(f"--data {place}: expected a folder of shards, or its URL; there is no such folder")
    trained = TrainedModel.open(source)
    registry = registry or (None if is_exported(trained.checkpoint) else trained.recipe.data.registry)
    known = sorted(trained.model.specs)
    found = datasets_with_shards(data, None, ["train"], known=tuple(load_registry(registry).cards))
    new = [name for name in found if name not in known]
    if not new:
        raise UserError(
            f"--data {' '.join(data)}: expected a dataset that {source} does not know, got only datasets that it knows "
            f"({', '.join(found)}). To train on these, run a recipe with finetune.pretrained={source}"
        )
    replayed: list[str] = []
    if replay is not None:
        held = datasets_with_shards(replay, None, ["train"], known=known)
        replayed = [name for name in held if name in known]
        if not replayed:
            raise UserError(
                f"--replay {replay}: expected shards of datasets that {source} knows ({', '.join(known)}), got "
                f"{', '.join(held)}"
            )
    out = out or Path("runs") / f"finetune_{new[0]}{f'_and_{len(new) - 1}' if new[1:] else ''}"
    places = list(dict.fromkeys([*data, *([replay] if replay is not None else [])]))
    document = _document(trained.recipe, out, places, new, replayed, freeze, registry, overrides)
    recipe = resolve(document, f"fm finetune {source}")
    for section in imported_sections(recipe):  # most come from the model's files, which allow nothing
        check_allowed(section, f"the recipe of {source}")
    protocol = load_protocol(recipe.validation.protocol)
    for split in ("train", *(["valid"] if recipe.validation.every else []), protocol.split):
        open_readers(places, [*new, *replayed], split, stream=recipe.stream())  # raises UserError for missing shards
    return Finetuning(source, trained, recipe, tuple(new), tuple(replayed))


def _document(
    recipe: Recipe,
    out: Path,
    places: list[str],
    new: list[str],
    replayed: list[str],
    freeze: Sequence[str],
    registry: str | None,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Return the sections of the run's recipe. What depends on the number of steps follows train.steps."""
    given: dict[str, Any] = {}
    for override in overrides:
        key = override.partition("=")[0]
        if key in OURS or key.partition(".")[0] in OURS:
            raise UserError(f"override {override!r}: fm finetune sets {key} itself; --out names the run's folder")
        apply_override(given, override)
    steps = given.get("train", {}).get("steps", STEPS)
    steps = steps if type(steps) is int and steps > 0 else STEPS  # anything else is refused with the whole recipe
    document, train_settings = recipe_to_dict(recipe), recipe.train
    document["run"] = {"name": out.resolve().name, "dir": str(out), "seed": recipe.run.seed}
    document["data"] |= {"shards": places, "datasets": [*new, *replayed], "registry": registry, "trajectories": {}}
    document |= {"model": None, "baseline": None}
    document["finetune"] = {"pretrained": str(out / EXTENDED), "unroll_steps": 1}
    rate, trunk_rate = (RATE, TRUNK_RATE) if replayed else (1.0, 1.0)
    rates = {"trunk": trunk_rate} | dict.fromkeys(freeze, 0.0)
    document["adapt"] = {
        "datasets": new,
        "alone_steps": steps // 5,
        "share": SHARE if replayed else None,
        "rates": rates,
    }
    document["sampling"] |= {"scheme": "sqrt", "weights": None}
    document["train"] |= {
        "steps": steps,
        "learning_rate": rate * train_settings.learning_rate,
        "muon_learning_rate": rate * train_settings.muon_learning_rate,
        "warmup_steps": steps // 25,
        "schedule": "cosine",
        "ema": min(train_settings.ema, 0.99),
    }
    document["checkpoint"] = {"every": 100, "keep": 2}
    document["validation"] |= {"every": max(1, steps // 2), "windows": 8, "rollouts": 1, "rollout_every": 1}
    document["tracking"] |= {"gradient_cosine_every": 0}
    for override in overrides:
        apply_override(document, override)
    return document


def finetune(plan: Finetuning, windows: int | None = None, processes: int = 1) -> int:
    """Extend, train and score the model; print the table; return the exit code of the training.

    With `windows`, only so many one-step windows of each dataset are scored. `processes` share the training. Raises
    KeyboardInterrupt if the scoring is interrupted, and UserError if the run's folder belongs to another model or
    training cannot begin.
    """
    _extend(plan)
    code = train(plan.recipe) if processes == 1 else _train_in(processes, plan)
    if code != EXIT_DONE:
        return code
    names, data, protocol = [*plan.new, *plan.replayed], plan.recipe.data, plan.recipe.validation.protocol
    scores = []
    for model, report in ((plan.out / EXTENDED, plan.out / BEFORE), (plan.out, plan.out / "report")):
        evaluate_run(model, data.shards, report, protocol, windows=windows, datasets=names, quiet=True)
        scores.append(Scores.load(report / SCORES_FILE))
    print(f"\n{render(_table(plan, *scores), 'md')}\n{plan.out}: the run; its report: {plan.out / 'report'}")
    return EXIT_DONE


def _train_in(processes: int, plan: Finetuning) -> int:
    """Train in new processes of this machine, which read the recipe from the run's folder; return the exit code."""
    recipe = inside(plan.out, RECIPE_FILE)
    write_whole(recipe, dump_recipe(plan.recipe).encode())
    return launch(processes, ["train", str(recipe)])


def _extend(plan: Finetuning) -> None:
    """Write the extended model, unless an earlier call has written it."""
    folder, data = plan.out / EXTENDED, plan.recipe.data
    if not folder.exists():
        if (plan.out / "checkpoints").exists():
            raise UserError(f"--out {plan.out}: expected a new folder, found another run; choose another folder")
        extend(plan.source, plan.new, data.shards, folder, "nearest", plan.recipe.run.seed, data.registry)
        return
    lineage = TrainedModel.open(folder).lineage
    if (lineage.get("weights"), lineage.get("added")) != (plan.trained.weights, list(plan.new)):
        raise UserError(
            f"--out {plan.out}: expected a new folder, or the run of an earlier call on the same model and datasets, "
            f"found one of {lineage.get('model')} and {', '.join(lineage.get('added') or ())}; choose another folder"
        )


def _table(plan: Finetuning, before: Scores, after: Scores) -> Document:
    """Return the scores of the extended and the trained model, a row for each dataset and kind of score."""
    rows: list[list[Cell]] = []
    for name in (*plan.new, *plan.replayed):
        for block, ours in after.datasets[name].blocks().items():
            start = before.block(name, block)
            if ours is None or start is None:
                continue
            old, reached = (one.vrmse(after.statistic) for one in (start, ours))
            cells = [vrmse_cell(one, after.statistic) for one in (start, ours)]
            change = reached / old - 1 if old and reached is not None else None
            role = "new" if name in plan.new else "replayed"
            rows.append([name, role, block, ours.persistence, *cells, change])
    head = ["dataset", "role", "score", "persistence", "before", "finetuned", "change"]
    rest = sorted(plan.trained.model.specs.keys() - set(plan.replayed))
    notes = [f"Before: {plan.source}, extended by {', '.join(plan.new)}."]
    if rest:
        notes.append(f"The finetuned model does not know {', '.join(rest)}: not replayed (--replay).")
    return Document(about(after.protocol), [Table("Finetuning", head, rows, percents=("change",))], notes)
