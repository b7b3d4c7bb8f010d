"""The folder of an extended model: model.json, model.safetensors, the cards of its datasets, where it comes from.

`cards/` is a registry folder of its own (channels.yaml, datasets/<name>.yaml) with all that the model knows, so that it
means the same where the folders that it was made from are not at hand.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.cards.card import Card, Channel
from data_pipeline.cards.registry import load_folders
from data_pipeline.errors import UserError
from data_pipeline.files import sync_directory
from data_pipeline.strict_yaml import MAX_TEXT
from fm.surrogate import Surrogate

CARDS = "cards"
LINEAGE_FILE = "extension.json"


def check_absent(out: Path) -> None:
    """UserError where something is already in the way."""
    if out.exists():
        raise UserError(f"--out {out}: expected a folder that is not there yet; remove it, or choose another")


def write_folder(
    out: Path, model: Surrogate, sources: Sequence[Sequence[Traversable]], lineage: Mapping[str, Any]
) -> list[str]:
    """Write the folder whole or not at all; returns the datasets that have a card in none of the `sources`.

    `sources` are registries, each the folders that make one; the first that has a card counts. UserError where `out` is
    there already or cannot be written.
    """
    with _written_whole(out) as folder:
        model.save_pretrained(folder)
        missing = _write_cards(folder / CARDS, list(model.specs), sources)
        (folder / LINEAGE_FILE).write_text(json.dumps(lineage, indent=1, allow_nan=False) + "\n")
    return missing


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its name when the block ends without an error."""
    check_absent(out)
    temporary = out.with_name(f".writing_{out.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_cards(folder: Path, datasets: Sequence[str], sources: Sequence[Sequence[Traversable]]) -> list[str]:
    """Copy the cards of the datasets and write the channels they name; returns the datasets without a card."""
    (folder / "datasets").mkdir(parents=True)
    missing, channels = list(datasets), dict[str, Channel]()
    for folders in sources:
        registry = load_folders(folders)
        for name in [name for name in missing if name in registry.cards]:
            for channel in _named_channels(registry.cards[name], registry.channel_cards):
                channels.setdefault(channel.name, channel)
            file = next(f / "datasets" / f"{name}.yaml" for f in folders if (f / "datasets" / f"{name}.yaml").is_file())
            (folder / "datasets" / f"{name}.yaml").write_bytes(file.read_bytes())
            missing.remove(name)
    (folder / "channels.yaml").write_text(_channels_text(channels.values()), encoding="utf-8")
    return missing


def _named_channels(card: Card, described: Mapping[str, Channel]) -> list[Channel]:
    """The card's channels, and those that they are duplicates of, in the registry's order: these stand further up."""
    named: set[str] = set()
    open_names: set[str | None] = {*card.state_channels, *card.constant_channels}
    while found := {name for name in open_names if name is not None} - named:
        named |= found
        open_names = {described[name].duplicate_of for name in found}
    return [channel for name, channel in described.items() if name in named]


def _channels_text(channels: Iterable[Channel]) -> str:
    """A channels.yaml, one line a channel."""
    entries = {channel.name: {k: v for k, v in asdict(channel).items() if k != "name" and v} for channel in channels}
    return yaml.safe_dump(entries, default_flow_style=None, sort_keys=False, allow_unicode=True, width=MAX_TEXT)
