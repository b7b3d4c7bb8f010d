"""What a person writes down about data: canonical channels, and cards, one YAML file per dataset.

A canonical channel is one physical quantity under one name for all datasets (paper section 3.5). A card maps the fields
of the dataset's HDF5 files to canonical channels and states what is known about the data.

Which datasets there are: the cards that come with the package, and those in folders of the user's own.

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

from data_pipeline import schema
from data_pipeline.files import UserError
from data_pipeline.schema import Node

BOUNDARY_TYPES = ("WALL", "OPEN", "PERIODIC")
CHANNELS_PER_ORDER = (1, 2, 4)  # scalar; x, y; xx, xy, yx, yy
PATCH = 2 * 2  # grid points per token: one level of the wavelet transform halves each axis
CONSERVED = {"mean": None, "mean_square": None, "divergence": 2}  # kind -> how many channels it is of; None: any

Boundary = tuple[tuple[str, str], tuple[str, str]]  # ((x lower, x upper), (y lower, y upper))
Domain = tuple[tuple[float, float], tuple[float, float]]  # (lower, upper end) of x, of y, in physical units
Range = tuple[float | None, float | None]  # lowest and highest value, both included; None: no limit


@dataclass(frozen=True)
class Channel:
    """One canonical channel."""

    name: str
    description: str
    unit: str
    duplicate_of: str | None  # the channel that holds the same values: the other half of a symmetric tensor


@dataclass(frozen=True)
class Field:
    """A field of the dataset's files: its tensor order (0, 1, 2), its role and its channels (x, y; xx, xy, yx, yy)."""

    name: str
    order: int
    role: str  # "state" or "constant"
    channels: tuple[str, ...]


@dataclass(frozen=True)
class Conserved:
    """A quantity that the equations keep as it was.

    `mean`: the mean over the grid of each channel; `mean_square`: that of the sum of the channels' squares;
    `divergence`: of the velocity (x, y), which is 0.
    """

    kind: str
    channels: tuple[str, ...]


@dataclass(frozen=True)
class PublishedTable:
    """VRMSE figures of others for one dataset, with the table they stand in and the protocol they follow."""

    table: str
    protocol: str
    vrmse: Mapping[str, Mapping[str, float]]  # window -> model -> VRMSE
    context: int = 1  # frames that the models saw


@dataclass(frozen=True)
class Card:
    """What is known about one dataset."""

    name: str  # official name
    abbreviation: str  # the name where the card gives none
    description: str
    equations: str
    fields: tuple[Field, ...]  # state then constant, each in the Well's order: t0, t1, t2
    scalars: tuple[str, ...]  # constant scalars of a file
    boundary: Boundary
    grid: tuple[int, int]  # published points along x and y
    dt: float | None  # time between frames; None: differs from file to file
    train: tuple[tuple[int, int], ...]  # published training split: (trajectories, frames of each); () if not known
    source: str  # where the data come from; "" where the card does not say
    citation: str
    license: str
    quirks: tuple[str, ...]
    ranges: Mapping[str, Range]  # channel -> the values that good data lie within; not every channel has one
    published: tuple[PublishedTable, ...]
    domain: Domain | None = None  # what the published grid covers; None where the card does not say
    test_trajectories: int | None = None  # of the published test split; None if not known
    conserved: tuple[Conserved, ...] = ()

    @property
    def state_fields(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.role == "state")

    @property
    def constant_fields(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.role == "constant")

    @property
    def state_channels(self) -> tuple[str, ...]:
        return tuple(channel for field in self.state_fields for channel in field.channels)

    @property
    def constant_channels(self) -> tuple[str, ...]:
        return tuple(channel for field in self.constant_fields for channel in field.channels)

    @property
    def tokens(self) -> int:
        """Tokens of one published frame."""
        return self.grid[0] * self.grid[1] // PATCH

    @property
    def num_frames(self) -> tuple[int, ...]:
        """The trajectory lengths that occur, shortest first."""
        return tuple(sorted({frames for _, frames in self.train}))

    @property
    def windows(self) -> int:
        """Published training examples: pairs of neighbouring frames."""
        return sum(trajectories * (frames - 1) for trajectories, frames in self.train)

    def published_scores(self, protocol: str, window: str) -> dict[str, float]:
        """VRMSE by model of all published tables that follow `protocol` and report `window`; empty if none does."""
        tables = [table for table in self.published if table.protocol == protocol]
        return {model: score for table in tables for model, score in table.vrmse.get(window, {}).items()}

    def check_fields(self, state: Mapping[str, int], constants: Mapping[str, int], where: str) -> None:
        """Compares the fields of a file (name -> tensor order) with the card's; `where` names file and dataset.

        Raises UserError with both lists if a field is missing, unknown, of another order or of another role.
        """
        for role, found in (("state", state), ("constant", constants)):
            named = {field.name: field.order for field in self.fields if field.role == role}
            if found != named:
                raise UserError(
                    f"{where}: its {role} fields are not those of the card {self.name!r}.\n"
                    f"  the card names: {_listing(named)}\n"
                    f"  the file holds: {_listing(found)}\n"
                    f"  {_difference(named, found)}\n"
                    f"Use the files of {self.name}, or write a card that names the fields these files hold."
                )


