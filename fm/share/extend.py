"""Add datasets and their channels to a trained model, and prove that it is unchanged on its old datasets.

All parameters of a model are keyed by name, so the old ones stay where they are. An added dataset gets a task vector,
a head, whose output is zero (the model predicts persistence, or the mean), and, if the model has them, adapters that
start at zero. The task vector and the features of the head are copies from a dataset of the model
(fm/share/donors.py). A channel that the model has is shared, with its rows of the channel embedding (`lifting.rows`).
The proof compares all tensors, and the predictions for each old dataset, bit for bit.
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

from data_pipeline.errors import UserError
from data_pipeline.files import sha256
from data_pipeline.registry import Channel, Registry, load_folders, packaged_folder, user_folders
from data_pipeline.schema import nearest
from data_pipeline.tables import markdown
from data_pipeline.windows.loader import ShardPlaces, open_readers, shard_places
from data_pipeline.windows.reader import ShardReader
from fm.config import Recipe
from fm.datasets import dataset_specs, with_constraints, with_scalars
from fm.evaluation.trained import TrainedModel
from fm.model.spec import DatasetSpec
from fm.model.surrogate import MIN_GRID, Surrogate
from fm.model.wavelit import WaveLiTFM
from fm.share.donors import start_from_donors
from fm.share.export import LICENSE, find_cards, write_export
from fm.share.model_card import ExportedModel

WAYS = ("zero", "nearest", "drawn")
SIMILAR = 0.6  # least ratio of difflib: twice the letters in common over all letters
UNKNOWN = "unknown"  # the unit in a draft of `data-pipeline register`
NUM_FIELDS = 4  # initial states of each dataset in the proof


def extend(
    source: str,
    datasets: Sequence[str],
    shards: ShardPlaces,
    out: Path,
    rows: str,
    seed: int = 0,
    registry: str | None = None,
) -> "Proof":
    """Write the model at `source`, with the datasets added, as an exported model; print and return the proof.

    `source` is a run, a checkpoint or an exported model. `datasets` are names in the registry or paths of cards,
    `<folder>/datasets/<name>.yaml`, whose folders then belong to the registry. `shards` hold their train split; if they
    hold the old datasets too, the proof uses their windows. `rows` as in `choose_rows`. Raises UserError, and writes
    nothing, for what does not fit together or if a bit differs.
    """
    if out.exists():
        raise UserError(f"--out {out}: expected a folder that is not there yet; remove it, or choose another")
    folders, names = _find_folders(datasets, registry)
    described = load_folders(folders)
    described.select(names)  # raises UserError for an unknown name
    trained = TrainedModel.open(source)
    model = _check_extendable(source, trained.model, names)
    cards = find_cards([(model.specs, trained.card_folders()), ([*model.specs, *names], folders)])
    cards.check_unchanged(model.specs, trained)
    try:
        readers = open_readers(shards, names, "train")
        added = _added_specs(model, described, readers)
        known = {name for spec in model.specs.values() for name in spec.channels}
        unseen = sorted({name for spec in added for name in spec.channels} - known)
        chosen = choose_rows(rows, unseen, known, described.channel_cards)
        extended = extend_model(model, added, chosen, seed)
        aliases = {channel: one.copied for channel, one in chosen.items() if one.copied is not None}
        donors = start_from_donors(extended, readers, aliases)
    except ValueError as error:  # moments that are missing or not finite, a boundary that is periodic at one end
        raise UserError(
            f"{', '.join(shard_places(shards))}: {error}. Make the shards again with `data-pipeline shard`."
        ) from error
    old_readers = open_readers(shards, None, "train", known=list(model.specs))
    proof = compare(model, extended, old_readers)
    print(_summary(source, model, added, chosen, donors, proof))
    proof.check()
    lineage = {
        "model": source,
        "weights": trained.weights,
        "added": names,
        "donors": donors,
        "rows": {channel: asdict(one) for channel, one in chosen.items()},
        "seed": seed,
        "proof": asdict(proof),
        "earlier": dict(trained.lineage) or None,
    }
    recipe = _extended_recipe(trained.recipe, out, shards, list(extended.specs))
    digests = {**trained.shards, **{name: reader.manifest.digest for name, reader in readers.items()}}
    license = trained.license or LICENSE
    exported = ExportedModel(extended, recipe, cards.registry, trained.step, digests, license, lineage)
    write_export(out, exported, save(extended.state_dict()), cards.files())
    print(f"{out}: written; finetune.pretrained={out} trains it")
    return proof


def _added_specs(model: WaveLiTFM, described: Registry, readers: Mapping[str, ShardReader]) -> list[DatasetSpec]:
    """Return what the model has to know of each added dataset, with constraints and scalars if the model uses them."""
    added = dataset_specs(readers, described)
    if model.config.constraints:
        added = [with_constraints(spec, described.card(spec.name), readers[spec.name]) for spec in added]
    if model.config.condition == "scalars":
        added = [with_scalars(spec, described.card(spec.name), readers[spec.name]) for spec in added]
    return added


def _extended_recipe(recipe: Recipe, out: Path, shards: ShardPlaces, datasets: list[str]) -> Recipe:
    """Return the recipe of the trained model for the datasets of the extended one, and for their shards."""
    places: Any = str(shards) if isinstance(shards, str | Path) else shard_places(shards)
    return replace(
        recipe,
        run=replace(recipe.run, name=out.name, dir=None),
        data=replace(recipe.data, shards=places, datasets=datasets),
    )


def _find_folders(datasets: Sequence[str], registry: str | None) -> tuple[list[Traversable], list[str]]:
    """Return the folders of the registry, and the names of the datasets, each once, sorted."""
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


def _check_extendable(source: str, model: Surrogate, names: Sequence[str]) -> WaveLiTFM:
    """Return the model. Raises UserError if it is a baseline, or has one of the datasets already."""
    if not isinstance(model, WaveLiTFM):
        raise UserError(
            f"{source}: expected a WaveLiT, got a baseline or an imported network, which has input and output slots "
            f"for the datasets that it was made for ({', '.join(model.specs)}), and none for others: train one on all "
            "of them"
        )
    known = [name for name in names if name in model.specs]
    if known:
        raise UserError(
            f"--dataset {known[0]}: expected a dataset that {source} does not know, got one of its own "
            f"({', '.join(model.specs)}); leave it out, or give other data a name of its own in its card"
        )
    return model


@dataclass(frozen=True)
class Rows:
    """The origin of one channel's embedding rows, and the reason for it."""

    origin: str  # zero, drawn, or copy
    copied: str | None = None  # the channel whose rows are copied
    reason: str = ""

    def __str__(self) -> str:
        text = self.origin if self.copied is None else f"copy of {self.copied}"
        return f"{text} ({self.reason})" if self.reason else text


