"""What is done with a run once it is trained: open it, and score it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.cards.registry import Registry, load_folders, packaged_folder, user_folders
from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.artefact import CARDS, RECIPE_FILE, is_artefact
from fm.checkpoint import find_checkpoint, load_pretrained, verify_model
from fm.evaluation.evaluate import evaluate_model
from fm.evaluation.parts import remove_parts
from fm.recipe_file import load_recipe, resolve
from fm.report.sample import Domain
from fm.runtime import as_main_process_finds, make_accelerator, naming_lost_processes
from fm.scores.errors import FILE_NAME, FORMAT, ErrorFile
from fm.scores.protocol import load_protocol
from fm.scores.tables import score_table
from fm.settings import Recipe
from fm.surrogate import Surrogate


@dataclass(frozen=True)
class Trained:
    """Averaged weights, on the CPU, and what is known of them: of a run, of a checkpoint, or of an exported model."""

    checkpoint: Path  # the folder with the weights
    report: Path  # where reports go by default
    step: int
    weights: str  # SHA-256 of their file
    recipe: Recipe
    model: Surrogate
    shards: Mapping[str, str]  # dataset -> digest of the shards that it is known from
    lineage: Mapping[str, Any]  # what it comes from, as artefact.json has it; empty where training began with nothing
    licence: str | None  # SPDX identifier; a run has none

    @classmethod
    def open(cls, source: Path | str) -> "Trained":
        """What `find_checkpoint` finds. UserError if there is nothing, or it is damaged."""
        folder = find_checkpoint(source)
        weights, facts = verify_model(folder)
        if is_artefact(folder):  # is left as it is
            recipe, report = load_recipe(folder / RECIPE_FILE), Path(f"{facts['name']}_report")
            shards = {name: one["shards"] for name, one in facts["datasets"].items()}
            lineage, licence = facts["lineage"], facts["licence"]
        else:
            recipe = resolve(facts["recipe"], str(folder / "state.json"))
            report = (folder.parent.parent if Path(source) == folder else Path(source)) / "report"
            shards = facts["shards"]
            lineage, licence = {"pretrained": recipe.finetune.pretrained} if recipe.finetune else {}, None
        model = load_pretrained(folder)
        return cls(folder, report, facts["step"], weights, recipe, model, shards, lineage, licence)

    def card_folders(self) -> list[Traversable]:
        """The folders that make the registry: an exported model has its own. UserError where one is not there."""
        if is_artefact(self.checkpoint):
            return [self.checkpoint / CARDS]
        return [packaged_folder(), *user_folders(self.recipe.data.registry)]

    def registry(self) -> Registry:
        """The cards. UserError where they are not at hand."""
        return load_folders(self.card_folders())

    def readers(self, datasets: Sequence[str], split: str, shards: str | Path | None = None) -> dict[str, ShardReader]:
        """Readers of `shards`, the recipe's by default. UserError where there are none."""
        stream = self.recipe.data.stream(self.recipe.sampling.shuffle, self.recipe.sampling.shards_per_block)
        return open_readers(shards or self.recipe.data.shards, datasets, split, stream=stream)


def evaluate_run(
    run: Path | str,
    shards: str | Path | None = None,
    out: Path | None = None,
    protocol: str | None = None,
    split: str | None = None,
    windows: int | None = None,
) -> Path:
    """Score the averaged weights of a run, or of an exported model, and print the table. Returns the report's folder.

    Under a launcher all processes share the work. `shards`, `protocol` (a name or a file) default to the recipe's,
    `split` to the protocol's, `out` to <run>/report, for an exported model to <name>_report where you are. With
    `windows`, so many one-step windows of each dataset are scored, not all. A report of the same weights, data and
    protocol is not made again; one that was interrupted goes on. UserError if there is no checkpoint or there are no
    shards.
    """
    if windows is not None and windows < 1:
        raise UserError(f"--windows: expected at least 1 one-step window per dataset, got {windows}")
    trained = Trained.open(run)
    checkpoint, recipe = trained.checkpoint, trained.recipe
    chosen = load_protocol(protocol or recipe.validation.protocol)
    chosen = replace(chosen, split=split or chosen.split, one_step_windows=windows or chosen.one_step_windows)
    readers = trained.readers(sorted(trained.model.specs), chosen.split, shards)
    out = out or trained.report
    origin = {"checkpoint": str(checkpoint), "step": trained.step, "weights": trained.weights}
    identity = {
        "weights": _weights(origin),
        "protocol": chosen.to_json(),
        "data": {name: reader.manifest.digest for name, reader in readers.items()},
    }
    with naming_lost_processes():
        accelerator = make_accelerator(recipe.train.clip)  # nothing is clipped; DeepSpeed wants to be told
        say = print if accelerator.is_main_process else lambda text: None
        if as_main_process_finds(accelerator, lambda: _holds(out, identity)):
            if accelerator.is_main_process:
                remove_parts(out)  # of an evaluation that was killed when all but this was done
            say(f"{out} already holds the scores of {checkpoint.name}:\n\n{score_table(_read_scores(out))}")
        else:
            # float64 sums, which Apple's GPUs do not have
            device = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
            domains = _domains(trained, sorted(readers), say)
            scores = evaluate_model(
                trained.model, readers, out, chosen, device, origin=origin, domains=domains, accelerator=accelerator
            )
            say(f"{checkpoint}, averaged weights:\n\n{score_table(scores)}\nreport: {out}")
        accelerator.end_training()
    return out


def _domains(trained: Trained, datasets: Sequence[str], say: Callable[[str], object]) -> dict[str, Domain]:
    """The physical extent of each dataset whose card tells. A model can be scored where its cards are not at hand."""
    try:
        cards = trained.registry().cards
    except UserError as error:
        say(f"pictures will have no physical axes: {error}")
        return {}
    return {name: domain for name in datasets if name in cards and (domain := cards[name].domain) is not None}


def _holds(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the report is there already, whole: of this format, with its page and with errors that can be read."""
    if not (out / "scores.json").is_file():
        return False
    scores = _read_scores(out)
    try:
        ErrorFile.load(out / FILE_NAME)
    except UserError:
        return False
    whole = scores.get("format") == FORMAT and (out / "index.html").is_file()
    return whole and _identity(scores) == json.loads(json.dumps(identity))


def _identity(scores: Mapping[str, Any]) -> dict[str, Any]:
    data = {name: part["data_digest"] for name, part in scores["datasets"].items()}
    return {"weights": _weights(scores["origin"]), "protocol": scores["protocol"], "data": data}


def _weights(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Which weights they are, wherever the checkpoint lies."""
    return {key: origin.get(key) for key in ("step", "weights")}


def _read_scores(out: Path) -> dict[str, Any]:
    file = out / "scores.json"
    try:
        scores = json.loads(file.read_text())
        _identity(scores)
    except OSError as error:
        raise UserError(f"no scores at {file} ({error.strerror}); make them with `fm evaluate RUN`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a report's scores.json ({error}); remove it and evaluate again") from error
    return scores
