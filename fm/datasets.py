"""From a recipe to what a run starts from: readers of its shards, specifications of its datasets, a model that fits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.registry import Card, Registry
from data_pipeline.schema import nearest
from data_pipeline.shards.format import Manifest
from data_pipeline.windows.loader import datasets_with_shards, open_readers
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import load_pretrained
from fm.config import AVAILABLE, Recipe, load_recipe
from fm.model.baselines import Baseline, BaselineConfig
from fm.model.constraints import Constraints
from fm.model.files import is_exported
from fm.model.imports import ImportSettings, allow_imports
from fm.model.network import ImportedConfig, ImportedModel
from fm.model.scalars import TIME_STEP, ScalarStats
from fm.model.spec import DatasetSpec, ModelConfig, explain
from fm.model.surrogate import MIN_GRID, STD_FLOOR, Surrogate
from fm.model.wavelit import WaveLiTFM

AnyConfig: TypeAlias = ModelConfig | BaselineConfig | ImportedConfig  # of each kind of model
VIOLATION = 0.1  # of the change in one step: a constraint that changes true states by more is left out


def load_own_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe that the user trains, as `load_recipe` does, and allow the classes that it imports.

    The recipe beside a run or an exported model may come from someone else, so it allows nothing.
    """
    recipe = load_recipe(path, overrides)
    if not is_exported(path.parent) and not (path.parent / "checkpoints").exists():
        allow_recipe(recipe)
    return recipe


def allow_recipe(recipe: Recipe) -> None:
    """Allow the classes that a recipe imports (fm/model/imports.py)."""
    allow_imports(one.import_ for one in imported_sections(recipe))


def imported_sections(recipe: Recipe) -> list[ImportSettings]:
    """Return the sections of a recipe that import a class."""
    sections = (recipe.model, recipe.loss, recipe.train.optimizer)
    return [one for one in sections if isinstance(one, ImportSettings)]


def dataset_specs(readers: Mapping[str, ShardReader], registry: Registry) -> list[DatasetSpec]:
    """Return one specification per dataset, sorted by name, from the manifests of its shards.

    UserError where the shards' channels are not those of the registry's card, where a grid is odd or too small, and for
    names that torch does not accept.
    """
    for reader in readers.values():
        card = registry.card(reader.manifest.dataset)
        check_channels(reader, card.state_channels, card.constant_channels, "the registry's card names")
        if any(size % 2 or size < MIN_GRID for size in reader.manifest.grid):
            raise UserError(
                f"{card.name}: the shards have a grid of {reader.manifest.grid[0]} x {reader.manifest.grid[1]}; the "
                f"wavelet tokens need an even number of at least {MIN_GRID} points along both axes."
            )
        _check_attribute_names(card)
    return [
        DatasetSpec(
            name=name,
            state_channels=tuple(reader.manifest.state_channels),
            constant_channels=tuple(reader.manifest.constant_channels),
            boundary=reader.manifest.boundary,
            stats=reader.manifest.stats,
            grid=reader.manifest.grid,
            dt=_common_dt(reader.manifest),
            spacing=grid_spacing(registry.card(name), reader.manifest.grid, reader.manifest.spacing),
        )
        for name, reader in sorted(readers.items())
    ]