def choose_rows(
    given: str, channels: Sequence[str], known: Collection[str], described: Mapping[str, Channel]
) -> dict[str, Rows]:
    """Return the rows of each of the unseen `channels` by name, sorted.

    `known` are the model's channels and `described` the registry's. `given` is one of these:

        zero      zeros. They learn late: while a channel's rows and the head are both zero, neither has a gradient.
        drawn     drawn as for a new model
        nearest   a copy of the rows of the channel with the same unit and the most similar name; if it is not SIMILAR,
                  drawn
        NEW=OLD   with commas between several: copies of the rows of the channels OLD; all others are drawn

    Raises UserError for anything else, with the nearest valid name.
    """
    if given in ("zero", "drawn"):
        return {name: Rows(given) for name in sorted(channels)}
    if given == "nearest":
        return {name: _nearest_rows(name, known, described) for name in sorted(channels)}
    pairs: dict[str, str] = {}
    for pair in given.split(","):
        new, equals, old = pair.strip().partition("=")
        if not (new and equals and old) or new in pairs:
            raise UserError(
                f"--rows: expected {', '.join(WAYS)}, or NEW=OLD,... with each unseen channel once, got {given!r}"
            )
        pairs[new] = old
    for new, old in pairs.items():
        if new not in channels:
            raise UserError(
                f"--rows {new}={old}: expected a channel that the model has not seen, got {new!r}. "
                f"{nearest(new, channels)}"
            )
        if old not in known:
            raise UserError(f"--rows {new}={old}: expected a channel of the model, got {old!r}. {nearest(old, known)}")
    return {name: Rows("copy", pairs[name]) if name in pairs else Rows("drawn") for name in sorted(channels)}


