"""`data-pipeline check`: all that is found about datasets in one table, with or without cards, and whether to use them.

Headers are checked as by `register` and `shard` (well/headers.py), and every frame is read once, as by `audit`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.registry import Card, Channel, Registry
from data_pipeline.remote import is_url
from data_pipeline.shards.review import audit, count_severities, findings_table
from data_pipeline.well.findings import Finding
from data_pipeline.well.hdf5 import SPLITS, WellFile, dataset_folders, split_files
from data_pipeline.well.headers import Place, check_headers, usable
from data_pipeline.well.register import NotWell
from data_pipeline.well.survey import provisional_card, read_header


@dataclass(frozen=True)
class Check:
    """What was found about one dataset."""

    dataset: str
    num_trajectories: int
    num_frames: int
    places: tuple[Place, ...]  # split, and what was found there

    @property
    def findings(self) -> list[Finding]:
        """Return the findings of all splits."""
        return [one for _, one in self.places]

    @property
    def verdict(self) -> str:
        """Return the numbers of errors and warnings, and whether the dataset can be used without changes."""
        counts = count_severities(self.findings) or "no findings"
        where = f"{self.num_trajectories} trajectories, {self.num_frames} frames"
        return f"{self.dataset}: {counts} in {where}. {usable(self.findings)}"


def check(source: Path, registry: Registry, jobs: int | None = None) -> list[Check]:
    """Check a dataset's folder, or each dataset of a folder of datasets, and read every frame.

    A dataset without a card is checked as `register` would describe it. NotWell for files that are not in the Well's
    layout, UserError for a folder without datasets.
    """
    typed = Path(os.path.abspath(source))
    folders = {typed.name: typed} if (source / "data").is_dir() else dataset_folders(source)
    if not folders:
        raise NotWell(
            f"{source}: expected a dataset folder (with data/<split>/*.hdf5), or a folder of dataset folders, got "
            f"{'another folder' if source.is_dir() else 'a file' if source.exists() else 'none'}"
        )
    return [_check_dataset(name, Path(str(folder)), registry, jobs) for name, folder in folders.items()]


def _check_dataset(name: str, folder: Path, registry: Registry, jobs: int | None) -> Check:
    files = {split: [Path(str(file)) for file in split_files(folder, split)] for split in SPLITS}
    known = registry.cards.get(name)
    card = known or _card_of(name, [path for own in files.values() for path in own])
    names = card.state_channels + card.constant_channels
    channels = {**{one: Channel(one, "", "", None) for one in names}, **registry.channel_cards}
    reviews = audit(folder.parent, Registry(channels, {name: card}), [name], jobs=jobs)
    # A card that gives no time step says that it differs.
    headers = check_headers(card, files, any_step=known is not None and known.dt is None)
    places = [place for place in headers if place[1].kind != "unreadable"]  # of which the audit has its own
    places += [(review.split, one) for review in reviews for one in review.findings]
    trajectories, frames = (sum(getattr(one, key) for one in reviews) for key in ("num_trajectories", "num_frames"))
    return Check(name, trajectories, frames, tuple(places))


def _card_of(name: str, files: Sequence[Path]) -> Card:
    """Return a card that describes files without a card, from the first one that can be read. NotWell if none can."""
    first: UserError = UserError(f"{name}: expected HDF5 files (.hdf5, .h5) in data/train, valid and test, got none")
    for number, path in enumerate(files):
        try:
            card = provisional_card(name, read_header(path))
            with WellFile(path, card) as file:
                return replace(card, grid=file.grid, boundary=file.boundary)
        except UserError as error:
            first = first if number else error
    raise NotWell(first) from first


def table(checks: Sequence[Check]) -> str:
    """Return a table of all findings, the most severe of each dataset first, and the verdicts."""
    found = [(one.dataset, split, finding) for one in checks for split, finding in one.places]
    return "\n".join([*([findings_table(found, None)] if found else []), *(one.verdict for one in checks)])


def well_headers(well: str | Path, datasets: Sequence[str], registry: Registry) -> list[tuple[str, str, Finding]]:
    """Return dataset, split and finding of what the headers of a Well's files show; nothing of those behind a URL."""
    found = []
    for name, folder in dataset_folders(Path(well), datasets).items() if not is_url(well) else ():
        card, files = registry.card(name), {split: split_files(folder, split) for split in SPLITS}
        found += [(name, *place) for place in check_headers(card, files, any_step=card.dt is None)]
    return found