REQUIRED = ("name", "description", "state", "boundary", "grid", "dt")
PROSE = ("equations", "source", "citation", "license")
OPTIONAL = (
    *("abbreviation", "constant", "scalars", "domain", "train", "test_trajectories", "ranges", "conserved", "quirks"),
    *("published", *PROSE),
)


def read_channels(root: Node, known: Mapping[str, Channel]) -> dict[str, Channel]:
    """The channels of one channels.yaml, by name; `duplicate_of` names one of `known` or one further up in the file."""
    channels: dict[str, Channel] = {}
    for key, node in root.entries().items():
        Node(key, root.file, node.path).name()
        entry = node.record(required=("description", "unit"), optional=("duplicate_of",))
        above = [*known, *channels]
        twin = entry["duplicate_of"].choice(above, "a channel listed above") if "duplicate_of" in entry else None
        channels[key] = Channel(key, entry["description"].text(), entry["unit"].text(), twin)
    return channels


def read_card(root: Node, name: str, channels: Mapping[str, Channel]) -> Card:
    """The card of the dataset `name`, checked. Raises UserError naming file, key path and value."""
    node = root.record(REQUIRED, OPTIONAL)
    if node["name"].name() != name:
        node["name"].fail(f"the name of the file, {name!r}", "Rename one of them.")
    state = _fields(node["state"], "state", channels)
    constant = _fields(node["constant"], "constant", channels) if "constant" in node else []
    _check_unique(root, state + constant)
    prose = {key: node[key].text() if key in node else "" for key in PROSE}
    return Card(
        name=name,
        abbreviation=node["abbreviation"].name() if "abbreviation" in node else name,
        description=node["description"].text(),
        fields=(*state, *constant),
        scalars=_scalars(node["scalars"]) if "scalars" in node else (),
        boundary=_boundary(node["boundary"]),
        grid=_grid(node["grid"]),
        dt=None if node["dt"].value is None else node["dt"].number(),
        train=_train(node["train"]) if "train" in node else (),
        ranges=_ranges(node["ranges"], (*state, *constant)) if "ranges" in node else {},
        quirks=tuple(item.text() for item in node["quirks"].elements()) if "quirks" in node else (),
        published=tuple(_published(item) for item in node["published"].elements()) if "published" in node else (),
        domain=_domain(node["domain"]) if "domain" in node else None,
        test_trajectories=node["test_trajectories"].count() if "test_trajectories" in node else None,
        conserved=_conserved(node["conserved"], state) if "conserved" in node else (),
        **prose,
    )


def _fields(node: Node, role: str, channels: Mapping[str, Channel]) -> list[Field]:
    groups = node.record((), ("t0", "t1", "t2"))
    found = []
    for order, size in enumerate(CHANNELS_PER_ORDER):
        for name, entry in groups[f"t{order}"].entries().items() if f"t{order}" in groups else ():
            Node(name, node.file, entry.path).name()
            items = entry.elements(size)
            names = tuple(item.choice(channels, "a canonical channel (channels.yaml)") for item in items)
            found.append(Field(name, order, role, names))
    if not found:
        node.fail("at least one field", "Write t0, t1 or t2, each a mapping from field to its list of channels.")
    return found


def _check_unique(root: Node, fields: Sequence[Field]) -> None:
    seen: dict[str, str] = {}
    for field in fields:
        path = f"{field.role}.t{field.order}.{field.name}"
        for what, name in [("field", field.name), *(("channel", channel) for channel in field.channels)]:
            first = seen.setdefault(f"{what} {name}", path)
            if first != path or field.channels.count(name) > 1:
                raise UserError(f"{root.file}: {path}: {what} {name!r} is already used by {first}. Use each once.")


def _scalars(node: Node) -> tuple[str, ...]:
    names = tuple(item.name() for item in node.elements())
    if len(set(names)) < len(names):
        node.fail("names of scalars, each once")
    return names


