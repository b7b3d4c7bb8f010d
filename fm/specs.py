"""From the manifests of the shards to what the model must know of each dataset."""

from collections.abc import Mapping, Sequence

from data_pipeline.errors import UserError
from data_pipeline.reader import ShardReader
from data_pipeline.registry import Registry
from data_pipeline.shards import Manifest
from fm.model import MIN_GRID, DatasetSpec


def check_names(names: Sequence[str] | None, registry: Registry) -> None:
    """UserError, with the nearest valid name, where a dataset has no card. None means whatever the shards hold."""
    for name in names or ():
        registry.card(name)


def dataset_specs(readers: Mapping[str, ShardReader], registry: Registry) -> list[DatasetSpec]:
    """One spec per dataset, sorted by name.

    Raises UserError where the shards' channels are not those of the registry's card, or a grid is odd or too small.
    """
    for reader in readers.values():
        _check_channels(reader.manifest, registry)
        _check_grid(reader.manifest)
    return [
        DatasetSpec(
            name=name,
            state_channels=tuple(reader.manifest.state_channels),
            constant_channels=tuple(reader.manifest.constant_channels),
            boundary=reader.manifest.boundary,
            stats=reader.manifest.stats,
        )
        for name, reader in sorted(readers.items())
    ]


def _check_channels(manifest: Manifest, registry: Registry) -> None:
    card = registry.card(manifest.dataset)
    for role, found, expected in (
        ("state", manifest.state_channels, card.state_channels),
        ("constant", manifest.constant_channels, card.constant_channels),
    ):
        if tuple(found) != tuple(expected):
            raise UserError(
                f"{manifest.dataset}: the shards hold the {role} channels {', '.join(found) or 'none'}, the registry's "
                f"card expects {', '.join(expected) or 'none'}. Make the shards again with `data-pipeline shard`."
            )


def _check_grid(manifest: Manifest) -> None:
    if any(size % 2 or size < MIN_GRID for size in manifest.grid):
        raise UserError(
            f"{manifest.dataset}: the shards have a grid of {manifest.grid[0]} x {manifest.grid[1]}; the wavelet "
            f"tokens need an even number of at least {MIN_GRID} points along both axes."
        )
