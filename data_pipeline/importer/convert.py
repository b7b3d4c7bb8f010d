"""`data-pipeline import`: write what a plan says as a dataset in the Well's layout, with its card and a preview."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import remove
from data_pipeline.importer.arrays import LOCKED, ArrayFile, open_source, reading
from data_pipeline.importer.fields import Part, read_frames
from data_pipeline.importer.plan import ImportPlan, stamp
from data_pipeline.importer.preview import PREVIEW, draw_preview
from data_pipeline.importer.trajectories import StoredTrajectory
from data_pipeline.progress import progress_bar
from data_pipeline.registry import Card, load_folders, named_folders, packaged_folder
from data_pipeline.well.dataset import Trajectories, whole_folder, write_dataset
from data_pipeline.well.hdf5 import block_frames
from data_pipeline.well.match import check_share
from data_pipeline.well.register import Registered, check_name, draft_folder, register


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    folder: Path  # of the dataset
    preview: Path
    card: Registered | None  # the draft; None where a card that was there describes the data
    cards: Path | None  # the folder of the draft


def import_files(plan: ImportPlan, registry: Path | None) -> Imported:
    """Write the dataset of a plan, whole or not at all, and draft its card.

    The card goes to `registry`, by default the first folder that WAVELIT_REGISTRY names, else <out>/cards. None is
    drafted if the package has a card of this name and it describes the data. UserError for values that are not finite,
    for files that change meanwhile, and for a folder that cannot be written.
    """
    options = plan.options
    cards = registry or next(iter(named_folders(None)), options.out / "cards")
    known = draft_folder(cards)[1]
    packaged = load_folders([packaged_folder()]).cards.get(options.name)
    if packaged is None:
        check_name(options.name, cards, known)
    else:
        _check_packaged(packaged, plan)
    check_share([one.field for one in plan.fields], known, options.share)
    folder = options.out / options.name
    with whole_folder(options.out, options.name) as target:
        write_files(plan, target)
        draw_preview(target, plan, target / PREVIEW)
    if packaged is not None:
        return Imported(folder, folder / PREVIEW, None, None)
    try:
        card = register(folder, options.name, cards, options.share)
    except UserError:
        remove(folder)
        raise
    return Imported(folder, folder / PREVIEW, card, cards)


def _check_packaged(card: Card, plan: ImportPlan) -> None:
    """Raise UserError unless a card of the package has the fields, the boundary and the parameters of a plan."""
    fields, scalars = [one.field for one in plan.fields], plan.trajectories[0].scalars
    described, given = ({(one.name, one.order, one.role) for one in some} for some in (card.fields, fields))
    if (described, card.boundary, set(card.scalars)) != (given, plan.boundary, set(scalars)):
        raise UserError(
            f"{card.name}: there is a card {card.name!r} already, and it describes other data: fields "
            f"{', '.join(one.name for one in card.fields)}, boundary {card.boundary}, parameters "
            f"{', '.join(card.scalars) or 'none'}; got {', '.join(one.name for one in fields)}, {plan.boundary}, "
            f"{', '.join(scalars) or 'none'}. Choose another --name, or name the "
            "fields so with --map and --vector"
        )


def write_files(plan: ImportPlan, target: Path) -> None:
    """Write the HDF5 files of a plan below `target`, with a progress bar."""
    frames = sum(len(trajectory.times) for trajectory in plan.trajectories)
    bar = progress_bar(total=frames, desc=f"import {plan.options.name}", unit="frame")
    with _trajectories(plan) as source, bar:
        write_dataset(target, plan.options.name, source, plan.split, bar.update)
    for path, before in zip(plan.files, plan.stamps, strict=True):
        if stamp(path) != before:
            raise UserError(f"{path}: it changed while it was read: {LOCKED}")


@contextmanager
def _trajectories(plan: ImportPlan) -> Iterator[Trajectories]:
    """Give the plan's trajectories, read frame by frame; one file is open at a time."""
    state = [part for one in plan.fields if one.field.role == "state" for part in one.parts]
    constant = [part for one in plan.fields if one.field.role == "constant" for part in one.parts]
    with ExitStack() as stack:
        opened: dict[Path, ArrayFile] = {}

        def source_of(trajectory: StoredTrajectory) -> ArrayFile:
            if trajectory.path not in opened:
                stack.pop_all().close()
                opened.clear()
                opened[trajectory.path] = stack.enter_context(open_source(trajectory.path))
            return opened[trajectory.path]

        def read(trajectory: StoredTrajectory, parts: list[Part], start: int, stop: int) -> np.ndarray:
            """Return components (C, T, X, Y), axes turned to increase, points that are left out cut off."""
            source = source_of(trajectory)
            with reading(trajectory.path):
                values = [
                    read_frames(source.arrays[trajectory.run + part.key], part, trajectory.index, start, stop)
                    for part in parts
                ]
            turned = np.stack(values)[..., :: -1 if plan.x.reverse else 1, :: -1 if plan.y.reverse else 1]
            return turned[..., : len(plan.x.points), : len(plan.y.points)]

        def frames(index: int) -> Iterator[np.ndarray]:
            trajectory = plan.trajectories[index]
            block = block_frames(8 * len(state) * len(plan.x.points) * len(plan.y.points))
            for start in range(0, len(trajectory.times), block):
                yield from read(trajectory, state, start, min(start + block, len(trajectory.times))).swapaxes(0, 1)

        yield Trajectories(
            fields=tuple(one.field for one in plan.fields),
            times=[trajectory.times for trajectory in plan.trajectories],
            x=plan.x.points,
            y=plan.y.points,
            boundary=plan.boundary,
            frames=frames,
            constants=lambda index: read(plan.trajectories[index], constant, 0, 1)[:, 0],
            scalars={
                name: np.array([trajectory.scalars[name] for trajectory in plan.trajectories], np.float64)
                for name in plan.trajectories[0].scalars
            },
            attributes={one.field.name: one.attributes for one in plan.fields},
            labels=[trajectory.label for trajectory in plan.trajectories],
        )
