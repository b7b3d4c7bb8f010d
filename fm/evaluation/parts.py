"""What an evaluation has finished: a file for each item, kept until the report is written.

    <report>/parts/
        identity.json                           whose parts these are: model, protocol, data, batch size, device
        <dataset>-one_step-00000.npz  ...       Measured: trajectories, steps, values
        <dataset>-rollout-00000.npz  ...        of each dataset's first rollouts also `shown`: truth and prediction

A file appears whole or not at all, and nothing in it is pickled. Parts of another identity are removed.
"""

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from fm.evaluation.items import Item
from fm.evaluation.measure import Measured

FORMAT = 1
FOLDER = "parts"
IDENTITY = "identity.json"
_OURS = re.compile(r"(identity\.json|.+-(one_step|rollout)-\d{5,}\.npz)(\.\d+\.tmp)?")
_DAMAGED = (KeyError, ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile)  # as zipfile and numpy say it


@dataclass(frozen=True)
class Part:
    """What one item has measured."""

    measured: Measured
    shown: np.ndarray | None = None  # (2, n, H, W): truth and prediction that pictures show, where the item has them


class Parts:
    """The finished items of the evaluation that `identity` (plain JSON) describes and that reports to `out`."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out / FOLDER
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))

    def prepare(self) -> None:
        """Make the folder, without the parts of other evaluations. By one process, before the others look."""
        found = self._read_identity()
        if found == self.identity:
            return
        if found is not None:
            print(f"{self.folder}: removing what another evaluation left (other {self._differences(found)})")
        remove_parts(self.folder.parent)
        with atomic_file(self.folder / IDENTITY) as file:
            file.write((json.dumps(self.identity, indent=1) + "\n").encode())

    def check(self) -> None:
        """UserError where this process is about to measure something else than the one that prepared the folder."""
        found = self._read_identity()
        if found != self.identity:
            raise UserError(
                f"{self.folder / IDENTITY}: expected what this process is about to measure, found other "
                f"{self._differences(found or {})}: start all processes with the same command, where they see the same "
                "run, shards and report folder"
            )

    def finished(self, items: Sequence[Item]) -> list[Item]:
        """Those items that have a file, of whatever process; it is not read."""
        names = {path.name for path in self.folder.iterdir()}
        return [item for item in items if self._file(item).name in names]

    def save(self, item: Item, part: Part) -> None:
        """Write the part of a finished item. UserError when the disk is full."""
        arrays = {one.name: getattr(part.measured, one.name) for one in fields(Measured)}
        if part.shown is not None:
            arrays["shown"] = part.shown
        with atomic_file(self._file(item), durable=False) as file:  # a torn one is measured again
            np.savez(file, **arrays)

    def load(self, item: Item) -> Part | None:
        """The part of an item; None where there is none. A damaged one is removed, and that is said."""
        file = self._file(item)
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
            part = Part(Measured(*(arrays[one.name] for one in fields(Measured))), arrays.get("shown"))
            if not len(part.measured.trajectories) == len(part.measured.steps) == len(part.measured.values):
                raise ValueError("its arrays differ in length")
            if len(part.measured.steps) != item.frames:
                raise ValueError(f"expected {item.frames} frames, got {len(part.measured.steps)}")
        except FileNotFoundError:
            return None
        except _DAMAGED as error:
            print(f"{file}: removing a damaged part ({error!r})")
            file.unlink()
            return None
        return part

    def require(self, item: Item) -> Part:
        """The part of an item that must be there by now."""
        part = self.load(item)
        if part is None:
            raise UserError(
                f"{self._file(item)}: expected the errors of finished work, found none that can be read. The same "
                "command measures what is missing; several processes must see the same report folder"
            )
        return part

    def _file(self, item: Item) -> Path:
        return self.folder / f"{item.name}.npz"

    def _read_identity(self) -> dict[str, Any] | None:
        """None where there is none, or what is there cannot be read."""
        try:
            found = json.loads((self.folder / IDENTITY).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _differences(self, found: Mapping[str, Any]) -> str:
        keys = self.identity.keys() | found.keys()
        return ", ".join(sorted(key.replace("_", " ") for key in keys if found.get(key) != self.identity.get(key)))


def remove_parts(out: Path) -> None:
    """Remove what was written for a report that is complete, or another one; the identity first: parts without one
    belong to nobody.
    """
    folder = out / FOLDER
    (folder / IDENTITY).unlink(missing_ok=True)
    for file in folder.iterdir() if folder.is_dir() else ():
        if _OURS.fullmatch(file.name):
            file.unlink()
    with suppress(OSError):  # not there, or somebody keeps files of their own in it
        folder.rmdir()
