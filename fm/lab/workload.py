"""The workload of a recipe: its datasets, its model, and what one training step computes, moves and keeps.

The sizes of datasets come from the manifests of the shards. A dataset without shards has the published grid and
trajectories of its card, so a run on The Well can be planned without The Well. The mini-Well's simulations give small
grids. A step is counted by running the model on torch's fake tensors (fm/training/flops.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.errors import UserError, shortened
from data_pipeline.miniwell.generate import EIGHT, SYSTEMS, load_system
from data_pipeline.registry import Card, Registry, load_registry
from data_pipeline.remote import is_url
from data_pipeline.schema import nearest
from data_pipeline.shards.format import MANIFEST_NAME
from data_pipeline.windows.loader import open_readers, shard_places, sources
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Schedule, Source
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.config import Recipe
from fm.datasets import (
    AnyConfig,
    check_windows,
    dataset_specs,
    finetuned_config,
    new_model,
    open_split,
    with_available_datasets,
    with_scalars,
)
from fm.model.imports import ImportedOptimizer
from fm.model.network import ImportedConfig
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.surrogate import Surrogate
from fm.training.flops import fake_mode, zero_fields
from fm.training.mixing import Mixing
from fm.training.objective import Unroll

FLOAT_BYTES = 4
# WaveLiT paper, section 4: the joint model was trained for PAPER_HOURS on one B200, in JAX.
PAPER_HOURS, PAPER_STEPS, PAPER_BATCH, PAPER_PARAMETERS = 41.0, 1_000_000, 4, 10_000_000

GridSize = Literal["full", "mini"]


@dataclass(frozen=True)
class WorkloadDataset:
    """The sizes of one dataset."""

    spec: DatasetSpec
    source: Source
    grid: tuple[int, int]  # (H, W)
    window_bytes: int  # read for one window, with its constant fields
    frames: int  # of the longest trajectory
    published: bool  # the sizes are the card's, not those of shards

    @property
    def name(self) -> str:
        """Return the dataset's name."""
        return self.spec.name


@dataclass(frozen=True)
class Workload:
    """A recipe, its datasets sorted by name, and the configuration of its model."""

    recipe: Recipe
    datasets: dict[str, WorkloadDataset]
    config: AnyConfig
    notes: tuple[str, ...]  # what was assumed

    def schedule(self) -> Schedule:
        """Return the schedule that the run would follow."""
        return Mixing(self.recipe, [dataset.source for dataset in self.datasets.values()]).schedule

    def model(self) -> Surrogate:
        """Return a new model."""
        specs = [dataset.spec for dataset in self.datasets.values()]
        return new_model(self.config, specs, self.recipe.run.seed, self.recipe.data.context)

    def fake_model(self) -> Surrogate:
        """Return a new model of fake tensors, which have shapes and no memory."""
        try:
            with FakeTensorMode():
                return self.model()
        except RuntimeError as error:
            if not isinstance(self.config, ImportedConfig):
                raise
            raise UserError(
                f"{self.config.import_}: its constructor reads values of tensors, so its work cannot be counted "
                f"without making it ({shortened(str(error), 200)}); compute them with Python's numbers"
            ) from error


