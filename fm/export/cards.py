"""The cards of a model's datasets as a registry folder of their own, so that another machine needs none of its own."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from data_pipeline.cards.registry import Channel, Registry, load_registry, packaged_folder, user_folders
from data_pipeline.errors import UserError


def card_files(names: Sequence[str], directory: str | None, trained_with: Mapping[str, Any]) -> dict[str, bytes]:
    """channels.yaml and datasets/<name>.yaml by path. The cards are copied; channels.yaml has the channels they use.

    `directory` is the recipe's data.registry, `trained_with` the registry that a checkpoint remembers. UserError where
    a card is missing, or names other channels or boundaries than it did then.
    """
    registry = load_registry(directory)
    now = registry.snapshot()["cards"]
    folders = [packaged_folder(), *user_folders(directory)]
    files = {}
    for name in names:
        registry.card(name)  # there is one
        file = _file(folders, name)
        if now[name] != trained_with["cards"].get(name):
            raise UserError(
                f"{file}: fields or boundary are not those that the model was trained with; put the card of then back "
                f"(fields then: {trained_with['cards'].get(name)})"
            )
        files[f"datasets/{name}.yaml"] = file.read_bytes()
    used = {channel for name in names for field in registry.card(name).fields for channel in field.channels}
    return {"channels.yaml": _channels(registry, used), **files}


def channel_cards(registry: Registry, names: Iterable[str]) -> dict[str, Channel]:
    """The named channels, and those that they duplicate, in the registry's order."""
    wanted = set(names)
    wanted |= {twin for name in wanted if (twin := registry.channel_cards[name].duplicate_of) is not None}
    return {name: channel for name, channel in registry.channel_cards.items() if name in wanted}


def _channels(registry: Registry, used: Iterable[str]) -> bytes:
    content = {}
    for name, channel in channel_cards(registry, used).items():
        twin = {"duplicate_of": channel.duplicate_of} if channel.duplicate_of else {}
        content[name] = {"description": channel.description, "unit": channel.unit, **twin}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode()


def _file(folders: Sequence[Traversable], name: str) -> Traversable:
    files = [folder / "datasets" / f"{name}.yaml" for folder in folders]
    return next(file for file in files if file.is_file())
