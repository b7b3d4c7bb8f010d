"""The few-shot curve: how well a model learns a dataset from few trajectories, pretrained or from scratch.

For each number of trajectories there are two runs of one architecture. They draw only this dataset, the same windows in
the same order for the same number of steps, one step at a time, and all parts of the model move (the recipe's section
`adapt` protects other datasets, of which there are none here); they differ in the weights that they begin with, and in
the learning rate if so asked. A sweep runs them (fm/lab/sweep.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import load_pretrained
from fm.evaluation.runs import Trained
from fm.lab.few_shot_report import ARMS, PRETRAINED, SCRATCH, Curve, write_report
from fm.lab.sweep import EXIT_FAILED, finish_trials
from fm.lab.sweep_file import Sweep, Variant, plan
from fm.lab.sweep_table import sweep_results
from fm.recipe_file import load_recipe
from fm.runtime import EXIT_DONE, EXIT_INTERRUPTED
from fm.settings import Recipe

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
    model = json.loads(json.dumps(pretrained.config.to_json()))
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
        return Trained.open(pretrained).recipe.train.learning_rate
    except UserError:  # weights alone
        return None