def read_workload(recipe: Recipe, require_shards: bool = False) -> Workload:
    """Return the workload of a recipe, with the published sizes of datasets that have no shards.

    Raises UserError for a dataset that has neither shards nor published sizes, or no shards if `require_shards`.
    """
    registry = load_registry(recipe.data.registry)
    recipe = with_available_datasets(recipe, registry)
    registry.select(recipe.data.datasets)  # raises UserError for an unknown name
    readers = _open_shards(recipe, registry, require_shards)
    check_windows(recipe, readers)
    config, notes = _model_config(recipe)
    datasets = {}
    lengths = {name: recipe.window_length(name) for name in readers}
    for spec, source in zip(dataset_specs(readers, registry), sources(readers, lengths), strict=True):
        if getattr(config, "condition", "none") == "scalars":
            spec = with_scalars(spec, registry.card(spec.name), readers[spec.name])
        manifest = readers[spec.name].manifest
        window_bytes = lengths[spec.name] * manifest.frame_bytes + manifest.constants_bytes
        frames = max(trajectory.frames for trajectory in manifest.trajectories)
        datasets[spec.name] = WorkloadDataset(spec, source, manifest.grid, window_bytes, frames, published=False)
    missing = [name for name in recipe.data.datasets or () if name not in datasets]
    datasets |= {name: _published_dataset(recipe, registry.card(name)) for name in missing}
    if isinstance(recipe.train.optimizer, ImportedOptimizer):
        notes = [*notes, f"{recipe.train.optimizer.import_} counts as AdamW: two moments, no products"]
    if missing:
        which = "no shards" if len(missing) == len(datasets) else f"no shards of {', '.join(missing)}"
        places = ", ".join(shard_places(recipe.data.shards))
        notes = [f"{which} in {places}: grids and windows as published, from the cards", *notes]
    return Workload(recipe, dict(sorted(datasets.items())), config, tuple(notes))


def sized_workload(recipe: Recipe, size: GridSize, names: Sequence[str] | None = None) -> Workload:
    """Return the recipe's workload with the cards' grids and windows (full), or the mini-Well's (mini).

    `names` are some of the recipe's datasets, or of the eight if the recipe lists none. Raises UserError for an unknown
    dataset and for a dataset without this size.
    """
    registry = load_registry(recipe.data.registry)
    recipe = with_available_datasets(recipe, registry)
    known = recipe.data.datasets or list(EIGHT)
    for name in names or ():
        if name not in known:
            raise UserError(f"--datasets: {name!r} is none of the recipe's datasets. {nearest(name, known)}")
    cards = [registry.card(name) for name in sorted({*(names or known)})]
    if size == "mini":
        cards = [_mini_card(card) for card in cards]
    config, notes = _model_config(recipe)
    return Workload(recipe, {card.name: _published_dataset(recipe, card) for card in cards}, config, tuple(notes))


def _open_shards(recipe: Recipe, registry: Registry, required: bool) -> dict[str, ShardReader]:
    """Open the training shards that exist."""
    data = recipe.data
    places = shard_places(data.shards)
    if required or data.datasets is None or any(map(is_url, places)):
        return open_split(recipe, registry, "train")
    there = {name for place in places for name in data.datasets if (Path(place, name, "train", MANIFEST_NAME)).exists()}
    found = [name for name in data.datasets if name in there]
    return open_readers(data.shards, found, "train") if found else {}


def _published_dataset(recipe: Recipe, card: Card) -> WorkloadDataset:
    """Return a dataset with the sizes of its card. UserError if the card gives no training trajectories."""
    length = recipe.window_length(card.name)
    windows = sum(trajectories * max(0, frames - length + 1) for trajectories, frames in card.train)
    if not windows:
        places = ", ".join(shard_places(recipe.data.shards))
        raise UserError(
            f"{card.name}: no shards in {places}, and its card states no published training split with "
            f"windows of {length} frames; make shards with `data-pipeline shard`, or write `train` into the card"
        )
    names = card.state_channels + card.constant_channels
    # Sizes do not depend on the statistics.
    stats = {key: dict.fromkeys(names, 1.0) for key in ("mean", "std", "mean_delta", "std_delta")}
    spec = DatasetSpec(card.name, card.state_channels, card.constant_channels, card.boundary, stats)
    arrays = length * len(card.state_channels) + len(card.constant_channels)
    window_bytes = FLOAT_BYTES * card.grid[0] * card.grid[1] * arrays
    source = Source(card.name, windows, card.tokens, (windows,))
    return WorkloadDataset(spec, source, card.grid, window_bytes, card.num_frames[-1], published=True)


