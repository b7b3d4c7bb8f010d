"""The registry: canonical channels, and a card for each dataset.

A canonical channel is one physical quantity under one name for all datasets (paper section 3.5). A card describes one
dataset: it maps the fields of the HDF5 files to canonical channels and holds what is known about the data. `Card` is
also the format of the YAML file: `datasets/<name>.yaml` has the same keys, `channels.yaml` has the channels. The
package has cards of the eight datasets and of extras. The user's folders add channels and cards, and redefine none.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

from data_pipeline.errors import UserError
from data_pipeline.schema import (
    Count,
    Key,
    Line,
    Mismatch,
    Name,
    Positive,
    Real,
    Stored,
    Strict,
    at_least,
    checked_list,
    choice,
    nearest,
    read_yaml,
    validate,
)
from data_pipeline.symmetries import Symmetries, check_symmetries

BOUNDARY_TYPES = ("WALL", "OPEN", "PERIODIC")
PATCH = 2 * 2  # grid points per token: one level of the wavelet transform halves each axis
CONSERVED = {"mean": None, "mean_square": None, "divergence": 2}  # kind -> how many channels it is of; None: any


@dataclass(frozen=True)
class Channel:
    """One canonical channel."""

    name: str
    description: str
    unit: str
    duplicate_of: str | None  # the channel that holds the same values: the other half of a symmetric tensor


@dataclass(frozen=True)
class _ChannelEntry(Strict):
    description: Line
    unit: Line
    duplicate_of: str | None = None


@dataclass(frozen=True)
class Field:
    """A field of the dataset's files: its tensor order (0, 1, 2), its role and its channels (x, y; xx, xy, yx, yy)."""

    name: str
    order: int
    role: str  # "state" or "constant"
    channels: tuple[str, ...]


@dataclass(frozen=True)
class _FieldsByOrder(Strict):
    """Fields as a card lists them: field -> canonical channels, by tensor order."""

    t0: dict[Name, tuple[str]] = field(default_factory=dict)
    t1: dict[Name, tuple[str, str]] = field(default_factory=dict)
    t2: dict[Name, tuple[str, str, str, str]] = field(default_factory=dict)

    def with_role(self, role: str) -> tuple[Field, ...]:
        groups: tuple[Mapping[str, tuple[str, ...]], ...] = (self.t0, self.t1, self.t2)
        found = [Field(name, t, role, channels) for t, group in enumerate(groups) for name, channels in group.items()]
        if not found:
            raise Mismatch("at least one field", "Write t0, t1 or t2, each a mapping from field to a list of channels.")
        return tuple(found)


Side = Annotated[str, choice(BOUNDARY_TYPES, "a boundary type")]
Ends = Annotated[
    tuple[Side, Side], checked_list(lambda ends: ends.count("PERIODIC") != 1, "PERIODIC at both ends or at neither")
]
Interval = Annotated[
    tuple[Real, Real], checked_list(lambda ends: ends[0] < ends[1], "the lower end first, [lower, upper]")
]


@dataclass(frozen=True)
class _Sides(Strict):
    x: Ends
    y: Ends


@dataclass(frozen=True)
class _Extent(Strict):
    x: Interval
    y: Interval


@dataclass(frozen=True)
class _Trajectories(Strict):
    trajectories: Count
    frames: Annotated[int, at_least(2)]


# Types as the code uses them. Where the file has another form, Stored names it and converts.
Fields = tuple[Field, ...]
Boundary = tuple[tuple[Side, Side], tuple[Side, Side]]  # ((x lower, x upper), (y lower, y upper))
Domain = tuple[Interval, Interval]  # (lower, upper end) of x, of y, in physical units
Range = Annotated[  # both included; None: no limit
    tuple[Real | None, Real | None],
    checked_list(lambda ends: ends != (None, None), "at least one limit, [lowest or null, highest or null]"),
    checked_list(lambda ends: None in ends or ends[0] <= ends[1], "the lowest value first"),
]