def grid_spacing(
    card: Card, grid: tuple[int, int], stored: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """Return the step from a grid point to the next along x and y, negative where an axis runs backward.

    Its size follows from the extent of the grid that the card names, its sign is that of `stored`, the spacing in the
    manifest of the shards. Without an extent it is `stored`, which may be unknown.
    """
    if card.domain is None:
        return stored
    x, y = ((upper - lower) / points for (lower, upper), points in zip(card.domain, grid, strict=True))
    return (x, y) if stored is None else (math.copysign(x, stored[0]), math.copysign(y, stored[1]))


def check_direction(reader: ShardReader, spec: DatasetSpec) -> None:
    """Raise UserError where an axis of the shards runs another way than in the data that a model was trained on."""
    for axis, own, known in zip("xy", reader.manifest.spacing or (), spec.spacing or (), strict=False):
        if own * known < 0:
            way = ("backward", "forward") if own < 0 else ("forward", "backward")
            raise UserError(
                f"{reader.folder}: {axis} runs {way[0]} in these shards, and {way[1]} in the data of {spec.name} that "
                f"the model was trained on: flip {axis} in the HDF5 files (and the sign of {axis} components), and "
                "make the shards again"
            )


def with_constraints(
    spec: DatasetSpec, card: Card, reader: ShardReader, log: Callable[[str], object] = print
) -> DatasetSpec:
    """Return the specification with the constraints of its card; log those left out, with the reason.

    A constraint is left out where the model cannot impose it (a divergence on an open axis, or without the grid's
    spacing), and where it would change true next states by more than VIOLATION of their change in one step. Points that
    are not evenly spaced are such a case, since the derivatives are Fourier's.
    """
    frames = np.stack([reader.trajectory_frames(0, first, 2) for first in _places(reader.num_frames(0))])
    mean, std = (spec.moment(key, spec.state_channels) for key in ("mean", "std"))
    last, state = ((torch.from_numpy(frames) - mean) / std.clamp_min(STD_FLOOR)).float().unbind(1)
    stated: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        (one.channels, {"conserved": ((one.kind, one.channels),)}, f"{one.kind} of {', '.join(one.channels)}")
        for one in card.conserved
    ]
    for name in sorted(card.ranges.keys() & set(spec.state_channels)):
        stated.append(((name,), {"ranges": {name: card.ranges[name]}}, f"range of {name}"))
    kept, held = spec, []
    for channels, constraint, words in stated:
        try:
            alone = replace(spec, **constraint)
        except ValidationError as error:
            log(f"model.constraints leaves out the {words}: {explain(error, DatasetSpec)}")
            continue
        moved = Constraints(alone, mean, std.clamp_min(STD_FLOOR))(state, last) - state
        index = [spec.state_channels.index(name) for name in channels]
        squares = [part[:, index].square().mean() for part in (moved, state - last)]
        share = (squares[0] / squares[1].clamp_min(1e-30)).sqrt().item()
        if share > VIOLATION:
            log(
                f"model.constraints leaves out the {words} of {spec.name}: it would change true next states by "
                f"{share:.0%} of their change in one step"
            )
            continue
        kept = replace(kept, conserved=kept.conserved + alone.conserved, ranges={**kept.ranges, **alone.ranges})
        held.append(words)
    if held:
        log(f"model.constraints of {spec.name}: {'; '.join(held)}")
    return kept


def with_scalars(spec: DatasetSpec, card: Card, reader: ShardReader) -> DatasetSpec:
    """Return the specification with the scalars of its card that the train split of `reader` has, and the time step.

    UserError for a scalar with the name of a method of torch, and for values whose spread is not finite.
    """
    found = {}
    for name, values in reader.scalars().items():
        present = values[~np.isnan(values)]
        if not present.size or name not in (*card.scalars, TIME_STEP):
            continue
        _check_attribute_name(card, "scalar", name, "Leave it out of the card's scalars.")
        try:
            found[name] = ScalarStats.of(present.tolist())
        except ValueError as error:
            raise UserError(f"{reader.folder}: scalar {name}: {error}") from error
    return replace(spec, scalars=found)


def _places(frames: int) -> list[int]:
    """Return the first frames of at most three pairs of neighbors, spread over a trajectory but for its start."""
    return sorted({max(0, min(round(frames * part), frames - 2)) for part in (0.25, 0.5, 0.75)})


def check_channels(reader: ShardReader, state: Sequence[str], constant: Sequence[str], origin: str) -> None:
    """Raise UserError unless the shards hold exactly these channels in this order.

    `origin` is a subject and its verb for the message, such as "the registry's card names".
    """
    manifest = reader.manifest
    for role, found, expected in (
        ("state", manifest.state_channels, state),
        ("constant", manifest.constant_channels, constant),
    ):
        if tuple(found) != tuple(expected):
            raise UserError(
                f"{reader.folder}: the shards hold the {role} channels {', '.join(found) or 'none'}, but {origin} the "
                f"{role} channels {', '.join(expected) or 'none'}. Make the shards again with `data-pipeline shard`."
            )