def _mini_card(card: Card) -> Card:
    """Return the card with the grid and the trajectories of the mini-Well's simulation."""
    if card.name not in SYSTEMS:
        raise UserError(f"--grid mini: the mini-Well has no {card.name}; take --grid full, or other --datasets")
    preset = load_system(card.name).presets["mini"]
    trajectories = sum(parameters.num_trajectories["train"] for parameters in preset.parameter_sets)
    return replace(card, grid=preset.grid, train=((trajectories, preset.num_frames),))


def _model_config(recipe: Recipe) -> tuple[AnyConfig, list[str]]:
    """Return the model's configuration, and a note if it was assumed because the pretrained model does not exist."""
    config = recipe.baseline or recipe.model or ModelConfig()
    if recipe.finetune is None:
        return config, []
    try:
        find_checkpoint(recipe.finetune.pretrained)
    except UserError:
        taken = "the recipe's" if recipe.baseline or recipe.model else "the defaults; model.KEY=value gives others"
        if isinstance(config, ModelConfig) and recipe.finetune.adapter_rank is not None:
            config = replace(config, adapter_rank=recipe.finetune.adapter_rank)
        return config, [f"no model in {recipe.finetune.pretrained} yet: sizes are {taken}"]
    return finetuned_config(recipe, load_pretrained(recipe.finetune.pretrained)), []


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution, or both products that its backward pass computes.

    `kind` is linear (all channels with all), attention (batches of products) or depthwise (each channel with itself).
    """

    kind: str
    dtype: torch.dtype  # in which it is computed
    flops: int  # two per multiply-add
    bytes: int  # of operands and results, each counted once


@dataclass(frozen=True)
class Footprint:
    """What a forward and backward pass of some windows computes, moves and keeps, without the weights themselves."""

    kept_bytes: int  # that the forward pass holds for the backward pass
    moved_bytes: int  # read and written by operations that are no matrix products, none of them fused
    operations: int  # number of kernels, about
    products: tuple[Product, ...]  # includes depthwise convolutions, which count among the moved bytes too


def footprint(objective: Unroll, dataset: str, grid: tuple[int, int], windows: int = 1, calls: int = 1) -> Footprint:
    """Return the footprint of `calls` model calls. Nothing is computed, and the parameters get no gradients."""
    model = objective.model
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # each once, and held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with fake_mode(model), _OperationCounter() as counter:
        fields, constants = zero_fields(model, dataset, grid, windows, frames=model.context + calls)
        forced = torch.ones(windows, calls, dtype=torch.bool)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(fields, constants, forced, dataset)["loss"]
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    kept_bytes = sum(storage.nbytes() for storage in kept.values())
    return Footprint(kept_bytes, counter.bytes, counter.operations, tuple(counter.products))


class _OperationCounter(TorchDispatchMode):
    """Counts operations, lists matrix products and convolutions, and sums the bytes that the other operations move."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0
        self.products: list[Product] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view:
            self.operations += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            # An expanded tensor is read from its smaller storage.
            moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
            product = _product(function._schema.name.removeprefix("aten::"), args, result, moved)
            if product is not None:
                self.products.append(product)
            if product is None or product.kind == "depthwise":  # limited by the memory's speed, not by arithmetic
                self.bytes += moved
        return result


def _product(name: str, args: Any, result: Any, moved: int) -> Product | None:
    """Return the operation as a Product, or None if it is no matrix product or convolution."""
    if name == "convolution":
        kind = "linear" if args[8] == 1 else "depthwise"
        return Product(kind, args[0].dtype, 2 * result.numel() * args[1][0].numel(), moved)
    if name == "convolution_backward":  # args: gradient of the result, input, weight, ..., groups, wanted gradients
        kind = "linear" if args[9] == 1 else "depthwise"
        once = 2 * args[0].numel() * args[2][0].numel()
        return Product(kind, args[1].dtype, once * sum(args[10][:2]), moved)
    if name not in ("mm", "bmm", "addmm", "baddbmm"):
        return None
    left = args[1] if "add" in name else args[0]
    return Product("attention" if left.dim() == 3 else "linear", left.dtype, 2 * result.numel() * left.shape[-1], moved)
