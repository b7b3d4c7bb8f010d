"""The model card: README.md of an exported model, with the front matter that the Hugging Face Hub reads.

The text is in the template model_card.md.j2: how to use the model, its scores beside persistence's, its datasets and
channels, its limits, its training, its files. This file computes what the template prints.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as resources
from typing import Any

import torch
import yaml
from jinja2 import Environment, StrictUndefined

import fm
from data_pipeline.registry import Registry
from data_pipeline.tables import Cell, Table, escape_markdown, format_number, listed, markdown
from fm.config import Recipe
from fm.evaluation.scores import ONE_STEP, Scores
from fm.evaluation.tables import vrmse_cell
from fm.model.files import EXPORT_FORMAT, SCORES_FILE
from fm.model.imports import ImportedOptimizer
from fm.model.network import ImportedConfig
from fm.model.surrogate import Surrogate

WELL = "https://polymathic-ai.org/the_well/"
FILES = {  # the first part of a path, and what is there
    "model.safetensors": "the averaged weights",
    "model.json": "sizes, channels and statistics of the datasets",
    "artefact.json": "what this is, and the SHA-256 of every file",
    "recipe.yaml": "the recipe, resolved and runnable",
    "cards/": "the datasets' cards and canonical channels",  # a registry folder of their own
    "programs/": "single steps for torch alone",
    "scores.json": "every score, by dataset, window and channel",
    "pictures/": "rollouts, error growth and spectra",
}
DATASET_FACTS = ("grid", "dt", "boundary", "state_channels", "constant_channels")  # of a specification, exported


@dataclass(frozen=True)
class ExportedModel:
    """A model and the facts that are exported with it."""

    model: Surrogate
    recipe: Recipe  # its run's name is the model's
    registry: Registry  # of the model's datasets and their channels
    step: int  # of the training
    shards: Mapping[str, str]  # dataset -> digest of the training shards
    license: str  # SPDX identifier
    # What the model was made from. `pretrained`: the model that its run finetuned. Of an extended model, among others:
    # `model`, the one that was extended, `added`, its new datasets, and `earlier`, the lineage of `model`, or None.
    lineage: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.recipe.run.name

    @property
    def untrained(self) -> list[str]:
        """The datasets that were added to the model since its last training, sorted."""
        names: list[str] = []
        lineage: Mapping[str, Any] | None = self.lineage
        while lineage and "added" in lineage:
            names += lineage["added"]
            lineage = lineage["earlier"]
        return sorted(names)

    def to_json(self) -> dict[str, Any]:
        """Return the content of artefact.json without the list of files."""
        specs = self.model.specs.values()
        used = {name for spec in specs for name in (*spec.state_channels, *spec.constant_channels)}
        return {
            "format": EXPORT_FORMAT,
            "name": self.name,
            "step": self.step,
            "licence": self.license,
            "datasets": {
                spec.name: {"shards": self.shards.get(spec.name), **{key: getattr(spec, key) for key in DATASET_FACTS}}
                for spec in specs
            },
            "channels": {
                name: {"description": channel.description, "unit": channel.unit}
                for name, channel in self.registry.channel_cards.items()
                if name in used
            },
            "versions": {"wavelit-fm": fm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "lineage": dict(self.lineage),
        }


def model_card(exported: ExportedModel, files: Mapping[str, bytes], address: str) -> str:
    """Return the text of README.md.

    `files` are the other files of the folder by path, without artefact.json. `address` is where `fm.load` finds the
    model.
    """
    # StrictUndefined: a name that the template misspells is an error, not an empty text.
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": escape_markdown, "listed": listed, "code": lambda name: f"`{name}`"}
    template = environment.from_string(resources("fm.share").joinpath("model_card.md.j2").read_text("utf-8"))
    scores = Scores.from_json(files[SCORES_FILE], SCORES_FILE) if SCORES_FILE in files else None
    programs = [name for name in files if name.startswith("programs/")]
    facts = exported.to_json()
    return template.render(
        exported=exported,
        context=exported.model.context,
        recipe=exported.recipe,
        optimizer=_optimizer(exported.recipe),
        files=files,
        address=address,
        scores=scores,
        programs=programs,
        program=exported.model.specs[programs[0].removeprefix("programs/").removesuffix(".pt2")] if programs else None,
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        **_model_context(exported),
        **_dataset_context(exported, facts["channels"]),
        **_score_context(scores),
        file_table=_file_table(files),
    )


def _optimizer(recipe: Recipe) -> str:
    """Return the name of the optimizer for the text."""
    optimizer = recipe.train.optimizer
    if isinstance(optimizer, ImportedOptimizer):
        return f"`{optimizer.import_}`"
    return {"adamw": "AdamW", "muon": "Muon and AdamW"}[optimizer]


def _model_context(exported: ExportedModel) -> dict[str, Any]:
    """Return the model's size, an example of its use, and what it predicts for untrained datasets."""
    model, names, untrained = exported.model, list(exported.model.specs), exported.untrained
    config, count = model.config, model.num_parameters()
    imported = config.import_ if isinstance(config, ImportedConfig) else None
    other = None if model.kind is None else imported or config.name  # than WaveLiT
    trained = [spec for name, spec in model.specs.items() if name not in untrained]
    example = min(trained, key=lambda spec: (len(spec.state_channels) + len(spec.constant_channels), spec.name))
    starts = []
    for delta, start in ((True, "the given state moved by the data's mean change"), (False, "the data's mean")):
        if of_this_kind := [name for name in untrained if model.delta[name] == delta]:
            starts.append(f"for {listed(of_this_kind)} {start}")
    return {
        "network": other or "WaveLiT-FM",
        "sizes": other or f"width {config.width}, depth {config.depth}",
        "imported": imported,
        "parameters": f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}",
        "systems": f"{len(names)} systems" if len(names) > 1 else names[0],
        "example": example,
        "fields": (*example.state_channels, *example.constant_channels),
        "points": "" if example.grid is None else f" of {example.grid[0]} x {example.grid[1]} points",
        "starts": starts,
    }


