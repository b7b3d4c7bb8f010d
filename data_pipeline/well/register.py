"""`data-pipeline register`: draft a card for a dataset that has none, and list what a person must decide.

Fields are matched to canonical channels by name alone. A near match (`rho`, `vel`, `Density`) is suggested in a comment
and never taken. Other fields get channels of the dataset's own, whose names begin with the dataset's. The draft is
valid at once, so data can be converted and trained on before the prose is written.
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from data_pipeline.files import write_whole
from data_pipeline.registry import (
    VARIABLE,
    Channel,
    Registry,
    holds_cards,
    load_folders,
    named_folders,
    packaged_folder,
    read_card,
    read_channels,
)
from data_pipeline.schema import NAME
from data_pipeline.symmetries import possible_symmetries
from data_pipeline.well.findings import Finding, condense, left_out_findings
from data_pipeline.well.hdf5 import SPLITS, dataset_folders, divide_names, left_out_names, split_files
from data_pipeline.well.headers import check_headers, sampled_copies, usable
from data_pipeline.well.layout import child_names
from data_pipeline.well.match import near_channel, shared_fields
from data_pipeline.well.survey import COMPONENTS, Survey, provisional_card, read_header, survey


@dataclass(frozen=True)
class Registered:
    """What was written, and what a person must decide."""

    name: str
    paths: tuple[Path, ...]  # the card first, then channels.yaml if a channel was proposed
    decisions: tuple[str, ...]
    findings: tuple[Finding, ...] = ()  # those among the decisions


class NotWell(UserError):
    """The files are not in the Well's layout, or not as a card can describe them."""


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]
    by_split: Mapping[str, tuple[Path, ...]]  # empty where the files are not divided into splits
    folder: str  # the name of the dataset's folder, as typed; "" where the files are not in one
    decisions: tuple[str, ...]


def register(source: Path, name: str | None, registry: Path | None, share: Sequence[str] = ()) -> Registered:
    """Draft `<registry>/datasets/<name>.yaml`, and proposes channels in `<registry>/channels.yaml`.

    `source`: a dataset folder with data/<split>/*.hdf5, a folder of HDF5 files, or one file. `registry` is a folder of
    the user's cards, by default the first that WAVELIT_REGISTRY names. `share` names the fields that are canonical
    channels (see `shared_fields`). Nothing that exists is changed but channels.yaml, to which lines are added. NotWell
    for files that cannot be used, UserError for a name that is taken and for a draft that is already there.
    """
    directory, known = draft_folder(registry)
    try:
        files = _find_files(source)
        header = read_header(files.paths[0])
    except UserError as error:
        raise NotWell(error) from error
    chosen = _checked_name(source, name, files)
    check_name(chosen, directory, known)
    card_file, channels_file = directory / "datasets" / f"{chosen}.yaml", directory / "channels.yaml"
    shared = shared_fields(header, known, share, files.paths[0])
    try:
        found = survey(chosen, files.paths, files.by_split.get("train", ()), lambda field: field.name in shared)
        findings = _check_files(chosen, found, files)
    except UserError as error:
        raise NotWell(error) from error
    fresh = _fresh_channels(found, known)
    pointed = [f"{one.kind}: {one.where}: {one.detail}" for one in findings]
    decisions = (*_moves(files, chosen), *_decisions(found, fresh, known, channels_file), *pointed, _RANGES)
    drafts = {card_file: _card_text(chosen, files, found, decisions, usable(findings))}
    if fresh:
        before = channels_file.read_text("utf-8") if channels_file.exists() else _CHANNELS_HEAD
        drafts[channels_file] = f"{before.rstrip()}\n\n{_channels_text(chosen, found, fresh, known)}"
    _check(drafts, chosen, known)
    for path, text in reversed(drafts.items()):  # the card last: it refers to the channels
        write_whole(path, text.encode())
    return Registered(chosen, tuple(drafts), decisions, tuple(findings))


def _check_files(name: str, found: Survey, files: _Files) -> list[Finding]:
    """Return what headers, a sample, and the ends of all trajectories show."""
    card, by_split = provisional_card(name, found.fields), files.by_split
    placed = check_headers(card, by_split or {"train": files.paths})
    if not by_split:  # that they must be divided is said already
        placed = [(split, one) for split, one in placed if one.kind != "splits"]
    placed += sampled_copies(card, by_split or {"train": files.paths})
    findings = [*found.findings, *dict.fromkeys(one for _, one in placed)]
    for channel, (_, _, lowest, highest) in found.sample.figures.items():
        if lowest == highest:
            severity = "warning" if channel in card.state_channels else "note"
            detail = f"{lowest:g} at every point of the sample; a constant teaches nothing"
            findings.append(Finding("constant_channel", severity, "", None, channel, (), detail))
    for channel in found.sample.nonfinite:
        detail = "the sample holds NaN or Inf; `data-pipeline check` says where"
        findings.append(Finding("nonfinite", "error", "", None, channel, (), detail))
    return condense(findings, sum(count for count, _ in found.lengths))


