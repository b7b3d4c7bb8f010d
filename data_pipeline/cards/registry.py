"""Which datasets there are: the cards that come with the package, and those in folders of the user's own.

A user's folder holds `channels.yaml` (canonical channels that the package does not have) and `datasets/<name>.yaml`
(cards), either or both. Several folders add up; nothing that is already there can be redefined.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from data_pipeline import strict_yaml
from data_pipeline.cards.card import BOUNDARY_TYPES, Boundary, Card, Channel, Field, read_card, read_channels
from data_pipeline.errors import UserError

__all__ = ["BOUNDARY_TYPES", "Boundary", "Card", "Channel", "Field", "Registry", "load_registry", "user_folders"]

VARIABLE = "WAVELIT_REGISTRY"


@dataclass(frozen=True)
class Registry:
    """The canonical channels and the cards."""

    channel_cards: Mapping[str, Channel]  # in the order of channels.yaml, the package's first
    cards: Mapping[str, Card]  # by dataset name, sorted

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.channel_cards)

    def card(self, name: str) -> Card:
        if name not in self.cards:
            raise UserError(
                f"dataset {name!r}: no card of this name. {strict_yaml.nearest(name, self.cards)} Cards of your own "
                f"are found through --registry, data.registry or {VARIABLE}; `data-pipeline register` drafts one."
            )
        return self.cards[name]

    def select(self, names: Sequence[str] | None) -> list[Card]:
        """The named cards, each once, sorted by name; None means all."""
        return [self.card(name) for name in sorted(set(self.cards if names is None else names))]

    def snapshot(self) -> dict[str, Any]:
        """What a trained model depends on, as JSON: channels, fields, boundaries. Prose and counts stay out."""
        cards = {
            card.name: {
                "fields": [[field.name, field.order, field.role, list(field.channels)] for field in card.fields],
                "boundary": [list(sides) for sides in card.boundary],
            }
            for card in self.cards.values()
        }
        return {"channels": list(self.channels), "cards": cards}


def load_registry(directory: str | Path | None = None) -> Registry:
    """The packaged cards, and those of the user's folders: `directory`, else WAVELIT_REGISTRY, else none.

    Several folders are separated as in PATH. Raises UserError, naming file, key path and value, for anything that is
    not a valid card, for a folder that is not there or holds no cards, and for a name that is taken.
    """
    return load_folders([packaged_folder(), *user_folders(directory)])


def packaged_folder() -> Traversable:
    return files("data_pipeline") / "cards"


def user_folders(directory: str | Path | None = None) -> list[Path]:
    """The user's folders, in the order they are read; UserError for one that is not there or holds no cards."""
    given = str(directory) if directory is not None else os.environ.get(VARIABLE, "")
    folders = [Path(part) for part in given.split(os.pathsep) if part]
    for folder in folders:
        if not holds_cards(folder):
            raise UserError(
                f"{folder}: expected a folder of your own cards (channels.yaml, datasets/<name>.yaml), found "
                f"{'neither in it' if folder.is_dir() else 'no folder'}. It is named by "
                f"{'--registry or data.registry' if directory is not None else VARIABLE}."
            )
    return folders


def holds_cards(folder: Path) -> bool:
    return (folder / "channels.yaml").is_file() or (folder / "datasets").is_dir()


def load_folders(folders: Sequence[Traversable]) -> Registry:
    """One registry from the `channels.yaml` and `datasets/*.yaml` of folders; the later ones add to the earlier."""
    channels: dict[str, Channel] = {}
    origin: dict[str, str] = {}  # channel -> the file it comes from
    for folder in folders:
        if (folder / "channels.yaml").is_file():
            _add_channels(folder / "channels.yaml", channels, origin)
    cards: dict[str, Card] = {}
    taken: dict[str, Traversable] = {}  # name or abbreviation -> the card's file
    for folder in folders:
        for file in _card_files(folder):
            card = read_card(strict_yaml.load(file), file.name.removesuffix(".yaml"), channels)
            for key, name in (("name", card.name), ("abbreviation", card.abbreviation)):
                if taken.setdefault(name, file) is not file:
                    raise UserError(f"{file}: {key}: {name!r} is taken by {taken[name]}. Choose another.")
            cards[card.name] = card
    return Registry(channels, dict(sorted(cards.items())))


def _add_channels(file: Traversable, channels: dict[str, Channel], origin: dict[str, str]) -> None:
    """Adds the file's channels; the same channel may stand in several folders, so that folders can be combined."""
    for name, channel in read_channels(strict_yaml.load(file), channels).items():
        first = channels.setdefault(name, channel)
        if first != channel:
            raise UserError(
                f"{file}: {name}: a channel of this name, with another description, unit or duplicate_of, is in "
                f"{origin[name]}. If it is the same quantity, leave it out here; if not, give it another name."
            )
        origin.setdefault(name, str(file))


def _card_files(folder: Traversable) -> list[Traversable]:
    datasets = folder / "datasets"
    if not datasets.is_dir():
        return []
    return sorted((file for file in datasets.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