def _dataset_context(exported: ExportedModel, channels: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return the front matter, the tables of datasets and channels, and the licenses and citations of the data."""
    specs, cards = exported.model.specs, exported.registry.cards
    other_grids = [name for name, spec in specs.items() if spec.grid != cards[name].grid]  # the published one
    published = [
        f"polymathic-ai/{name}"
        for name, card in cards.items()
        if card.source.startswith(WELL) and name not in other_grids and name not in exported.untrained
    ]
    front_matter = {
        "license": exported.license.lower(),
        "library_name": "wavelit-fm",
        "tags": ["physics", "pde", "surrogate-model", "neural-operator", "the-well"],
        **({"datasets": published} if published else {}),
    }
    rows = [
        [
            f"`{name}`",
            card.description,
            ", ".join(spec.state_channels),
            ", ".join(spec.constant_channels) or "none",
            "not known" if spec.grid is None else f"{spec.grid[0]} x {spec.grid[1]}",
            "differs by trajectory" if spec.dt is None else f"{spec.dt:g}",
            " / ".join("-".join(dict.fromkeys(kind.lower() for kind in pair)) for pair in spec.boundary),
        ]
        for name, card in cards.items()
        for spec in (specs[name],)
    ]
    scalars = [
        [f"`{spec.name}`", f"`{name}`", f"{one.lowest:g}" if one.std == 0 else f"{one.lowest:g} to {one.highest:g}"]
        for spec in specs.values()
        for name, one in spec.scalars.items()
    ]
    meanings = [[f"`{name}`", one["description"], one["unit"]] for name, one in channels.items()]
    licenses: dict[str, list[str]] = {}
    for name, card in cards.items():
        licenses.setdefault(card.license or "a license that its card does not name", []).append(name)
    return {
        "front_matter": yaml.safe_dump(front_matter, sort_keys=False).strip(),
        "num_datasets": len(specs),
        "other_grids": other_grids,
        "dataset_table": _text_table(["dataset", "system", "state", "constants", "grid", "dt", "ends of x / y"], rows),
        "scalar_table": _text_table(["dataset", "scalar", "in the training data"], scalars) if scalars else "",
        "scalar_example": next((name for spec in specs.values() for name in spec.scalars), ""),
        "channel_table": _text_table(["channel", "what", "unit"], meanings),
        "data_licenses": "; ".join(
            f"all under {license}" if len(licenses) == 1 else f"{listed(names)} under {license}"
            for license, names in licenses.items()
        ),
        "citations": list(dict.fromkeys(one for card in cards.values() for one in card.citation.split("; ") if one)),
    }


def _score_context(scores: Scores | None) -> dict[str, Any]:
    """Return the table of scores, the mean ratios, and where the model does not beat repeating the first frame."""
    if scores is None:
        return {"score_table": "", "ratios": "", "no_better": ""}
    rows: list[list[Cell]] = []
    no_better: dict[str, list[str]] = {}
    shown = ["persistence"]
    if any(part.stencil is not None for part in scores.datasets.values()):
        shown.append("linear_stencil")
    heads = [name.replace("_", " ") for name in shown]
    for name, part in scores.datasets.items():
        row: list[Cell] = [name]
        for window, block in part.blocks().items():
            row += [vrmse_cell(block, scores.statistic), *(getattr(block, name, None) for name in shown)]
            if block is not None and (block.ratio_to_persistence is None or block.ratio_to_persistence >= 1):
                no_better.setdefault(window, []).append(name)
        rows.append(row)
    head = ["dataset", *(name for block in (ONE_STEP, *scores.protocol.windows) for name in (block, *heads))]
    return {
        "score_table": markdown(head, Table("", head, rows).text_rows()),
        "ratios": ", ".join(f"{name} {format_number(value)}" for name, value in scores.mean_ratios().items()),
        "no_better": "; ".join(f"{window}: {listed(names)}" for window, names in no_better.items()),
    }


def _file_table(files: Mapping[str, bytes]) -> str:
    there = {name if "/" not in name else f"{name.partition('/')[0]}/" for name in (*files, "artefact.json")}
    return _text_table(["file", "what"], [[f"`{name}`", text] for name, text in FILES.items() if name in there])


def _text_table(head: list[str], rows: list[list[str]]) -> str:
    return markdown(head, rows, num_text_columns=len(head))