def _boundary(node: Node) -> Boundary:
    axes = node.record(("x", "y"))
    pairs = []
    for axis in ("x", "y"):
        lower, upper = (side.choice(BOUNDARY_TYPES, "a boundary type") for side in axes[axis].elements(2))
        if (lower == "PERIODIC") != (upper == "PERIODIC"):
            axes[axis].fail("PERIODIC at both ends or at neither")
        pairs.append((lower, upper))
    return pairs[0], pairs[1]


def _grid(node: Node) -> tuple[int, int]:
    x, y = (size.count(2) for size in node.elements(2))
    return x, y


def _domain(node: Node) -> Domain:
    axes = node.record(("x", "y"))
    ends = []
    for axis in ("x", "y"):
        lower, upper = (end.real() for end in axes[axis].elements(2))
        if lower >= upper:
            axes[axis].fail("the lower end first, [lower, upper]")
        ends.append((lower, upper))
    return ends[0], ends[1]


def _conserved(node: Node, state: Sequence[Field]) -> tuple[Conserved, ...]:
    own = [channel for field in state for channel in field.channels]
    found = []
    for item in node.elements():
        entry = item.record(("kind", "channels"))
        kind = entry["kind"].choice(CONSERVED, "a kind of conserved quantity")
        names = tuple(one.choice(own, "a state channel of this card") for one in entry["channels"].elements())
        if not names or len(set(names)) < len(names):
            entry["channels"].fail("at least one channel, each once")
        if CONSERVED[kind] not in (None, len(names)):
            entry["channels"].fail("the two channels of a velocity, x then y")
        found.append(Conserved(kind, names))
    return tuple(found)


def _ranges(node: Node, fields: Sequence[Field]) -> dict[str, Range]:
    own = [channel for field in fields for channel in field.channels]
    ranges: dict[str, Range] = {}
    for key, entry in node.entries().items():
        Node(key, node.file, entry.path).choice(own, "a channel of this card")
        ends = entry.elements(2)
        lowest, highest = (None if end.value is None else end.real() for end in ends)
        if lowest is None and highest is None:
            entry.fail("at least one limit, [lowest or null, highest or null]")
        if lowest is not None and highest is not None and lowest > highest:
            entry.fail("the lowest value first")
        ranges[key] = lowest, highest
    return ranges


def _train(node: Node) -> tuple[tuple[int, int], ...]:
    groups = []
    for item in node.elements():
        group = item.record(("trajectories", "frames"))
        groups.append((group["trajectories"].count(), group["frames"].count(2)))
    if not groups:
        node.fail("at least one group of trajectories", "Write - {trajectories: 90, frames: 101}.")
    return tuple(groups)


def _published(node: Node) -> PublishedTable:
    entries = node.entries()
    windows = [key for key in entries if key not in ("table", "protocol", "context")]
    node.record(("table", "protocol"), ("context", *windows))
    vrmse = {
        window: {model: score.number() for model, score in entries[window].entries().items()} for window in windows
    }
    context = entries["context"].count() if "context" in entries else 1
    return PublishedTable(entries["table"].text(), entries["protocol"].name(), vrmse, context)


def _listing(fields: Mapping[str, int]) -> str:
    return ", ".join(f"{_shown(name)} (t{order})" for name, order in fields.items()) or "none"


def _difference(named: Mapping[str, int], found: Mapping[str, int]) -> str:
    parts = {
        "missing": [name for name in named if name not in found],
        "unknown": [name for name in found if name not in named],
        "of another tensor order": [name for name in named if name in found and named[name] != found[name]],
    }
    return "; ".join(f"{what}: {', '.join(map(_shown, names))}" for what, names in parts.items() if names)


def _shown(name: str) -> str:
    """A file may hold names that a terminal should not print as they are."""
    return name if name.isprintable() else ascii(name)


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
                f"dataset {name!r}: no card of this name. {schema.nearest(name, self.cards)} Cards of your own "
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
            card = read_card(schema.load(file), file.name.removesuffix(".yaml"), channels)
            for key, name in (("name", card.name), ("abbreviation", card.abbreviation)):
                if taken.setdefault(name, file) is not file:
                    raise UserError(f"{file}: {key}: {name!r} is taken by {taken[name]}. Choose another.")
            cards[card.name] = card
    return Registry(channels, dict(sorted(cards.items())))


def _add_channels(file: Traversable, channels: dict[str, Channel], origin: dict[str, str]) -> None:
    """Adds the file's channels; the same channel may stand in several folders, so that folders can be combined."""
    for name, channel in read_channels(schema.load(file), channels).items():
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
