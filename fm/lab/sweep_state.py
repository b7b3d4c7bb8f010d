"""What of a sweep is there already: how far a run is trained, whether it is scored, and under which settings.

    DIR/<variant>_seed<k>/      a run directory like any other; train.out and evaluate.out hold what was printed
    DIR/<variant>/              the report of a variant that is only evaluated
    DIR/probes/<variant>.json   the pace that chose train.steps, where the sweep gives seconds
    DIR/table.{md,json}         the table

What is there is read from these files alone, so a sweep may be killed at any time, and its folder moved.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from data_pipeline.remote import is_url
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from fm.checkpoint import find_checkpoint, newest_checkpoint, read_state, weights_digest
from fm.lab.sweep_file import Sweep, Trial
from fm.recipe_file import changed_settings, recipe_to_dict, resolve
from fm.scores.protocol import load_protocol


@dataclass(frozen=True)
class Probe:
    """The pace of a variant on this machine, and what follows from it."""

    seconds: float  # that the sweep gives
    seconds_per_step: float
    steps: int
    settings: dict[str, Any]  # what was timed

    def save(self, file: Path) -> None:
        with atomic_file(file) as stream:
            stream.write((json.dumps(asdict(self), indent=1) + "\n").encode())


def probe_file(out: Path, trial: Trial) -> Path:
    """One for all seeds of a variant."""
    return out / "probes" / f"{trial.variant.slug}.json"


def read_probe(file: Path) -> Probe | None:
    """The stored probe, if any; UserError where the file is damaged."""
    try:
        return Probe(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file}: not the probe of a sweep ({error}); remove it, and the pace is measured anew"
        ) from error


def probed_settings(trial: Trial) -> dict[str, Any]:
    """What the pace of a trial depends on: neither its place and seed, nor its length."""
    settings = recipe_to_dict(trial.recipe)
    del settings["run"], settings["train"]["steps"]
    return settings


def model_of(trial: Trial) -> Path | str:
    """The run or checkpoint that a trial's scores are of."""
    if trial.variant.only_evaluate:
        assert trial.recipe.finetune is not None  # the plan sees to it
        return trial.recipe.finetune.pretrained
    return trial.directory


def is_trained(trial: Trial) -> bool:
    """Whether the run has all its steps."""
    checkpoint = newest_checkpoint(trial.directory / "checkpoints", print)
    return checkpoint is not None and read_state(checkpoint)["step"] >= trial.recipe.train.steps


def read_scores(trial: Trial, sweep: Sweep) -> dict[str, Any] | None:
    """The scores of a trial's present weights and data under the sweep's protocol, or None where there are none.

    Data that are not at hand, or at a URL, are not compared. UserError where the file is damaged.
    """
    file = trial.report / "scores.json"
    if not file.is_file():
        return None
    try:
        scores = json.loads(file.read_text())
        measured, of = scores["protocol"], scores["origin"]["weights"]
        data = {name: part["data_digest"] for name, part in scores["datasets"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a report's scores.json ({error!r}); remove it, and sweep again") from error
    wanted = replace(load_protocol(sweep.protocol), one_step_windows=sweep.windows).to_json()
    weights = weights_digest(find_checkpoint(model_of(trial)))
    current = measured == wanted and of == weights and _is_present(data, trial, wanted["split"])
    return scores if current else None


def _is_present(data: Mapping[str, str], trial: Trial, split: str) -> bool:
    """Whether the shards of a trial have these digests, by dataset, as far as they are at hand."""
    shards = trial.recipe.data.shards
    if is_url(shards):
        return True
    files = {name: Path(shards) / name / split / MANIFEST_NAME for name in data}
    return all(Manifest.load(file).digest == data[name] for name, file in files.items() if file.is_file())


def check_same_data(scores: Mapping[str, Mapping[str, Any]], sweep: Sweep) -> None:
    """UserError where two runs, by name, were scored on different data of one dataset."""
    first: dict[str, tuple[str, str]] = {}
    for run, part in scores.items():
        for name, dataset in part["datasets"].items():
            other, digest = first.setdefault(name, (run, dataset["data_digest"]))
            if dataset["data_digest"] != digest:
                raise UserError(
                    f"{sweep.file}: expected all runs scored on the same {name} data, got shards with digests "
                    f"{digest[:12]} in {other} and {dataset['data_digest'][:12]} in {run}: remove the report folder of "
                    "the one that is out of date, and sweep again"
                )


def check_unchanged(trial: Trial, sweep: Sweep, out: Path) -> None:
    """UserError where a run has begun with other settings than the sweep gives it now."""
    changes = find_changes(trial, sweep, out)
    if changes:
        lines = "\n  ".join(changes)
        raise UserError(
            f"{trial.directory} was trained with other settings than {sweep.file} gives {trial.variant.name!r} now:\n"
            f"  {lines}\nRemove that folder, or sweep into another one (--out)."
        )


def find_changes(trial: Trial, sweep: Sweep, out: Path) -> list[str]:
    """In which settings a run that has begun differs from what the sweep gives it now, a line each."""
    checkpoint = newest_checkpoint(trial.directory / "checkpoints", print)
    if checkpoint is None:
        return []
    before = recipe_to_dict(resolve(read_state(checkpoint)["recipe"], str(checkpoint / "state.json")))
    after = recipe_to_dict(trial.recipe)
    changes = []
    if sweep.seconds is not None:
        del before["train"]["steps"], after["train"]["steps"]
        probe = read_probe(probe_file(out, trial))
        if probe is None or probe.seconds != sweep.seconds:
            changes.append(f"seconds: {probe.seconds if probe else None} -> {sweep.seconds}")
    before["run"]["dir"] = after["run"]["dir"]  # a sweep's folder may be moved
    return changes + changed_settings(before, after)
