"""The cards of a model's datasets as a registry folder of their own, so that another machine needs none of its own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from data_pipeline.cards.registry import Card, Channel, Registry, load_folders
from data_pipeline.errors import UserError
from fm.artefact import is_artefact
from fm.checkpoint import read_state


@dataclass(frozen=True)
class Cards:
    """The cards of some datasets."""

    registry: Registry  # of these datasets and the channels they name, and of no others
    origins: Mapping[str, Traversable]  # dataset -> the file that its card is in

    def files(self) -> dict[str, bytes]:
        """channels.yaml and datasets/<name>.yaml by path: the cards byte for byte, comments and all."""
        cards = {f"datasets/{name}.yaml": file.read_bytes() for name, file in self.origins.items()}
        return {"channels.yaml": _channels_text(self.registry.channel_cards.values()), **cards}

    def check_unchanged(self, datasets: Iterable[str], checkpoint: Path) -> None:
        """UserError where a card names other channels or boundaries than when `checkpoint` was trained.

        The cards of an exported model came along with it and are always those.
        """
        if is_artefact(checkpoint):
            return
        then, now = read_state(checkpoint)["registry"]["cards"], self.registry.snapshot()["cards"]
        for name in datasets:
            if now[name] != then.get(name):
                raise UserError(
                    f"{self.origins[name]}: fields or boundary are not those that the model was trained with; put the "
                    f"card of then back (fields then: {then.get(name)})"
                )


def find_cards(sources: Sequence[tuple[Iterable[str], Sequence[Traversable]]]) -> Cards:
    """The cards of all the datasets that are named.

    `sources` are names, and the folders of the registry that may have their cards: a card is the first source's that is
    asked for it and has it, and so is what a channel means. UserError where no source has a card.
    """
    cards: dict[str, Card] = {}
    channels: dict[str, Channel] = {}
    origins: dict[str, Traversable] = {}
    for names, folders in sources:
        registry = load_folders(folders)
        found = sorted(set(names) & registry.cards.keys() - cards.keys())
        for name in found:
            cards[name] = registry.cards[name]
            origins[name] = next(file for folder in folders if (file := folder / "datasets" / f"{name}.yaml").is_file())
        for channel in _named_channels([cards[name] for name in found], registry.channel_cards):
            channels.setdefault(channel.name, channel)
    for name in {name for names, _ in sources for name in names} - cards.keys():
        registry.card(name)  # there is none, and says so
    return Cards(Registry(channels, dict(sorted(cards.items()))), dict(sorted(origins.items())))


def _named_channels(cards: Iterable[Card], described: Mapping[str, Channel]) -> list[Channel]:
    """The cards' channels, and those that they are duplicates of, in the registry's order: these stand further up."""
    named: set[str] = set()
    found = {channel for card in cards for field in card.fields for channel in field.channels}
    while found:
        named |= found
        found = {twin for name in found if (twin := described[name].duplicate_of) is not None} - named
    return [channel for name, channel in described.items() if name in named]


def _channels_text(channels: Iterable[Channel]) -> bytes:
    content = {}
    for channel in channels:
        twin = {"duplicate_of": channel.duplicate_of} if channel.duplicate_of else {}
        content[channel.name] = {"description": channel.description, "unit": channel.unit, **twin}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode()
