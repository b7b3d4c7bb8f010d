"""Which fields of a dataset are canonical channels: quantities that have one name in all datasets."""

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.registry import Field, Registry
from data_pipeline.well.hdf5 import read_attributes
from data_pipeline.well.layout import texts

ALIASES = {  # what papers and codes call the quantities of the packaged channels, in lower case
    **dict.fromkeys(("u", "ux", "vx"), "velocity_x"),
    **dict.fromkeys(("v", "uy", "vy"), "velocity_y"),
    **dict.fromkeys(("p", "press"), "pressure"),
    **dict.fromkeys(("rho", "dens"), "density"),
    **dict.fromkeys(("b", "buoy"), "buoyancy"),
    **dict.fromkeys(("s", "scalar", "dye"), "tracer"),
    **dict.fromkeys(("c", "conc"), "concentration"),
    **dict.fromkeys(("c_s", "cs", "sound_speed"), "speed_of_sound"),
}
VELOCITIES = ("u", "v", "vel", "vels", "velocities")  # what they call a vector field of velocities


def shared_fields(fields: Sequence[Field], known: Registry, share: Sequence[str], file: Path) -> Collection[str]:
    """Return the names of the fields whose channels are the canonical ones, which other datasets have too.

    `share` names them; `all` stands for every field that has the name of a canonical channel, `none` for no field. If
    it is empty, a field with a canonical name is shared unless the name is generic: one or two letters mean another
    quantity in every program. If `file` states a dataset with a card as its dataset_name, that card's fields are.
    UserError as of `check_share`.
    """
    canonical = check_share(fields, known, share)
    if list(share) in (["all"], ["none"]):
        return canonical if share[0] == "all" else set()
    if share:
        return set(share)
    dataset = texts(read_attributes(file).get("dataset_name", ""))[0]
    stated = set(known.cards[dataset].fields) if dataset in known.cards else set()
    return {field.name for field in fields if field.name in canonical and (len(field.name) > 2 or field in stated)}


def check_share(fields: Sequence[Field], known: Registry, share: Sequence[str]) -> set[str]:
    """Return the fields with the name of a canonical channel. UserError for another name in `share`."""
    canonical = {field.name for field in fields if set(field.channels) <= known.channel_cards.keys()}
    for name in share if list(share) not in (["all"], ["none"]) else ():
        if name not in canonical:
            listed = ", ".join(sorted(canonical)) or "none"
            raise UserError(
                f"--share {name}: expected fields with the name of a canonical channel ({listed}), or all, or none"
            )
    return canonical


def near_channel(name: str, field: Field, registry: Registry) -> str | None:
    """Return the canonical channel that `name` may mean (an alias, another case, a close spelling), or None."""
    name = name[name.rindex(field.name) :]  # without the dataset's
    if field.order == 1 and field.name.lower() in VELOCITIES:
        guess = f"velocity{name.removeprefix(field.name)}"
    else:
        guess = ALIASES.get(name.lower(), "")
    if guess in registry.channel_cards:
        return guess
    lower = {channel.lower(): channel for channel in registry.channels}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.85)
    return lower[close[0]] if close else None