def check_name(name: str, directory: Path, known: Registry | None = None) -> None:
    """Raise UserError if a card of this name is there already, in `directory` or among the `known` ones."""
    known = draft_folder(directory)[1] if known is None else known
    card_file = directory / "datasets" / f"{name}.yaml"
    taken = {key for card in known.cards.values() for key in (card.name, card.abbreviation)}
    if card_file.exists() or name in taken:
        what = f"{card_file} is already there" if card_file.exists() else f"there is a card {name!r} already"
        raise UserError(f"{name}: {what}, and is not overwritten. Edit it, or choose another --name.")


def draft_folder(given: Path | None) -> tuple[Path, Registry]:
    """Return the folder of a draft, and the registry that the draft may refer to. UserError if there is no folder.

    Where WAVELIT_REGISTRY names the folder among others, they are read together, here as later.
    """
    in_environment = named_folders(None)
    if given is None and not in_environment:
        raise UserError(
            f"register: expected a folder for your own cards, got none; name one with --registry, or in {VARIABLE}"
        )
    directory = given or in_environment[0]
    folders = in_environment if directory in in_environment else [directory]
    return directory, load_folders([packaged_folder(), *filter(holds_cards, folders)])


def _find_files(source: Path) -> _Files:
    """Return the dataset's files, by their places."""
    left_out: list[str] = []
    if (source / "data").is_dir():
        by_split = {split: [Path(str(file)) for file in split_files(source, split)] for split in SPLITS}
        paths, folder = [path for split in SPLITS for path in by_split[split]], _typed(source)
        left_out = [name for split in (*SPLITS, None) for name in left_out_names(source, split)]
    else:
        names, left_out = divide_names(child_names(source))
        paths = [source] if source.is_file() else [source / name for name in names]
        by_split, folder = {}, ""
    others = [f"files {one.detail}" for one in left_out_findings(left_out)]
    if not paths:
        inside = ", ".join(dataset_folders(source)) if source.is_dir() else ""
        found = (
            f"a folder of the datasets {inside}; give one of them" if inside else "; ".join(["none of them", *others])
        )
        raise UserError(
            f"{source}: expected a dataset folder (with data/<split>/*.hdf5), a folder of HDF5 files or one file, got "
            f"{found}"
        )
    return _Files(tuple(paths), {split: tuple(own) for split, own in by_split.items()}, folder, tuple(others))


def _typed(source: Path) -> str:
    return Path(os.path.abspath(source)).name  # as typed, even where it is a link


def _checked_name(source: Path, name: str | None, files: _Files) -> str:
    """Return the dataset's name: as given, else that of its folder or file."""
    chosen = name or files.folder or (source.stem if source.is_file() else _typed(source))
    if not NAME.fullmatch(chosen):
        raise UserError(
            f"{source}: the name {chosen[:80]!a}: expected up to 64 letters, digits and underscores, a letter first; "
            "give one with --name"
        )
    return chosen


def _moves(files: _Files, name: str) -> list[str]:
    """Return what is left out, and what must be moved before `shard` finds the files."""
    move = f"files: `data-pipeline shard` reads <folder>/{name}/data/{{{','.join(SPLITS)}}}/*.hdf5; move them there"
    return [*files.decisions, *([] if name == files.folder else [move])]


def _fresh_channels(found: Survey, registry: Registry) -> list[Channel]:
    """Return the channels that the registry does not have, with a provisional description."""
    fresh = []
    for field in found.fields:
        for component, name in zip(COMPONENTS[field.order], field.channels, strict=True):
            if name in registry.channel_cards:
                continue
            told = found.attributes[field.name]
            what = told.get("long_name") or f"{field.name} (to be described)"
            what = f"{component[1:]} component of {what}" if component else what
            fresh.append(Channel(name, what, told.get("units") or "unknown", found.sample.twins.get(name)))
    return fresh


def _decisions(found: Survey, fresh: Sequence[Channel], registry: Registry, channels_file: Path) -> list[str]:
    """Return what only a person can decide, one line each."""
    lines = ["description: one line on the physics; source, citation, license and equations if you like"]
    proposed = [channel.name for channel in fresh]
    for field in found.fields:
        known = [name for name in field.channels if name not in proposed]
        if known:
            meaning = "; ".join(registry.channel_cards[name].description for name in known)
            what = "channel" if len(known) == 1 else "channels"
            lines.append(f"{', '.join(known)}: taken for the canonical {what} ({meaning}); the same quantity?")
        new = [name for name in field.channels if name in proposed]
        if new:
            lines.append(
                f"{', '.join(new)}: proposed, for this dataset alone; write description and unit in {channels_file}"
            )
        for name in new:
            if near := near_channel(name, field, registry):
                meaning = registry.channel_cards[near].description
                lines.append(
                    f"{name}: is it {near} ({meaning})? Then name that in the card, and remove {name} from there"
                )
    lines += [f"{one.name}: equals {one.duplicate_of} in the sample; always?" for one in fresh if one.duplicate_of]
    return [*lines, *_doubts(found)]


_RANGES = "ranges: what good data lie within, where physics says so; the audit looks at it"


