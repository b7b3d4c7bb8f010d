"""Exported models that no run has trained."""

from pathlib import Path

from safetensors.torch import save
from whole_runs import small

from data_pipeline.registry import packaged_folder
from fm.model.surrogate import Surrogate
from fm.share.export import find_cards, write_export
from fm.share.model_card import ExportedModel


def exported(model: Surrogate, folder: Path, shards: Path) -> Path:
    """Write the model, of some of the eight datasets, as `fm export` would; its recipe reads `shards`."""
    recipe = small(shards, folder, run={"name": folder.name}, data={"datasets": list(model.specs)})
    cards = find_cards([(model.specs, [packaged_folder()])])
    exported_model = ExportedModel(model, recipe, cards.registry, 0, {}, "MIT", {})
    write_export(folder, exported_model, save(model.state_dict()), cards.files())
    return folder
