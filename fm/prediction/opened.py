"""The model that a command names, with the cards of its datasets."""

import hashlib
from dataclasses import dataclass

from data_pipeline.cards.registry import Registry, holds_cards, load_folders, load_registry
from data_pipeline.errors import UserError
from fm.checkpoint import load_pretrained
from fm.pretrained import EMA_FILE, WEIGHTS_FILE, locate
from fm.surrogate import Surrogate

CARDS = "cards"  # of an exported folder


@dataclass(frozen=True)
class Opened:
    """A trained model on the CPU, in evaluation mode."""

    name: str  # as it was asked for
    model: Surrogate
    registry: Registry
    weights: str  # SHA-256 of the weights' file


def open_model(name: str, registry: str | None = None) -> Opened:
    """A run directory, a checkpoint, an exported folder, or `hf://organisation/name`.

    Cards: those of `registry`, else the exported folder's own, else WAVELIT_REGISTRY's beside the package's. UserError
    where there is no model or its files do not fit together.
    """
    try:
        folder = locate(name)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    own = folder / CARDS
    cards = load_folders([own]) if registry is None and holds_cards(own) else load_registry(registry)
    model = load_pretrained(folder)
    assert model.origin is not None
    averaged = model.origin / EMA_FILE
    file = averaged if averaged.exists() else model.origin / WEIGHTS_FILE
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Opened(name, model, cards, digest)