@dataclass(frozen=True)
class Conserved(Strict):
    """A quantity that the equations conserve.

    `mean`: of each channel over the grid. `mean_square`: the mean over the grid of the channels' sum of squares.
    `divergence`: of the velocity (x, y), which is 0.
    """

    kind: Annotated[str, choice(CONSERVED, "a kind of conserved quantity")]
    channels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.channels or len(set(self.channels)) < len(self.channels):
            raise Mismatch("at least one channel, each once", at=("channels",))
        if CONSERVED[self.kind] not in (None, len(self.channels)):
            raise Mismatch("the two channels of a velocity, x then y", at=("channels",))


class PublishedTable(BaseModel):
    """VRMSE figures of others for one dataset, with the table they stand in and the protocol they follow.

    Every other key is a window: a mapping from model to VRMSE.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[Key, dict[Key, Positive]]

    table: Line
    protocol: Name
    context: Count = 1  # frames that the models saw
    inferred: dict[Key, dict[Key, Positive]] = {}  # window -> model -> a number that the source has lost

    @property
    def vrmse(self) -> Mapping[str, Mapping[str, float]]:
        """VRMSE by window, then by model."""
        return self.__pydantic_extra__


@dataclass(frozen=True)
class Card(Strict):
    """What is known about one dataset."""

    name: Name  # official name
    description: Line
    state: Annotated[Fields, Stored(_FieldsByOrder, lambda one: one.with_role("state"))]  # in the order t0, t1, t2
    boundary: Annotated[Boundary, Stored(_Sides, lambda sides: (sides.x, sides.y))]
    grid: tuple[Annotated[int, at_least(2)], Annotated[int, at_least(2)]]  # published points along x and y
    dt: Positive | None  # time between frames; None: differs from file to file
    constant: Annotated[Fields, Stored(_FieldsByOrder, lambda one: one.with_role("constant"))] = ()
    scalars: Annotated[  # constant scalars of a file
        tuple[Name, ...], checked_list(lambda names: len(set(names)) == len(names), "names of scalars, each once")
    ] = ()
    abbreviation: Name = ""  # the name where the card gives none
    equations: Line = ""
    symmetries: Symmetries = ()  # that training may transform windows by (data_pipeline/symmetries.py)
    domain: Annotated[Domain, Stored(_Extent, lambda grid: (grid.x, grid.y))] | None = None  # of the published grid
    train: Annotated[  # published training split: (trajectories, frames of each); () if not known
        tuple[tuple[int, int], ...],
        Stored(tuple[_Trajectories, ...], lambda groups: tuple((one.trajectories, one.frames) for one in groups)),
        checked_list(len, "at least one group of trajectories", "Write - {trajectories: 90, frames: 101}."),
    ] = ()
    test_trajectories: Count | None = None  # of the published test split; None if not known
    ranges: dict[str, Range] = field(default_factory=dict)  # channel -> the values that good data lie within
    conserved: tuple[Conserved, ...] = ()
    quirks: tuple[Line, ...] = ()
    published: tuple[PublishedTable, ...] = ()
    extra: bool = False  # beyond the paper's eight: "all datasets" leaves it out
    source: Line = ""  # where the data come from
    citation: Line = ""
    license: Line = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "abbreviation", self.abbreviation or self.name)

    @property
    def fields(self) -> Fields:
        """State fields, then constant fields."""
        return self.state + self.constant

    @property
    def state_channels(self) -> tuple[str, ...]:
        """Channels of the state fields, in the fields' order."""
        return tuple(channel for field in self.state for channel in field.channels)

    @property
    def constant_channels(self) -> tuple[str, ...]:
        """Channels of the constant fields, in the fields' order."""
        return tuple(channel for field in self.constant for channel in field.channels)

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
        """Published training examples: pairs of neighboring frames."""
        return sum(trajectories * (frames - 1) for trajectories, frames in self.train)

    def check_fields(self, state: Mapping[str, int], constants: Mapping[str, int], where: str) -> None:
        """Compare the fields of a file (name -> tensor order) with the card's; `where` names file and dataset.

        UserError with both lists if a field is missing, unknown, of another order or of another role.
        """
        for role, fields, found in (("state", self.state, state), ("constant", self.constant, constants)):
            named = {field.name: field.order for field in fields}
            if found != named:
                raise UserError(
                    f"{where}: its {role} fields are not those of the card {self.name!r}.\n"
                    f"  the card names: {_listing(named)}\n"
                    f"  the file holds: {_listing(found)}\n"
                    f"Use the files of {self.name}, or write a card that names the fields these files hold."
                )