def _nearest_rows(name: str, known: Collection[str], described: Mapping[str, Channel]) -> Rows:
    """Return a copy of the nearest channel's rows, if there is one; `described` may lack channels of the model."""
    unit = described[name].unit
    if unit == UNKNOWN:
        return Rows("drawn", reason=f"its unit is {UNKNOWN}")

    def similarity(old: str) -> float:
        return SequenceMatcher(None, old, name, autojunk=False).ratio()

    same_unit = [old for old in sorted(known) if old in described and described[old].unit == unit]
    if not same_unit:
        return Rows("drawn", reason=f"no channel in the unit {unit!r}")
    best = max(same_unit, key=similarity)  # the first by name if several are as near
    value = f"{similarity(best):.2f}"
    if similarity(best) < SIMILAR:
        return Rows("drawn", reason=f"in its unit, {best} has the most similar name, {value} < {SIMILAR}")
    return Rows("copy", best, f"same unit, similarity of names {value}")


def extend_model(model: WaveLiTFM, added: Sequence[DatasetSpec], rows: Mapping[str, Rows], seed: int = 0) -> WaveLiTFM:
    """Return a model of the old datasets and the added ones; the tensors of `model` are copied, others drawn by `seed`.

    `rows` gives the rows of each unseen channel, for all input frames. Rows of an earlier frame are drawn where the
    channel to copy has none, because it is constant. Raises ValueError for statistics that are missing.
    """
    extended = WaveLiTFM(model.config, [*model.specs.values(), *added], seed, model.context).eval()
    old = model.state_dict()
    weights = {**extended.state_dict(), **old}
    for channel, start in rows.items():
        for lag in ("", *(f"@{lag}" for lag in range(1, model.context))):
            name, copied = f"lifting.rows.{channel}{lag}", f"lifting.rows.{start.copied}{lag}"
            if start.origin == "copy" and copied in old and name in weights:
                weights[name] = old[copied]
            elif start.origin == "zero" and name in weights:
                weights[name] = torch.zeros_like(weights[name])
    extended.load_state_dict(weights)
    return extended


@dataclass(frozen=True)
class Agreement:
    """One step of both models from the same fields of one dataset, in physical units, compared as float32 bits."""

    dataset: str
    fields: str  # what the step starts from
    values: int  # numbers compared
    before: str  # SHA-256 of the old model's prediction
    after: str  # SHA-256 of the extended model's prediction
    equal: bool


@dataclass(frozen=True)
class Proof:
    """All comparisons of an old model with the extended one."""

    tensors: int  # parameters and statistics of the old model, compared byte for byte
    changed: tuple[str, ...]  # those that differ or are missing
    steps: tuple[Agreement, ...]

    def check(self) -> None:
        """Raise UserError if anything differs."""
        differing = [*self.changed, *(f"predictions of {one.dataset}" for one in self.steps if not one.equal)]
        if differing:
            raise UserError(
                f"the extended model is not the old one on the old datasets: {len(differing)} of "
                f"{self.tensors + len(self.steps)} comparisons differ ({', '.join(differing[:4])}). Nothing is "
                "written; this is a fault of this machine's arithmetic or of the project, please report it."
            )

    def table(self) -> str:
        """Return the comparisons as a Markdown table."""
        rows = [
            [one.dataset, one.fields, f"{one.values:,}", one.before[:12], one.after[:12], "yes" if one.equal else "NO"]
            for one in self.steps
        ]
        head = ["dataset", "one step from", "values", "before, SHA-256", "after, SHA-256", "same bits"]
        same = self.tensors - len(self.changed)
        return f"{markdown(head, rows)}\n{same} of {self.tensors} tensors of the model are byte for byte the same."


