"""What a run starts from: readers of its shards, and a model that fits them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.cards.registry import Registry
from data_pipeline.errors import UserError
from data_pipeline.strict_yaml import nearest
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.baselines.baseline import Baseline
from fm.baselines.config import BaselineConfig
from fm.checkpoint import load_pretrained
from fm.model import DatasetSpec, ModelConfig, WaveLiTFM
from fm.settings import Recipe
from fm.specs import dataset_specs
from fm.surrogate import Surrogate


def open_split(recipe: Recipe, registry: Registry, split: str) -> dict[str, ShardReader]:
    """A reader of each of the recipe's datasets, by name; of the train split as data.trajectories restricts it.

    UserError where there are no shards, or fewer trajectories.
    """
    data, sampling = recipe.data, recipe.sampling
    stream = data.stream(sampling.shuffle, sampling.shards_per_block)
    readers = open_readers(data.shards, data.datasets, split, data.verify, stream, known=tuple(registry.cards))
    for name, count in data.trajectories.items() if split == "train" else ():
        if name not in readers:
            raise UserError(f"data.trajectories: no dataset {name!r} in this run. {nearest(name, sorted(readers))}")
        try:
            readers[name] = readers[name].restricted_to(count)
        except UserError as error:
            raise UserError(f"data.trajectories.{name}: {error}") from error
    return readers


def check_unrolls(recipe: Recipe, readers: Mapping[str, ShardReader]) -> None:
    """UserError where an unroll is of a dataset that is not trained on, or longer than all of its trajectories."""
    if recipe.finetune is None:
        return
    unknown = sorted(set(recipe.finetune.unroll_override) - set(readers))
    if unknown:
        known = ", ".join(sorted(readers))
        raise UserError(f"finetune.unroll_override: expected datasets of this run ({known}), got {unknown[0]!r}")
    for name, reader in readers.items():
        longest = max(reader.num_frames(trajectory) for trajectory in range(reader.num_trajectories))
        if longest < recipe.window_length(name):
            raise UserError(
                f"finetune.unroll_steps: {recipe.window_length(name) - 1} model steps take "
                f"{recipe.window_length(name)} frames, but the longest trajectory of {name} has {longest}; shorten "
                f"them, or for this dataset alone: finetune.unroll_override.{name}={longest - 1}"
            )


def build_model(recipe: Recipe, readers: Mapping[str, ShardReader], registry: Registry) -> Surrogate:
    """A new model, or when finetuning the pretrained one. UserError where recipe, shards and it do not fit together."""
    finetune, config = recipe.finetune, recipe.baseline or recipe.model
    specs = dataset_specs(readers, registry)
    if finetune is None:
        return new_model(config, specs, recipe.run.seed)
    pretrained = load_pretrained(finetune.pretrained)
    if config is not None and config != pretrained.config:
        raise UserError(
            f"model: the recipe's architecture is not that of {finetune.pretrained}.\n"
            f"Recipe: {config}\nPretrained: {pretrained.config}\nLeave the section out to take the pretrained one."
        )
    return pretrained.adapted_to(specs)


def new_model(config: ModelConfig | BaselineConfig | None, specs: Sequence[DatasetSpec], seed: int = 0) -> Surrogate:
    """A model with new weights: the baseline, or a WaveLiT, of the default sizes where the recipe gives none."""
    if isinstance(config, BaselineConfig):
        return Baseline(config, specs, seed)
    return WaveLiTFM(config or ModelConfig(), specs, seed)


def shard_digests(readers: Mapping[str, ShardReader]) -> dict[str, str]:
    """What a checkpoint remembers of the shards that it was trained on."""
    return {name: reader.manifest.digest for name, reader in readers.items()}


def check_same_shards(trained_on: Mapping[str, str], readers: Mapping[str, ShardReader], checkpoint: Path) -> None:
    """UserError where the shards are not those that a checkpoint was trained on."""
    digests = shard_digests(readers)
    changed = sorted(name for name in digests if trained_on.get(name) != digests[name])
    if changed or trained_on.keys() != digests.keys():
        names = changed or sorted(trained_on.keys() ^ digests.keys())
        raise UserError(
            f"{checkpoint}: trained on other shards of {', '.join(names)} than those of the recipe; the run would not "
            "see the same windows. Put the shards back, or start afresh with run.dir=... (finetune.pretrained "
            "takes the weights along)."
        )
