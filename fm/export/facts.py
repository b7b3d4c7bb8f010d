"""What an exported model is, beside its weights: artefact.json says it, and the model card in words."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import fm
from fm.artefact import FORMAT
from fm.export.cards import Cards
from fm.settings import Recipe
from fm.surrogate import Surrogate


@dataclass(frozen=True)
class Facts:
    """All that is known of a model that is exported."""

    model: Surrogate
    recipe: Recipe  # has its name
    cards: Cards  # of its datasets
    step: int  # of the training
    shards: Mapping[str, str]  # dataset -> digest of the shards that it is known from
    licence: str  # SPDX identifier
    # What it comes from. `pretrained`: what its run was finetuned from. Of an extension, among others: the `model` that
    # was extended, what was `added`, and `earlier`, the lineage of that model, or None (fm/extension/extend.py).
    lineage: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def untrained(self) -> list[str]:
        """The datasets that were added to the model and that it has not been trained on, sorted."""
        names: list[str] = []
        lineage: Mapping[str, Any] | None = self.lineage
        while lineage and "added" in lineage:
            names += lineage["added"]
            lineage = lineage["earlier"]
        return sorted(names)

    def to_json(self) -> dict[str, Any]:
        """artefact.json, but for the list of files."""
        specs = self.model.specs.values()
        used = {name for spec in specs for name in (*spec.state_channels, *spec.constant_channels)}
        return {
            "format": FORMAT,
            "name": self.name,
            "step": self.step,
            "licence": self.licence,
            "datasets": {
                spec.name: {
                    "shards": self.shards.get(spec.name),
                    "grid": spec.grid,
                    "dt": spec.dt,
                    "boundary": spec.boundary,
                    "state_channels": spec.state_channels,
                    "constant_channels": spec.constant_channels,
                }
                for spec in specs
            },
            "channels": {
                name: {"description": channel.description, "unit": channel.unit}
                for name, channel in self.cards.registry.channel_cards.items()
                if name in used
            },
            "versions": {"wavelit-fm": fm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "lineage": dict(self.lineage),
        }