def _common_dt(manifest: Manifest) -> float | None:
    """Return the time between frames, or None where it differs from trajectory to trajectory."""
    steps = [trajectory.dt for trajectory in manifest.trajectories if trajectory.dt is not None]
    even = len(steps) == len(manifest.trajectories) and max(steps) - min(steps) <= 1e-4 * abs(steps[0])
    return steps[0] if even else None


def _check_attribute_names(card: Card) -> None:
    """Raise UserError for a dataset or channel with the name of a method of torch: parts of the model are named so."""
    for what, names in (("dataset", (card.name,)), ("channel", card.state_channels + card.constant_channels)):
        for name in names:
            remedy = "Rename it in the card and make the shards again with `data-pipeline shard`."
            _check_attribute_name(card, what, name, remedy)


def _check_attribute_name(card: Card, what: str, name: str, remedy: str) -> None:
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name == "training":
        raise UserError(f"{card.name}: the {what} {name!r} has the name of a method of torch's modules. {remedy}")


def open_split(recipe: Recipe, registry: Registry, split: str) -> dict[str, ShardReader]:
    """Return readers of the recipe's datasets, by name; data.trajectories restricts the readers of the train split."""
    data, known = recipe.data, tuple(registry.cards)
    readers = open_readers(data.shards, data.datasets, split, data.verify, recipe.stream(), known)
    for name, count in data.trajectories.items() if split == "train" else ():
        if name not in readers:
            raise UserError(f"data.trajectories: no dataset {name!r} in this run. {nearest(name, sorted(readers))}")
        try:
            readers[name] = readers[name].restricted_to(count)
        except UserError as error:
            raise UserError(f"data.trajectories.{name}: {error}") from error
    return readers


def with_available_datasets(recipe: Recipe, registry: Registry, recorded: Sequence[str] | None = None) -> Recipe:
    """Return the recipe with names in place of `available` in data.datasets.

    The names are those that a run's checkpoint has `recorded`, else the datasets that have shards now: of the train
    split and, if the run validates, of the valid split. UserError if there are none.
    """
    data = recipe.data
    if AVAILABLE not in (data.datasets or ()):
        return recipe
    wanted = [name for name in data.datasets or () if name != AVAILABLE] or None
    registry.select(wanted)  # raises UserError for an unknown name
    splits = ["train", *(["valid"] if recipe.validation.every else [])]
    found = recorded or datasets_with_shards(data.shards, wanted, splits, recipe.stream(), tuple(registry.cards))
    return replace(recipe, data=replace(data, datasets=list(found)))


def check_windows(recipe: Recipe, readers: Mapping[str, ShardReader]) -> None:
    """Raise UserError where an unroll is of a dataset that is not trained on, or a window longer than all trajectories.

    A window has the context and one frame per model step.
    """
    context = recipe.data.context
    unknown = sorted(set(recipe.finetune.unroll_override if recipe.finetune else ()) - set(readers))
    if unknown:
        known = ", ".join(sorted(readers))
        raise UserError(f"finetune.unroll_override: expected datasets of this run ({known}), got {unknown[0]!r}")
    for name, reader in readers.items():
        longest = max(reader.num_frames(trajectory) for trajectory in range(reader.num_trajectories))
        if longest <= context:
            raise UserError(
                f"data.context: {context} input frames and one to predict are longer than the longest trajectory of "
                f"{name}, which has {longest}; shorten the context, or leave the dataset out (data.datasets)"
            )
        if longest < recipe.window_length(name):
            raise UserError(
                f"finetune.unroll_steps: {recipe.unroll_steps(name)} model steps take {recipe.window_length(name)} "
                f"frames, but the longest trajectory of {name} has {longest}; shorten them, or for this dataset alone: "
                f"finetune.unroll_override.{name}={longest - context}"
            )