def read_channels(file: Traversable, known: Mapping[str, Channel]) -> dict[str, Channel]:
    """Return the channels of one channels.yaml by name.

    `duplicate_of` names one of `known` or one further up in the file. UserError names file, key path and value.
    """
    channels: dict[str, Channel] = {}

    def check(entries: Mapping[str, _ChannelEntry]) -> None:
        for name, entry in entries.items():
            above = [*known, *channels]
            if entry.duplicate_of is not None and entry.duplicate_of not in above:
                raise Mismatch("a channel listed above", nearest(entry.duplicate_of, above), (name, "duplicate_of"))
            channels[name] = Channel(name, **vars(entry))

    validate(dict[Name, _ChannelEntry], read_yaml(file), str(file), check)
    return channels


def read_card(file: Traversable, name: str, channels: Mapping[str, Channel]) -> Card:
    """Return the card of the dataset `name`, checked. UserError names file, key path and value."""
    return validate(Card, read_yaml(file), str(file), partial(_check_card, name=name, channels=channels))


def _check_card(card: Card, name: str, channels: Mapping[str, Channel]) -> None:
    if card.name != name:
        raise Mismatch(f"the name of the file, {name!r}", "Rename one of them.", ("name",))
    first: dict[str, str] = {}  # field or channel -> the field it is used by
    for one in card.fields:
        place = (one.role, f"t{one.order}", one.name)
        for index, channel in enumerate(one.channels):
            if channel not in channels:
                raise Mismatch("a canonical channel (channels.yaml)", nearest(channel, channels), (*place, index))
        path = ".".join(place)
        for what in (f"field {one.name!r}", *(f"channel {channel!r}" for channel in one.channels)):
            if what in first:
                raise ValueError(f"{path}: {what} is already used by {first[what]}. Use each once.")
            first[what] = path
    check_symmetries(card.symmetries, card.boundary, card.domain)
    for channel in card.ranges:
        own = card.state_channels + card.constant_channels
        if channel not in own:
            raise Mismatch("a channel of this card", nearest(channel, own), ("ranges", channel))
    for number, conserved in enumerate(card.conserved):
        for index, channel in enumerate(conserved.channels):
            if channel not in card.state_channels:
                hint = nearest(channel, card.state_channels)
                raise Mismatch("a state channel of this card", hint, ("conserved", number, "channels", index))


def _listing(fields: Mapping[str, int]) -> str:
    """Return fields for a message; a file may hold names that a terminal should not print."""
    shown = {name if name.isprintable() else ascii(name): order for name, order in fields.items()}
    return ", ".join(f"{name} (t{order})" for name, order in shown.items()) or "none"


VARIABLE = "WAVELIT_REGISTRY"


