"""From the manifests of the shards to what the model must know of each dataset."""

from collections.abc import Mapping, Sequence

from torch import nn

from data_pipeline.cards.registry import Card, Registry
from data_pipeline.errors import UserError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.windows.reader import ShardReader
from fm.model import MIN_GRID, DatasetSpec


def check_names(names: Sequence[str] | None, registry: Registry) -> None:
    """UserError, with the nearest valid name, where a dataset has no card. None means whatever the shards hold."""
    for name in names or ():
        registry.card(name)


def dataset_specs(readers: Mapping[str, ShardReader], registry: Registry) -> list[DatasetSpec]:
    """One spec per dataset, sorted by name.

    Raises UserError where the shards' channels are not those of the registry's card, where a grid is odd or too small,
    and for names that torch does not take.
    """
    for reader in readers.values():
        card = registry.card(reader.manifest.dataset)
        check_channels(reader, card.state_channels, card.constant_channels, "the registry's card names")
        _check_grid(reader.manifest)
        _check_free(card)
    return [
        DatasetSpec(
            name=name,
            state_channels=tuple(reader.manifest.state_channels),
            constant_channels=tuple(reader.manifest.constant_channels),
            boundary=reader.manifest.boundary,
            stats=reader.manifest.stats,
            grid=reader.manifest.grid,
            dt=_common_dt(reader.manifest),
        )
        for name, reader in sorted(readers.items())
    ]


def check_channels(reader: ShardReader, state: Sequence[str], constant: Sequence[str], says: str) -> None:
    """UserError unless the shards hold exactly these channels in this order; `says` tells whose channels they are."""
    manifest = reader.manifest
    for role, found, expected in (
        ("state", manifest.state_channels, state),
        ("constant", manifest.constant_channels, constant),
    ):
        if tuple(found) != tuple(expected):
            raise UserError(
                f"{reader.folder}: the shards hold the {role} channels {', '.join(found) or 'none'}, but {says} the "
                f"{role} channels {', '.join(expected) or 'none'}. Make the shards again with `data-pipeline shard`."
            )


def _common_dt(manifest: Manifest) -> float | None:
    """The time between frames, or None where it differs from trajectory to trajectory."""
    steps = [trajectory.dt for trajectory in manifest.trajectories]
    return steps[0] if max(steps) - min(steps) <= 1e-4 * abs(steps[0]) else None


def _check_grid(manifest: Manifest) -> None:
    if any(size % 2 or size < MIN_GRID for size in manifest.grid):
        raise UserError(
            f"{manifest.dataset}: the shards have a grid of {manifest.grid[0]} x {manifest.grid[1]}; the wavelet "
            f"tokens need an even number of at least {MIN_GRID} points along both axes."
        )


def _check_free(card: Card) -> None:
    """Parts of the model carry the names of datasets and channels, so these may not be what torch calls its methods."""
    for what, names in (("dataset", (card.name,)), ("channel", card.state_channels + card.constant_channels)):
        for name in names:
            if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name == "training":
                raise UserError(
                    f"{card.name}: the {what} {name!r} has the name of a method of torch's modules. Rename it in the "
                    "card and make the shards again with `data-pipeline shard`."
                )
