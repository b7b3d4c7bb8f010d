"""Add datasets and their channels to a trained model, and prove that it is the same on those it knew.

Everything in a model is keyed by name, so what it knows stays where it is. A dataset that it learns to know gets a task
vector and a head, drawn as a new model's are (heads start at zero: it predicts persistence, or the mean), and its
unseen channels get lifting rows (fm/extension/rows.py); channels that the model knows are shared, rows and all.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.cards.registry import load_folders, packaged_folder, user_folders
from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import load_pretrained
from fm.extension.folder import CARDS, LINEAGE_FILE, check_absent, write_folder
from fm.extension.proof import Proof, compare
from fm.extension.rows import Rows, choose_rows
from fm.model import DatasetSpec, WaveLiTFM
from fm.pretrained import EMA_FILE, WEIGHTS_FILE
from fm.scores.formats import markdown
from fm.specs import check_names, dataset_specs

FORMAT = 1  # of the lineage


def extend(
    source: str, datasets: Sequence[str], shards: str, out: Path, rows: str, seed: int = 0, registry: str | None = None
) -> Proof:
    """Write the model at `source`, with the datasets added, to the folder `out`; prints what was done, and the proof.

    `datasets` are names in the registry or paths of cards, `<folder>/datasets/<name>.yaml`, whose folders then belong
    to it. `shards` hold their train split; where they hold the old datasets too, the proof is of their windows. `rows`
    as in `choose_rows`. UserError, and nothing is written, for what does not fit together or where a bit differs.
    """
    check_absent(out)
    folders, names = _find_cards(datasets, registry)
    described = load_folders(folders)
    check_names(names, described)
    model = _open_extendable(source, names)
    try:
        added = dataset_specs(open_readers(shards, names, "train"), described)
        chosen = choose_rows(rows, unseen_channels(model, added), model.lifting.rows.keys(), described.channel_cards)
        extended = extend_model(model, added, chosen, seed)
    except UserError:
        raise
    except ValueError as error:  # moments that are missing or not finite, a boundary that cannot be
        raise UserError(f"{shards}: {error}. Make the shards again with `data-pipeline shard`.") from error
    proof = compare(model, extended, _old_readers(shards, model))
    print(_summary(source, added, chosen, proof))
    proof.check()
    lineage = _lineage(source, model, names, chosen, seed, proof)
    missing = write_folder(out, extended, [folders, *_own_cards(model)], lineage)
    if missing:
        print(f"{out / CARDS} lacks the cards of {', '.join(missing)}, which no --registry folder has")
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


def _find_cards(datasets: Sequence[str], registry: str | None) -> tuple[list[Traversable], list[str]]:
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


def _open_extendable(source: str, names: Sequence[str]) -> WaveLiTFM:
    """The trained model. UserError if it cannot be opened, is a baseline, or knows one of the datasets already."""
    model = load_pretrained(source)
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


def _own_cards(model: WaveLiTFM) -> list[list[Traversable]]:
    """The cards that came with the model: a registry of one folder, if there are any."""
    folder = model.origin / CARDS if model.origin is not None else None
    return [[folder]] if folder is not None and folder.is_dir() else []


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


def _lineage(
    source: str, model: WaveLiTFM, names: Sequence[str], rows: Mapping[str, Rows], seed: int, proof: Proof
) -> dict[str, Any]:
    """Where the extended model comes from, as JSON types; `earlier` where that was an extension itself."""
    assert model.origin is not None
    weights = next(file for file in (EMA_FILE, WEIGHTS_FILE) if (model.origin / file).is_file())
    earlier = model.origin / LINEAGE_FILE
    return {
        "format": FORMAT,
        "model": source,
        "weights": {"file": weights, "sha256": hashlib.sha256((model.origin / weights).read_bytes()).hexdigest()},
        "added": list(names),
        "rows": {channel: asdict(one) for channel, one in rows.items()},
        "seed": seed,
        "proof": proof.to_json(),
        "earlier": json.loads(earlier.read_text()) if earlier.is_file() else None,
    }