def compare(old: Surrogate, extended: Surrogate, readers: Mapping[str, ShardReader]) -> Proof:
    """Compare the models on all datasets of `old`, on windows of `readers` if they hold them, else on random fields."""

    def tensors(model: Surrogate) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    before, after = tensors(old), tensors(extended)
    changed = [name for name in before if name not in after or not same_bits(before[name], after[name])]
    steps = []
    for spec in old.specs.values():
        fields, frames, constants, scalars = _initial_fields(spec, readers.get(spec.name), old.context)
        predictions = [next(model.iterate(frames, constants, spec.name, 1, scalars)) for model in (old, extended)]
        first, second = (sha256(prediction.contiguous().numpy().tobytes()) for prediction in predictions)
        steps.append(Agreement(spec.name, fields, predictions[0].numel(), first, second, first == second))
    return Proof(len(before), tuple(changed), tuple(steps))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two float32 tensors have the same bits; then NaN equals NaN, and 0 differs from -0."""
    return torch.equal(first.contiguous().view(torch.int32), second.contiguous().view(torch.int32))


def _initial_fields(
    spec: DatasetSpec, reader: ShardReader | None, context: int
) -> tuple[str, Tensor, Tensor, Mapping[str, Tensor]]:
    """Return the source of the fields, frames (B, n, C, H, W), constants (B, K, H, W) and scalars in physical units.

    They are evenly spaced windows of the shards, or noise with the dataset's mean and spread on the trained grid.
    """
    channels = (spec.state_channels, spec.constant_channels)
    if reader is not None:
        manifest = reader.manifest
        if (tuple(manifest.state_channels), tuple(manifest.constant_channels)) == channels:
            count = len(reader.index(context))
            batch = reader.batch(np.unique(np.linspace(0, count - 1, NUM_FIELDS).astype(np.int64)), context)
            return f"{len(batch.fields)} windows", batch.fields, batch.constants, batch.scalars
    generator = torch.Generator().manual_seed(0)
    grid = spec.grid or (2 * MIN_GRID, 2 * MIN_GRID)
    drawn = []
    for names, time in zip(channels, ((context,), ()), strict=True):
        noise = torch.randn(NUM_FIELDS, *time, len(names), *grid, generator=generator, dtype=torch.float64)
        drawn.append((spec.moment("mean", names) + spec.moment("std", names) * noise).float())
    highest = {name: torch.tensor(one.highest, dtype=torch.float64) for name, one in spec.scalars.items()}
    return f"{NUM_FIELDS} random fields", drawn[0], drawn[1], highest


def _summary(
    source: str,
    model: Surrogate,
    added: Sequence[DatasetSpec],
    rows: Mapping[str, Rows],
    donors: Mapping[str, str],
    proof: Proof,
) -> str:
    known = {name for spec in model.specs.values() for name in spec.scalars}
    lines = [f"{source}, extended by {', '.join(spec.name for spec in added)}:"]
    for spec in added:
        shared = ", ".join(name for name in spec.channels if name not in rows) or "none"
        origin = f"from {donors[spec.name]}, whose head predicts it best" if spec.name in donors else "drawn"
        adapters = "adapters start at zero; " if model.config.adapter_rank else ""
        lines.append(
            f"{spec.name}: a head that gives zeros; its features and the task vector are {origin}; {adapters}of its "
            f"channels the model knows {shared}"
        )
        if unseen := [name for name in spec.scalars if name not in known]:
            lines.append(f"{spec.name}: scalars that the model has not seen, with rows of zeros: {', '.join(unseen)}")
    if rows:
        table = markdown(["unseen channel", "lifting rows"], [[name, str(one)] for name, one in rows.items()])
        lines.append(f"\n{table}")
    return "\n".join([*lines, "", proof.table()])