def _doubts(found: Survey) -> list[str]:
    """Return what the files state and a person should check."""
    sides = ", ".join(f"{axis} {'-'.join(ends)}" for axis, ends in zip("xy", found.boundary, strict=True))
    guess = "; OPEN is also what files get that say nothing" if ("OPEN", "OPEN") in found.boundary else ""
    lines = [f"boundary: {sides} (lower and upper end){guess}; is that the physics?"]
    return lines


_CHANNELS_HEAD = """# Canonical channels of your own: one name for one physical quantity, in whichever dataset.
#   description   one line, what the numbers are
#   unit          or what they are scaled by
#   duplicate_of  the channel this one equals (the other half of a symmetric tensor), if it does
"""


def _channels_text(name: str, found: Survey, fresh: Sequence[Channel], registry: Registry) -> str:
    owner = {channel: field for field in found.fields for channel in field.channels}
    lines = [f"# Proposed for {name}; figures over {found.sample.num_frames} frames."]
    for channel in fresh:
        entry = {"description": channel.description, "unit": channel.unit}
        entry |= {"duplicate_of": channel.duplicate_of} if channel.duplicate_of else {}
        near = near_channel(channel.name, owner[channel.name], registry)
        lines.append(f"# {_figures(found, channel.name)}{f'; is it {near}?' if near else ''}")
        lines.append(f"{_yaml(channel.name)}: {_yaml(entry)}")
    return "\n".join(lines) + "\n"


def _card_text(name: str, files: _Files, found: Survey, decisions: Sequence[str], verdict: str) -> str:
    scalars = [name for name in found.scalars if NAME.fullmatch(name)]
    boundary = dict(zip("xy", map(list, found.boundary), strict=True))
    dt = None if found.dt is None else float(f"{found.dt:.6g}")
    lines = [
        f"# {name}, drafted by `data-pipeline register`. {verdict} Please check:",
        *(f"#   - {_comment(line)}" for line in decisions),
        f"name: {_yaml(name)}",
        f"description: {name} (to be described)",
        "",
        "state:  # fields of the files by tensor order, each with its canonical channels",
        *_fields_text(found, "state"),
        *(["constant:", *_fields_text(found, "constant")] if found.fields[-1].role == "constant" else []),
        *([f"scalars: {_yaml(scalars)}"] if scalars else []),
        f"boundary: {_yaml(boundary)}  # lower and upper end of each axis",
        f"grid: {_yaml(list(found.grid))}  # points along x and y",
        f"dt: {_yaml(dt)}  # time between frames; null if it differs",
    ]
    if found.domain:
        domain = dict(zip("xy", map(list, found.domain), strict=True))
        lines.append(f"domain: {_yaml(domain)}  # lower and upper end of the axes")
    train = [f"  - {_yaml({'trajectories': n, 'frames': frames})}" for n, frames in found.lengths if frames > 1]
    if files.by_split.get("train") and train:
        lines += ["train:  # the training split", *train]
    possible = possible_symmetries(found.boundary)
    lines += [
        *(
            [f"# symmetries: {_yaml(possible)}  # those that equations, forcing and initial states have"]
            if possible
            else []
        ),
        "# ranges: {<channel>: [<lowest or null>, <highest or null>]}",
        "# conserved:  # kinds: mean, mean_square, divergence (of a velocity x, y)",
        "#   - {kind: <kind>, channels: [<channel>]}",
        f"# Over {found.sample.num_frames} frames:",
    ]
    lines += [f"#   {name}: {_figures(found, name)}" for field in found.fields for name in field.channels]
    return "\n".join(lines) + "\n"


def _fields_text(found: Survey, role: str) -> list[str]:
    lines = []
    for order in range(3):
        chosen = [field for field in found.fields if (field.role, field.order) == (role, order)]
        if chosen:
            lines.append(f"  t{order}: {_yaml({field.name: list(field.channels) for field in chosen})}")
    return lines


def _figures(found: Survey, name: str) -> str:
    if name not in found.sample.figures:
        return "no frame without NaN or Inf"
    mean, std, lowest, highest = found.sample.figures[name]
    return f"mean {mean:.4g}, std {std:.4g}, from {lowest:.4g} to {highest:.4g}"


def _yaml(value: Any) -> str:
    """Return a value in YAML on one line; names such as `on` and `null` get quotes."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).removesuffix("...\n").strip()


def _comment(line: str) -> str:
    return line if line.isprintable() else ascii(line)


def _check(drafts: Mapping[Path, str], name: str, registry: Registry) -> None:
    """Read the drafts as load_registry will, before any is written."""
    with tempfile.TemporaryDirectory() as folder:
        copies = {path: Path(folder) / path.name for path in drafts}
        for path, text in drafts.items():
            copies[path].write_text(text, "utf-8")
        channels = dict(registry.channel_cards)
        card, *extra = copies.values()
        for copy in extra:
            try:
                channels |= read_channels(copy, channels)
            except UserError as error:
                raise UserError(
                    f"{list(drafts)[1]}: the proposed channels cannot be added at its end ({error}). Write the file in "
                    "block style, one `name: {description: ..., unit: ...}` a line."
                ) from error
        read_card(card, name, channels)