def build_model(
    recipe: Recipe, readers: Mapping[str, ShardReader], registry: Registry, log: Callable[[str], object] = print
) -> Surrogate:
    """Return a new model, or when finetuning the pretrained one, for the datasets of the shards."""
    finetune, config = recipe.finetune, recipe.baseline or recipe.model
    specs = dataset_specs(readers, registry)
    pretrained = load_pretrained(finetune.pretrained) if finetune else None
    if getattr(pretrained.config if pretrained else config, "constraints", False):
        known = pretrained.specs if pretrained else {}  # these keep their constraints
        specs = [
            spec if spec.name in known else with_constraints(spec, registry.card(spec.name), readers[spec.name], log)
            for spec in specs
        ]
    if getattr(pretrained.config if pretrained else config, "condition", "none") == "scalars":
        specs = [with_scalars(spec, registry.card(spec.name), readers[spec.name]) for spec in specs]
    if finetune is None or pretrained is None:
        return new_model(config, specs, recipe.run.seed, recipe.data.context)
    check_context(recipe, pretrained, finetune.pretrained)
    for name in pretrained.specs.keys() & readers.keys():
        check_direction(readers[name], pretrained.specs[name])
    found = finetuned_config(recipe, pretrained)
    if not isinstance(pretrained, WaveLiTFM):
        return pretrained.adapted_to(specs)
    if found != pretrained.config:
        log(f"{finetune.pretrained}: adapters of rank {found.adapter_rank} are added (finetune.adapter_rank)")
    return pretrained.adapted_to(specs, found.adapter_rank)


def finetuned_config(recipe: Recipe, pretrained: Surrogate) -> Any:
    """Return the configuration of the pretrained model in a finetuning: its own, or that with added adapters.

    Raises UserError if the recipe's architecture is another one, and for a model that adapters cannot be added to.
    """
    assert recipe.finetune is not None
    source, rank, own = recipe.finetune.pretrained, recipe.finetune.adapter_rank, pretrained.config
    found = own
    if rank is not None:
        if not isinstance(own, ModelConfig):
            raise UserError(f"finetune.adapter_rank: expected a WaveLiT, {source} is another network; leave it out")
        if own.adapter_rank not in (0, rank):
            raise UserError(
                f"finetune.adapter_rank: {source} has adapters of rank {own.adapter_rank}, got {rank}; leave it out to "
                "train these"
            )
        try:
            found = replace(own, adapter_rank=rank)
        except ValidationError as error:
            raise UserError(f"finetune.{explain(error, ModelConfig)}") from error
    config = recipe.baseline or recipe.model
    if config is not None and config not in (own, found):
        raise UserError(
            f"model: the recipe's architecture is not that of {source}.\nRecipe: {config}\nPretrained: {own}\nLeave "
            "the section out to take the pretrained one; finetune.adapter_rank adds adapters to it."
        )
    return found


def check_context(recipe: Recipe, pretrained: Surrogate, where: str) -> None:
    """Raise UserError if the recipe has another number of input frames than the pretrained model from `where`."""
    if pretrained.context != recipe.data.context:
        raise UserError(
            f"data.context: the recipe has {recipe.data.context} input frames, but {where} was trained with "
            f"{pretrained.context}; write data.context={pretrained.context}"
        )


def new_model(config: AnyConfig | None, specs: Sequence[DatasetSpec], seed: int = 0, context: int = 1) -> Surrogate:
    """Return a model with new weights that reads `context` frames; a WaveLiT of default sizes if `config` is None."""
    if isinstance(config, BaselineConfig):
        return Baseline(config, specs, seed, context)
    if isinstance(config, ImportedConfig):
        return ImportedModel(config, specs, seed, context)
    return WaveLiTFM(config or ModelConfig(), specs, seed, context)


def shard_digests(readers: Mapping[str, ShardReader]) -> dict[str, str]:
    """Return the digests of the shards' manifests, which a checkpoint stores."""
    return {name: reader.manifest.digest for name, reader in readers.items()}


def check_same_shards(trained_on: Mapping[str, str], readers: Mapping[str, ShardReader], checkpoint: Path) -> None:
    """Raise UserError where the shards are not those that a checkpoint was trained on."""
    digests = shard_digests(readers)
    changed = sorted(n for n in digests.keys() | trained_on.keys() if trained_on.get(n) != digests.get(n))
    if changed:
        raise UserError(
            f"{checkpoint}: trained on other shards of {', '.join(changed)} than those of the recipe; the run would "
            "not see the same windows. Put the shards back, or start afresh with run.dir=... (finetune.pretrained "
            "takes the weights along)."
        )
