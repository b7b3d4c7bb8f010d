"""What the lifting rows of a channel begin with that a trained model has not seen: zeros, a copy, or a fresh draw.

`nearest` copies the rows of the model's channel that has the same unit and the name most like its own, by difflib's
ratio (twice the letters in common over all letters), if that is at least SIMILAR; other rows are drawn as a new
model's are. Zeros learn late: while a channel's rows and the head are both zero, neither has a gradient from the other.
The model's channels are all that it has, those of earlier extensions too.

Whether an extended model is the old one on the old datasets: the same tensors, the same predictions, bit for bit.

Add datasets and their channels to a trained model, and prove that it is the same on those it knew.

Everything in a model is keyed by name, so what it knows stays where it is. A dataset that it learns to know gets a task
vector and a head, drawn as a new model's are (heads start at zero: it predicts persistence, or the mean), and its
unseen channels get lifting rows (fm/share/extend.py); channels that the model knows are shared, rows and all.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from data_pipeline.files import UserError, sha256
from data_pipeline.registry import Channel, load_folders, packaged_folder, user_folders
from data_pipeline.schema import nearest
from data_pipeline.tables import markdown
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.config import Recipe
from fm.datasets import check_names, dataset_specs
from fm.evaluation.evaluate import TrainedModel
from fm.model.spec import DatasetSpec
from fm.model.surrogate import MIN_GRID, Surrogate
from fm.model.wavelit import WaveLiTFM
from fm.share.export import LICENCE, write_export
from fm.share.model_card import Facts, find_cards

WAYS = ("zero", "nearest", "drawn")
SIMILAR = 0.6
UNKNOWN = "unknown"  # the unit in a draft of `data-pipeline register`


@dataclass(frozen=True)
class Rows:
    """Where the rows of one channel come from, and why."""

    origin: str  # zero, drawn, or copy
    copied: str | None = None  # the model's channel whose rows they are; only of a copy
    reason: str = ""

    def __str__(self) -> str:
        text = self.origin if self.copied is None else f"copy of {self.copied}"
        return f"{text} ({self.reason})" if self.reason else text


def choose_rows(
    given: str, channels: Sequence[str], known: Collection[str], described: Mapping[str, Channel]
) -> dict[str, Rows]:
    """The rows of each of the unseen `channels`, by name, sorted.

    `given` is one of WAYS, or `NEW=OLD,...`, and channels that it does not name are drawn; `known` are the model's
    channels, `described` those of the registry. UserError for anything else, naming the nearest valid name.
    """
    if given in ("zero", "drawn"):
        return {name: Rows(given) for name in sorted(channels)}
    if given == "nearest":
        return {name: _nearest_rows(name, known, described) for name in sorted(channels)}
    pairs = _read_pairs(given)
    for new, old in pairs.items():
        if new not in channels:
            raise UserError(
                f"--rows {new}={old}: expected a channel that the model has not seen, got {new!r}. "
                f"{nearest(new, channels)}"
            )
        if old not in known:
            raise UserError(f"--rows {new}={old}: expected a channel of the model, got {old!r}. {nearest(old, known)}")
    return {name: Rows("copy", pairs[name]) if name in pairs else Rows("drawn") for name in sorted(channels)}


def _read_pairs(given: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in given.split(","):
        new, equals, old = pair.strip().partition("=")
        if not (new and equals and old) or new in pairs:
            raise UserError(
                f"--rows: expected {', '.join(WAYS)}, or NEW=OLD,... with each unseen channel once, got {given!r}"
            )
        pairs[new] = old
    return pairs


def _nearest_rows(name: str, known: Collection[str], described: Mapping[str, Channel]) -> Rows:
    """A copy of the nearest channel's rows, if there is one; `described` need not have all that is known."""
    unit = described[name].unit
    if unit == UNKNOWN:
        return Rows("drawn", reason=f"its unit is {UNKNOWN}")
    same = [old for old in sorted(known) if old in described and described[old].unit == unit]
    if not same:
        return Rows("drawn", reason=f"no channel in the unit {unit!r}")
    best = max(same, key=lambda old: _similarity(old, name))  # the first by name where several are as near
    similarity = f"{_similarity(best, name):.2f}"
    if _similarity(best, name) < SIMILAR:
        return Rows("drawn", reason=f"in its unit, {best} has the most similar name, {similarity} < {SIMILAR}")
    return Rows("copy", best, f"same unit, similarity of names {similarity}")


def _similarity(old: str, new: str) -> float:
    return SequenceMatcher(None, old, new, autojunk=False).ratio()


FIELDS = 4  # initial states of each dataset


@dataclass(frozen=True)
class Agreement:
    """One step of both models from the same fields of one dataset, in raw units, as float32 bits."""

    dataset: str
    fields: str  # what the step was taken from
    values: int  # numbers compared
    before: str  # SHA-256 of what the old model predicts
    after: str  # and of what the extended one does
    equal: bool