@dataclass(frozen=True)
class Registry:
    """The canonical channels and the cards."""

    channel_cards: Mapping[str, Channel]  # in the order of channels.yaml, the package's first
    cards: Mapping[str, Card]  # by dataset name, sorted

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the canonical channels."""
        return tuple(self.channel_cards)

    def card(self, name: str) -> Card:
        """Return the card of a dataset. Raises UserError, with the nearest name, if there is none."""
        if name not in self.cards:
            raise UserError(
                f"dataset {name!r}: no card of this name. {nearest(name, self.cards)} `data-pipeline register` drafts "
                f"one; yours are found through {VARIABLE}, data.registry or, where a command has it, --registry."
            )
        return self.cards[name]

    def select(self, names: Sequence[str] | None) -> list[Card]:
        """Return the named cards, each once, sorted by name; None means all but the extras."""
        cards = map(self.card, sorted(set(self.cards if names is None else names)))
        return [card for card in cards if names is not None or not card.extra]

    def snapshot(self) -> dict[str, Any]:
        """Return what a trained model depends on, as JSON: channels, fields, boundaries, without prose and counts."""
        cards = {
            name: {"fields": list(map(astuple, card.fields)), "boundary": card.boundary}
            for name, card in self.cards.items()
        }
        return dict(to_jsonable_python({"channels": self.channels, "cards": cards}))


def load_registry(directory: str | Path | None = None) -> Registry:
    """Return the packaged cards and those of the user's folders: `directory`, else WAVELIT_REGISTRY, else none.

    UserError, naming file, key path and value, for what is no valid card, for a folder without cards, and for a name
    that is taken.
    """
    return load_folders([packaged_folder(), *user_folders(directory)])


def packaged_folder() -> Traversable:
    """Return the folder of the packaged channels and cards."""
    return files("data_pipeline") / "cards"


def named_folders(given: str | Path | None) -> list[Path]:
    """Return the folders that `given` names, else those that WAVELIT_REGISTRY names, separated as in PATH."""
    text = str(given) if given is not None else os.environ.get(VARIABLE, "")
    return [Path(part) for part in text.split(os.pathsep) if part]


def user_folders(directory: str | Path | None) -> list[Path]:
    """Return the user's folders in the order they are read. UserError for one that is not there or holds no cards."""
    folders = named_folders(directory)
    for folder in folders:
        if not holds_cards(folder):
            raise UserError(
                f"{folder}: expected a folder of your own cards (channels.yaml, datasets/<name>.yaml), found "
                f"{'neither in it' if folder.is_dir() else 'no folder'}. It is named by "
                f"{'--registry or data.registry' if directory is not None else VARIABLE}."
            )
    return folders


def holds_cards(folder: Path) -> bool:
    """Return whether a folder holds channels or cards."""
    return (folder / "channels.yaml").is_file() or (folder / "datasets").is_dir()


def load_folders(folders: Sequence[Traversable]) -> Registry:
    """Return one registry from the `channels.yaml` and `datasets/*.yaml` of folders; later ones add to earlier ones."""
    channels: dict[str, Channel] = {}
    origin: dict[str, Traversable] = {}  # channel -> the file it comes from
    for file in (folder / "channels.yaml" for folder in folders):
        for name, channel in read_channels(file, channels).items() if file.is_file() else ():
            if channels.setdefault(name, channel) != channel:  # folders to be combined may have the same channel
                raise UserError(
                    f"{file}: {name}: a channel of this name, with another description, unit or duplicate_of, is in "
                    f"{origin[name]}. If it is the same quantity, leave it out here; if not, give it another name."
                )
            origin.setdefault(name, file)
    cards: dict[str, Card] = {}
    taken: dict[str, Traversable] = {}  # name or abbreviation -> the card's file
    for folder in (folder / "datasets" for folder in folders):
        listed = [file for file in (folder.iterdir() if folder.is_dir() else ()) if file.name.endswith(".yaml")]
        for file in sorted((file for file in listed if file.name[0] != "."), key=lambda file: file.name):
            card = read_card(file, file.name.removesuffix(".yaml"), channels)
            for key, name in (("name", card.name), ("abbreviation", card.abbreviation)):
                if taken.setdefault(name, file) is not file:
                    raise UserError(f"{file}: {key}: {name!r} is taken by {taken[name]}. Choose another.")
            cards[card.name] = card
    return Registry(channels, dict(sorted(cards.items())))
