"""The plan of an import: what each array of the files is taken to be, and from where that is known.

What the files and the options leave open is never guessed in silence: `make_plan` refuses, lists what it found, and
gives the command that would accept its guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.importer import options as said
from data_pipeline.importer.arrays import Array, ArrayFile, open_source, reading
from data_pipeline.importer.axes import Needs, Side, find_side, need_boundary, resolve_dims
from data_pipeline.importer.fields import Planned, find_components, find_fields, read_frames, without_runs
from data_pipeline.importer.layouts import Layout, recognize, run_arrays
from data_pipeline.importer.options import Options
from data_pipeline.importer.trajectories import StoredTrajectory, choose_scalars, find_trajectories, leave_out
from data_pipeline.registry import Boundary
from data_pipeline.well.dataset import FRACTIONS, divide, parse_boundary
from data_pipeline.well.hdf5 import SPLITS


class NotEnoughKnown(UserError):
    """What an import needs and the files do not tell; `command` accepts the guesses."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__(f"{message}\n  {command}")
        self.command = command


@dataclass(frozen=True)
class ImportPlan:
    """All that an import does."""

    options: Options
    layout: Layout
    files: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]  # of the files: size, and time of the last change
    fields: tuple[Planned, ...]
    trajectories: tuple[StoredTrajectory, ...]
    x: Side
    y: Side
    boundary: Boundary
    split: Mapping[str, Sequence[int]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        trajectories, steps = (
            self.trajectories,
            sorted({float(f"{np.diff(trajectory.times).mean():.6g}") for trajectory in self.trajectories}),
        )
        lengths = sorted({len(trajectory.times) for trajectory in trajectories})
        frames = " to ".join(map(str, dict.fromkeys((lengths[0], lengths[-1]))))
        plural = "ies" if len(trajectories) > 1 else "y"
        lines = [
            f"{self.options.name}: {len(trajectories)} trajector{plural} of {frames} frames on {len(self.x.points)} x "
            f"{len(self.y.points)} points",
            f"  recognized  {self.layout.how}",
        ]
        for one in self.fields:
            kind = ("scalar", "vector", "tensor")[one.field.order] if one.field.role == "state" else "constant"
            unit = f", {one.attributes['units']}" if "units" in one.attributes else ""
            lines.append(f"  {kind:11} {one.field.name} = {', '.join(map(str, one.parts))}{unit}")
        lines.append(f"  time        step {' or '.join(f'{step:.6g}' for step in steps[:4])}")
        for axis, side, ends in (("x", self.x, self.boundary[0]), ("y", self.y, self.boundary[1])):
            kinds = "-".join(dict.fromkeys(ends)).lower()
            lines.append(f"  {axis}           {side.points[0]:.6g} to {side.points[-1]:.6g} ({side.origin}), {kinds}")
        for name in trajectories[0].scalars:
            values = [trajectory.scalars[name] for trajectory in trajectories]
            text = f"{min(values):.6g}" + (f" to {max(values):.6g}" if max(values) > min(values) else "")
            lines.append(f"  parameter   {name} = {text}")
        parts = ", ".join(f"{split} {len(self.split[split])}" for split in SPLITS if split in self.split)
        return "\n".join([*lines, f"  split       {parts}", *(f"  note        {note}" for note in self.notes)])


def make_plan(options: Options) -> ImportPlan:
    """Look at the files and return the plan. UserError for what cannot be imported, and for what is not known."""
    files = said.expand(options.files)
    named, groups = said.maps(options), said.vectors(options)
    pattern = next((one.key for (one,) in named.values() if any(sign in one.key for sign in "*?")), None)
    needs: Needs = {}
    notes: list[str] = []
    stamps = tuple(stamp(path) for path in files)
    with open_source(files[0]) as source:
        layout = recognize(source, pattern)
        arrays = run_arrays(source, layout.runs[0])
        listing = _listing(source, arrays)
        dims = resolve_dims(options, layout, arrays, needs)
        known = find_components(without_runs(named, layout), groups, layout, arrays, dims, needs)
        fields = find_fields(known, options, arrays, dims, notes)
        first = fields[0].parts[0]
        stored = dict(zip(first.dims, arrays[first.key].shape, strict=True))
        sides = {axis: find_side(axis, stored[axis], options, layout, arrays, needs, str(files[0])) for axis in "xy"}
        if "extent" in needs:
            needs["extent"] = f"{stored['x']},{stored['y']}", needs["extent"][1]
        ends = {axis: kinds.split(":") for axis, kinds in layout.boundary.items() if axis in "xy"}
        boundary = {**{axis: (own[0], own[-1]) for axis, own in ends.items()}, **said.boundary(options.boundary)}
        with reading(files[0]):
            frame = read_frames(arrays[first.key], first, 0, stored.get("t", 1) - 1, stored.get("t", 1))[0]
        need_boundary(frame, boundary, needs)
        if (
            options.dt is None
            and not {"t"} & layout.coordinates.keys()
            and not {"dt"} & (arrays.keys() | layout.numbers.keys())
        ):
            needs["dt"] = "1", "the file has no times; frames are numbered"
    if needs:
        accepted = options.command(**{option: value for option, (value, _) in needs.items()})
        raise NotEnoughKnown(_refusal(listing, layout, fields, needs, options.files[0]), accepted)
    trajectories = leave_out(find_trajectories(files, options, fields, sides, pattern), options)
    trajectories = choose_scalars(trajectories, options, notes)
    return ImportPlan(
        options=options,
        layout=layout,
        files=files,
        stamps=stamps,
        fields=fields,
        trajectories=tuple(trajectories),
        x=sides["x"],
        y=sides["y"],
        boundary=parse_boundary(boundary),
        split=_split(trajectories, options, notes),
        notes=tuple(notes),
    )


def stamp(path: Path) -> tuple[int, int]:
    """Return the size and the time of the last change of a file. UserError if it is not there."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: expected a file, found none ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns


def _split(trajectories: Sequence[StoredTrajectory], options: Options, notes: list[str]) -> dict[str, Sequence[int]]:
    """Return the trajectories of each split: the user's fractions, else the files' own splits, else the usual ones."""
    own = {trajectory.split for trajectory in trajectories}
    if options.split is None and None not in own and len(own) > 1:
        notes.append("train, valid and test as the files divide them")
        return {
            split: [index for index, trajectory in enumerate(trajectories) if trajectory.split == split]
            for split in SPLITS
            if split in own
        }
    if options.split is None and own <= {"valid", "test"}:
        notes.append(f"all trajectories are from {', '.join(map(str, own))} files, and are divided by --split")
    given = said.fractions(options.split) if options.split else FRACTIONS
    return dict(divide(len(trajectories), given, options.seed))


def _listing(source: ArrayFile, arrays: Mapping[str, Array]) -> str:
    """Return what a file holds, one line for each array and attribute."""
    lines = [f"{source.path} ({source.kind}) holds:"]
    for key, array in list(arrays.items())[:20]:
        named = f" ({', '.join(array.dims)})" if array.dims else ""
        attrs = "".join(f", {name}={value!r:.40}" for name, value in list(array.attrs.items())[:4])
        lines.append(f"  {key:12} {array.dtype} {array.shape}{named}{attrs}")
    lines += [f"  {len(arrays) - 20} more arrays"] * (len(arrays) > 20)
    return "\n".join(
        [*lines, *(f"  attribute {name} = {value!r:.60}" for name, value in list(source.attrs.items())[:8])]
    )


def _refusal(listing: str, layout: Layout, fields: Sequence[Planned], needs: Needs, file: str) -> str:
    """Return the message for what is not known: what was found, and the guesses; a command follows."""
    lines = [f"not enough is known about {file}; nothing was written.", listing]
    lines += [f"recognized as {layout.how}. It would be taken as:"]
    lines += [f"  {one.field.name} = {', '.join(map(str, one.parts))}" for one in fields]
    lines += ["not known, with a guess:"]
    for option, (value, why) in needs.items():
        shown = " ".join(value) if isinstance(value, tuple) else value
        lines.append(f"  --{option} {shown}: {why}")
    return "\n".join([*lines, "If the guesses are right, type:"])
