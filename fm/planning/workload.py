"""What a recipe trains and on what: from the manifests of its shards, or where there are none from the cards.

A card states the published grid and the published trajectories, so a run on The Well can be planned without The Well.
"""

from dataclasses import dataclass
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.cards.registry import Card, Registry, load_registry
from data_pipeline.errors import UserError
from data_pipeline.remote import is_url
from data_pipeline.shards.manifest import MANIFEST_NAME
from data_pipeline.windows.loader import open_readers, sources
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Source
from fm.baselines.config import BaselineConfig
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.model import DatasetSpec, ModelConfig
from fm.settings import Recipe
from fm.specs import check_names, dataset_specs
from fm.surrogate import Surrogate
from fm.training.inputs import check_unrolls, new_model, open_split
from fm.training.mixing import Mixing

FLOAT_BYTES = 4
STATISTICS = ("mean", "std", "mean_delta", "std_delta")


@dataclass(frozen=True)
class DatasetWork:
    """One dataset as training meets it."""

    spec: DatasetSpec
    source: Source
    grid: tuple[int, int]  # (H, W)
    window_bytes: int  # read for a window, its constant fields among them
    frames: int  # of the longest trajectory
    measured_shards: bool  # False where the numbers are the card's

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Workload:
    """A recipe with its datasets by name, sorted, and the configuration of its model; `notes` say what was assumed."""

    recipe: Recipe
    datasets: dict[str, DatasetWork]
    config: ModelConfig | BaselineConfig
    notes: tuple[str, ...]

    def mixing(self) -> Mixing:
        """The schedule that the run would follow."""
        return Mixing(self.recipe, [work.source for work in self.datasets.values()])

    def model(self) -> Surrogate:
        """A new model of these sizes."""
        return new_model(self.config, [work.spec for work in self.datasets.values()], self.recipe.run.seed)

    def fake_model(self) -> Surrogate:
        """The same of fake tensors: shapes without memory."""
        with FakeTensorMode():
            return self.model()


def read_workload(recipe: Recipe, require_shards: bool = False) -> Workload:
    """The workload of a recipe.

    UserError where there are neither shards nor a card with published sizes, or no shards where they are required.
    """
    registry = load_registry(recipe.data.registry)
    check_names(recipe.data.datasets, registry)
    readers = _readers(recipe, registry, require_shards)
    check_unrolls(recipe, readers)
    datasets = _from_shards(recipe, readers, registry)
    unread = [name for name in recipe.data.datasets or () if name not in datasets]
    datasets |= {name: published_work(recipe, registry.card(name)) for name in unread}
    config, notes = planned_config(recipe)
    if unread:
        which = "no shards" if len(unread) == len(datasets) else f"no shards of {', '.join(unread)}"
        notes = [f"{which} in {recipe.data.shards}: grids and windows as published, from the cards", *notes]
    return Workload(recipe, dict(sorted(datasets.items())), config, tuple(notes))


def _readers(recipe: Recipe, registry: Registry, required: bool) -> dict[str, ShardReader]:
    """Readers of the training shards that are there."""
    data = recipe.data
    if required or data.datasets is None or is_url(data.shards):
        return open_split(recipe, registry, "train")
    shards = Path(data.shards)
    found = [name for name in data.datasets if (shards / name / "train" / MANIFEST_NAME).exists()]
    return open_readers(shards, found, "train") if found else {}


def _from_shards(recipe: Recipe, readers: dict[str, ShardReader], registry: Registry) -> dict[str, DatasetWork]:
    found = {}
    lengths = {name: recipe.window_length(name) for name in readers}
    listed = sources(readers, lengths)
    for spec, source in zip(dataset_specs(readers, registry), listed, strict=True):
        manifest = readers[spec.name].manifest
        size = lengths[spec.name] * manifest.frame_bytes + manifest.constants_bytes
        frames = max(trajectory.frames for trajectory in manifest.trajectories)
        found[spec.name] = DatasetWork(spec, source, manifest.grid, size, frames, True)
    return found


def published_work(recipe: Recipe, card: Card) -> DatasetWork:
    """A dataset at its published size. UserError where the card does not state it."""
    length, (height, width) = recipe.window_length(card.name), card.grid
    windows = sum(trajectories * max(0, frames - length + 1) for trajectories, frames in card.train)
    if not windows:
        raise UserError(
            f"{card.name}: no shards in {recipe.data.shards}, and its card states no published training split with "
            f"windows of {length} frames; make shards with `data-pipeline shard`, or write `train` into the card"
        )
    names = card.state_channels + card.constant_channels
    stats = {key: dict.fromkeys(names, 1.0) for key in STATISTICS}  # sizes do not depend on them
    spec = DatasetSpec(card.name, card.state_channels, card.constant_channels, card.boundary, stats)
    size = FLOAT_BYTES * height * width * (length * len(card.state_channels) + len(card.constant_channels))
    source = Source(card.name, windows, card.tokens, (windows,))
    return DatasetWork(spec, source, card.grid, size, card.num_frames[-1], False)


def planned_config(recipe: Recipe) -> tuple[ModelConfig | BaselineConfig, list[str]]:
    """The model's configuration and what was assumed of it; a pretrained model may not be there yet."""
    config = recipe.baseline or recipe.model
    if recipe.finetune is None:
        return config or ModelConfig(), []
    try:
        find_checkpoint(recipe.finetune.pretrained)
    except UserError:
        taken = "the recipe's" if config else "the defaults; model.KEY=value gives others"
        return config or ModelConfig(), [f"no model in {recipe.finetune.pretrained} yet: sizes are {taken}"]
    return load_pretrained(recipe.finetune.pretrained).config, []
