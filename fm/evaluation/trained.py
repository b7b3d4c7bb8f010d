"""A trained model and what was stored with it: the model of a run, of a checkpoint, or an exported one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeAlias

from data_pipeline.errors import UserError
from data_pipeline.registry import Registry, load_folders, packaged_folder, user_folders
from data_pipeline.schema import nearest
from data_pipeline.windows.loader import ShardPlaces, open_readers
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import load_pretrained, use_checkpoint, verify_model
from fm.config import Recipe, load_recipe, resolve
from fm.model.files import CARDS, EXPORT_FILE, RECIPE_FILE, is_exported
from fm.model.surrogate import Surrogate

FitReaders: TypeAlias = Mapping[str, tuple[ShardReader, ShardReader]]  # dataset -> its train and its valid split


@dataclass(frozen=True)
class TrainedModel:
    """A model with averaged weights, on the CPU: that of a run, of a checkpoint, or an exported model."""

    checkpoint: Path  # the folder with the weights
    report: Path  # the default folder of reports
    step: int
    weights: str  # SHA-256 of their file
    recipe: Recipe
    model: Surrogate
    shards: Mapping[str, str]  # dataset -> digest of the shards that the model was trained on
    lineage: Mapping[str, Any]  # the model that it was made from, as in artefact.json; empty if trained from scratch
    license: str | None  # SPDX identifier; a run has none
    trained_cards: Mapping[str, Any] | None  # cards of its training, by dataset; an exported model has them as files

    @classmethod
    def open(cls, source: Path | str) -> "TrainedModel":
        """Open what `find_checkpoint` finds; UserError if there is nothing or it is damaged."""
        return use_checkpoint(source, lambda folder: cls._open(folder, source))

    @classmethod
    def _open(cls, folder: Path, source: Path | str) -> "TrainedModel":
        weights, facts = verify_model(folder)
        if is_exported(folder):  # a report must not change the folder
            recipe, report = load_recipe(folder / RECIPE_FILE), Path(f"{facts['name']}_report")
            shards = {name: dataset["shards"] for name, dataset in facts["datasets"].items()}
            lineage, license, cards = facts["lineage"], facts["licence"], None
        else:
            recipe = resolve(facts["recipe"], str(folder / "state.json"))
            report = (folder.parent.parent if Path(source) == folder else Path(source)) / "report"
            shards, cards = facts["shards"], facts["registry"]["cards"]
            lineage, license = {"pretrained": recipe.finetune.pretrained} if recipe.finetune else {}, None
        model = load_pretrained(folder)
        if is_exported(folder) and shards.keys() != model.specs.keys():
            raise UserError(f"{folder / EXPORT_FILE}: expected the model's datasets, {', '.join(model.specs)}")
        return cls(folder, report, facts["step"], weights, recipe, model, shards, lineage, license, cards)

    def card_folders(self) -> list[Traversable]:
        """Return the folders of the registry's cards; an exported model has its own. UserError if one is missing."""
        if is_exported(self.checkpoint):
            return [self.checkpoint / CARDS]
        return [packaged_folder(), *user_folders(self.recipe.data.registry)]

    def registry(self) -> Registry:
        """Return the cards; UserError if they are missing."""
        return load_folders(self.card_folders())

    def select(self, datasets: Sequence[str] | None) -> list[str]:
        """Return the names of the model's datasets, or these of them, sorted; UserError for one that it lacks."""
        known = sorted(self.model.specs)
        for name in datasets or ():
            if name not in known:
                raise UserError(f"--datasets: expected datasets of the model, got {name!r}. {nearest(name, known)}")
        return sorted({*datasets}) if datasets is not None else known

    def readers(self, datasets: Sequence[str], split: str, shards: ShardPlaces | None = None) -> dict[str, ShardReader]:
        """Return readers of `shards`, the recipe's by default; UserError if there are none."""
        return open_readers(shards or self.recipe.data.shards, datasets, split, stream=self.recipe.stream())

    def fit_readers(
        self, datasets: Sequence[str], shards: ShardPlaces | None, log: Callable[[str], object]
    ) -> FitReaders:
        """Return readers of the train and valid split of `shards`; a dataset that lacks one is left out and noted."""
        found, missing = {}, dict[str, str]()
        for name in datasets:
            try:
                train, valid = (self.readers([name], split, shards)[name] for split in ("train", "valid"))
                found[name] = train, valid
            except UserError as error:
                missing[name] = str(error).partition("\n")[0]
        if missing:
            log(f"no linear stencil for {', '.join(missing)}: {next(iter(missing.values()))}")
        return found
