"""Add datasets and their channels to a trained model, and prove that it is the same on those it knew.

Everything in a model is keyed by name, so what it knows stays where it is. A dataset that it learns to know gets a task
vector and a head, drawn as a new model's are (heads start at zero: it predicts persistence, or the mean), and its
unseen channels get lifting rows (fm/extension/rows.py); channels that the model knows are shared, rows and all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from data_pipeline.cards.registry import load_folders, packaged_folder, user_folders
from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.runs import Trained
from fm.export.cards import find_cards
from fm.export.facts import Facts
from fm.export.folder import LICENCE, write_export
from fm.extension.proof import Proof, compare
from fm.extension.rows import Rows, choose_rows
from fm.model import DatasetSpec, WaveLiTFM
from fm.scores.formats import markdown
from fm.settings import Recipe
from fm.specs import check_names, dataset_specs
from fm.surrogate import Surrogate


def extend(
    source: str, datasets: Sequence[str], shards: str, out: Path, rows: str, seed: int = 0, registry: str | None = None
) -> Proof:
    """Write the model at `source`, with the datasets added, as an exported model; prints what was done, and the proof.

    `source` is a run, a checkpoint or an exported model. `datasets` are names in the registry or paths of cards,
    `<folder>/datasets/<name>.yaml`, whose folders then belong to it. `shards` hold their train split; where they hold
    the old datasets too, the proof is of their windows. `rows` as in `choose_rows`. UserError, and nothing is written,
    for what does not fit together or where a bit differs.
    """
    _check_absent(out)
    folders, names = _find_folders(datasets, registry)
    described = load_folders(folders)
    check_names(names, described)
    trained = Trained.open(source)
    model = _check_extendable(source, trained.model, names)
    cards = find_cards([(model.specs, trained.card_folders()), ([*model.specs, *names], folders)])
    cards.check_unchanged(model.specs, trained.checkpoint)
    try:
        readers = open_readers(shards, names, "train")
        added = dataset_specs(readers, described)
        chosen = choose_rows(rows, unseen_channels(model, added), model.lifting.rows.keys(), described.channel_cards)
        extended = extend_model(model, added, chosen, seed)
    except UserError:
        raise
    except ValueError as error:  # moments that are missing or not finite, a boundary that cannot be
        raise UserError(f"{shards}: {error}. Make the shards again with `data-pipeline shard`.") from error
    proof = compare(model, extended, _old_readers(shards, model))
    print(_summary(source, added, chosen, proof))
    proof.check()
    facts = Facts(
        extended,
        _extended_recipe(trained.recipe, extended, shards, out),
        cards,
        trained.step,
        {**trained.shards, **{name: reader.manifest.digest for name, reader in readers.items()}},
        trained.licence or LICENCE,
        _lineage(source, trained, names, chosen, seed, proof),
    )
    write_export(out, facts, save(extended.state_dict()))
    print(f"{out}: written; finetune.pretrained={out} trains it")
    return proof


def unseen_channels(model: WaveLiTFM, added: Sequence[DatasetSpec]) -> list[str]:
    """The channels of the added datasets for which the model has no lifting rows, sorted."""
    named = {name for spec in added for name in (*spec.state_channels, *spec.constant_channels)}
    return sorted(named - set(model.lifting.rows))


def extend_model(model: WaveLiTFM, added: Sequence[DatasetSpec], rows: Mapping[str, Rows], seed: int = 0) -> WaveLiTFM:
    """A model of the old datasets and the added ones; what `model` has is copied, the rest drawn by `seed`.

    `rows` says what each unseen channel's lifting rows begin with. ValueError for statistics that are missing.
    """
    extended = WaveLiTFM(model.config, [*model.specs.values(), *added], seed).eval()
    old = model.state_dict()
    weights = {**extended.state_dict(), **old}
    for channel, start in rows.items():
        name = f"lifting.rows.{channel}"
        if start.origin == "copy":
            weights[name] = old[f"lifting.rows.{start.copied}"]
        elif start.origin == "zero":
            weights[name] = torch.zeros_like(weights[name])
    extended.load_state_dict(weights)
    return extended


def _find_folders(datasets: Sequence[str], registry: str | None) -> tuple[list[Traversable], list[str]]:
    """The folders of the registry, and the names of the datasets, each once, sorted."""
    own = user_folders(registry)
    names = set()
    for given in datasets:
        card = Path(given)
        if card.suffix != ".yaml":
            names.add(given)
            continue
        if not card.is_file() or card.resolve().parent.name != "datasets":
            raise UserError(
                f"--dataset {given}: expected the name of a dataset, or its card <folder>/datasets/<name>.yaml, got "
                f"{'a card that is not in a folder datasets' if card.is_file() else 'no such file'}"
            )
        folder = card.resolve().parents[1]
        if folder not in [one.resolve() for one in own]:
            own.append(folder)
        names.add(card.stem)
    return [packaged_folder(), *own], sorted(names)


def _check_absent(out: Path) -> None:
    """UserError where something is already in the way."""
    if out.exists():
        raise UserError(f"--out {out}: expected a folder that is not there yet; remove it, or choose another")


def _check_extendable(source: str, model: Surrogate, names: Sequence[str]) -> WaveLiTFM:
    """The model. UserError if it is a baseline, or knows one of the datasets already."""
    if not isinstance(model, WaveLiTFM):
        raise UserError(
            f"{source}: expected a WaveLiT, got a baseline, which has input and output slots for the datasets that it "
            f"was made for ({', '.join(model.specs)}), and none for others: train one on all of them"
        )
    known = [name for name in names if name in model.specs]
    if known:
        raise UserError(
            f"--dataset {known[0]}: expected a dataset that {source} does not know, got one of its own "
            f"({', '.join(model.specs)}); leave it out, or give other data a name of its own in its card"
        )
    return model


def _old_readers(shards: str, model: WaveLiTFM) -> dict[str, ShardReader]:
    """Readers of what the shards hold of the model's datasets."""
    readers = open_readers(shards, None, "train", known=list(model.specs))
    return {name: reader for name, reader in readers.items() if name in model.specs}


def _summary(source: str, added: Sequence[DatasetSpec], rows: Mapping[str, Rows], proof: Proof) -> str:
    """What was added, and the proof, for people."""
    told = []
    for spec in added:
        channels = (*spec.state_channels, *spec.constant_channels)
        shared = ", ".join(name for name in channels if name not in rows) or "none"
        told.append(f"{spec.name}: a head of zeros and a drawn task vector; of its channels the model knows {shared}")
    if rows:
        told.append(
            "\n" + markdown(["unseen channel", "lifting rows"], [[name, str(one)] for name, one in rows.items()])
        )
    return "\n".join([f"{source}, extended by {', '.join(spec.name for spec in added)}:", *told, "", proof.table()])


def _extended_recipe(recipe: Recipe, model: Surrogate, shards: str, out: Path) -> Recipe:
    """The recipe of the model that was extended, on the shards of all, under the name of the folder."""
    run = replace(recipe.run, name=out.name, dir=None)
    return replace(recipe, run=run, data=replace(recipe.data, shards=shards, datasets=list(model.specs)))


def _lineage(
    source: str, trained: Trained, names: Sequence[str], rows: Mapping[str, Rows], seed: int, proof: Proof
) -> dict[str, Any]:
    """Where the extended model comes from, as JSON types; `earlier` where that comes from another itself."""
    return {
        "model": source,
        "weights": trained.weights,
        "added": list(names),
        "rows": {channel: asdict(one) for channel, one in rows.items()},
        "seed": seed,
        "proof": proof.to_json(),
        "earlier": dict(trained.lineage) or None,
    }