@dataclass(frozen=True)
class Proof:
    """All comparisons of an old model with the extended one."""

    tensors: int  # parameters and statistics of the old model, compared byte for byte
    changed: tuple[str, ...]  # those that differ or are gone
    agreements: tuple[Agreement, ...]

    def check(self) -> None:
        """UserError where anything differs."""
        differing = [*self.changed, *(f"predictions of {one.dataset}" for one in self.agreements if not one.equal)]
        if differing:
            raise UserError(
                f"the extended model is not the old one on the old datasets: {len(differing)} of "
                f"{self.tensors + len(self.agreements)} comparisons differ ({', '.join(differing[:4])}). Nothing is "
                "written; this is a fault of this machine's arithmetic or of the project, please report it."
            )

    def table(self) -> str:
        """The comparisons for people."""
        rows = [
            [one.dataset, one.fields, f"{one.values:,}", one.before[:12], one.after[:12], "yes" if one.equal else "NO"]
            for one in self.agreements
        ]
        head = ["dataset", "one step from", "values", "before, SHA-256", "after, SHA-256", "same bits"]
        same = self.tensors - len(self.changed)
        return f"{markdown(head, rows)}\n{same} of {self.tensors} tensors of the model are byte for byte the same."

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        steps = [asdict(one) for one in self.agreements]
        return {"tensors": self.tensors, "changed": list(self.changed), "steps": steps}


def compare(old: Surrogate, extended: Surrogate, readers: Mapping[str, ShardReader]) -> Proof:
    """Compare on all datasets of `old`: on windows of `readers` where they hold them, else on random fields."""
    before, after = _tensors(old), _tensors(extended)
    changed = [name for name in before if name not in after or not same_bits(before[name], after[name])]
    agreements = [_compare_step(old, extended, spec, readers.get(spec.name)) for spec in old.specs.values()]
    return Proof(len(before), tuple(changed), tuple(agreements))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two float32 tensors are the same bits: NaN is as NaN, and 0 is not -0."""
    return torch.equal(first.contiguous().view(torch.int32), second.contiguous().view(torch.int32))


def _tensors(model: Surrogate) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _compare_step(old: Surrogate, extended: Surrogate, spec: DatasetSpec, reader: ShardReader | None) -> Agreement:
    if reader is not None and _has_its_channels(reader, spec):
        fields, (state, constants) = "windows", _windows(reader)
    else:
        fields, (state, constants) = "random fields", _random_fields(spec)
    before, after = (next(model.iterate(state, constants, spec.name, 1)) for model in (old, extended))
    return Agreement(
        spec.name,
        f"{len(state)} {fields}",
        before.numel(),
        _sha256(before),
        _sha256(after),
        same_bits(before, after),
    )


def _has_its_channels(reader: ShardReader, spec: DatasetSpec) -> bool:
    found = tuple(reader.manifest.state_channels), tuple(reader.manifest.constant_channels)
    return found == (spec.state_channels, spec.constant_channels)


def _windows(reader: ShardReader) -> tuple[Tensor, Tensor]:
    """Evenly spaced frames of the shards: states (B, C, H, W) and constants (B, K, H, W) in raw units."""
    count = len(reader.index(1))
    batch = reader.batch(np.unique(np.linspace(0, count - 1, FIELDS).astype(np.int64)), 1)
    return batch.fields[:, 0], batch.constants


def _random_fields(spec: DatasetSpec) -> tuple[Tensor, Tensor]:
    """Noise of the dataset's mean and spread on the grid of its training data: as `_windows`."""
    generator = torch.Generator().manual_seed(0)
    grid = spec.grid or (2 * MIN_GRID, 2 * MIN_GRID)

    def noise(channels: Sequence[str]) -> Tensor:
        drawn = torch.randn(FIELDS, len(channels), *grid, generator=generator, dtype=torch.float64)
        return (spec.moment("mean", channels) + spec.moment("std", channels) * drawn).float()

    return noise(spec.state_channels), noise(spec.constant_channels)


def _sha256(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().numpy().tobytes())


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
    trained = TrainedModel.open(source)
    model = _check_extendable(source, trained.model, names)
    cards = find_cards([(model.specs, trained.card_folders()), ([*model.specs, *names], folders)])
    cards.check_unchanged(model.specs, trained.checkpoint)
    try:
        readers = open_readers(shards, names, "train")
        added = dataset_specs(readers, described)
        chosen = choose_rows(rows, unseen_channels(model, added), model.lifting.rows.keys(), described.channel_cards)
        extended = extend_model(model, added, chosen, seed)
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
        trained.license or LICENCE,
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
    source: str, trained: TrainedModel, names: Sequence[str], rows: Mapping[str, Rows], seed: int, proof: Proof
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
