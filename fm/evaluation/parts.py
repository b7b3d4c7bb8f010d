"""The parts of an evaluation: how it is cut, which process measures which part, and where finished parts are kept.

A part is a range of one dataset's one-step windows, or one batch of its rollouts. Neither the parts nor the batches
within them depend on the number of processes, so one process and several give the same errors, on one machine bit for
bit. Until the report is written, <report>/parts/ holds a file <dataset>-<task>-00000.npz of each finished part, with
the fields of its FrameErrors, and identity.json: whose parts these are (model, protocol, data, batch size, device). A
file appears whole or not at all, and holds no pickled objects. Parts of another identity are removed.
"""

import heapq
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file, inside, load_json, write_whole
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.errors import DAMAGED, read_arrays
from fm.evaluation.measure import FrameErrors, one_step_windows, rollout_batches, rollout_steps
from fm.evaluation.protocol import Protocol

BATCHES = 8  # of a part of one-step windows, at most
FORMAT = 2  # 2: errors of the linear stencil
FOLDER = "parts"
IDENTITY = "identity.json"
_OURS = re.compile(r"(identity\.json|.+-(one_step|rollout)-\d{5,}\.npz)(\.\d+\.tmp)?")


@dataclass(frozen=True)
class EvaluationPart:
    """A piece of an evaluation that one process measures as a whole."""

    dataset: str
    task: str  # one_step or rollout
    number: int  # among those of its dataset and task
    ids: tuple[int, ...]  # of windows (one_step), or of trajectories, longest first (rollout)
    frames: int  # predictions that are scored
    cost: int  # predictions x grid cells

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        return f"{self.dataset}-{self.task}-{self.number:05d}"


def cut(readers: Mapping[str, ShardReader], protocol: Protocol, batch_size: int) -> list[EvaluationPart]:
    """Return all parts of an evaluation: dataset by dataset, one step before rollouts."""
    parts = []
    for name, reader in readers.items():
        height, width = reader.manifest.grid
        windows = one_step_windows(reader, protocol)
        ranges = np.array_split(windows, -(-len(windows) // (BATCHES * batch_size)))
        for number, ids in enumerate(ranges):
            cost = len(ids) * height * width
            parts.append(EvaluationPart(name, "one_step", number, tuple(ids.tolist()), len(ids), cost))
        batches = rollout_batches(reader, range(reader.num_trajectories), protocol, batch_size)
        for number, batch in enumerate(batches):
            steps = [rollout_steps(reader, trajectory, protocol) for trajectory in batch]
            cost = len(batch) * steps[0] * height * width  # rollouts that end early stay in the batch
            parts.append(EvaluationPart(name, "rollout", number, tuple(batch), sum(steps), cost))
    return parts


def divide(parts: Sequence[EvaluationPart], processes: int) -> list[list[EvaluationPart]]:
    """Return the share of each process, most expensive parts first.

    Each part goes to the process with the least to do so far (Graham's LPT rule, SIAM J. Appl. Math. 17, 1969: the last
    process ends at most 4/3 as late as is possible). It is a pure function, so the processes need not communicate.
    """
    loads = [(0, process) for process in range(processes)]
    shares: list[list[EvaluationPart]] = [[] for _ in range(processes)]
    for part in sorted(parts, key=lambda part: (-part.cost, part.name)):
        load, process = heapq.heappop(loads)
        shares[process].append(part)
        heapq.heappush(loads, (load + part.cost, process))
    return shares


class PartFolder:
    """The finished parts of the evaluation that `identity` (plain JSON) describes and that reports to `out`."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out / FOLDER
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))

    def prepare(self) -> None:
        """Make the folder and remove parts of other evaluations; one process does so, before the others look."""
        found = self._read_identity()
        if found == self.identity:
            return
        inside(self.folder.parent, FOLDER)
        if found is not None:
            print(f"{self.folder}: removing what another evaluation left (other {self._differences(found)})")
        remove_parts(self.folder.parent)
        write_whole(self.folder / IDENTITY, (json.dumps(self.identity, indent=1) + "\n").encode())

    def check(self) -> None:
        """UserError if this process is about to measure something else than the one that prepared the folder."""
        found = self._read_identity()
        if found != self.identity:
            raise UserError(
                f"{self.folder / IDENTITY}: expected what this process is about to measure, found other "
                f"{self._differences(found or {})}: start all processes with the same command, where they see the same "
                "run, shards and report folder"
            )

    def finished(self, parts: Sequence[EvaluationPart]) -> list[EvaluationPart]:
        """Return the parts that have a file, written by any process; the files are not read."""
        names = {path.name for path in self.folder.iterdir()}
        return [part for part in parts if self._file(part).name in names]

    def save(self, part: EvaluationPart, result: FrameErrors) -> None:
        """Write the measurements of a part; UserError when the disk is full."""
        arrays = {name: array for name, array in vars(result).items() if array is not None}
        with atomic_file(self._file(part), durable=False) as file:  # a torn file is measured again
            np.savez(file, **arrays)

    def load(self, part: EvaluationPart) -> FrameErrors | None:
        """Return the measurements of a part, or None if it has no file; a damaged file is reported and removed."""
        file = self._file(part)
        try:
            errors = FrameErrors(**read_arrays(file))
            if not len(errors.trajectories) == len(errors.steps) == len(errors.values):
                raise ValueError("its arrays differ in length")
            if len(errors.steps) != part.frames:
                raise ValueError(f"expected {part.frames} frames, got {len(errors.steps)}")
        except FileNotFoundError:
            return None
        except DAMAGED as error:
            print(f"{file}: removing a damaged part ({error!r})")
            file.unlink()
            return None
        return errors

    def require(self, part: EvaluationPart) -> FrameErrors:
        """Return the measurements of a part that must be finished by now; UserError if they are missing."""
        result = self.load(part)
        if result is None:
            raise UserError(
                f"{self._file(part)}: expected the errors of finished work, found none that can be read. The same "
                "command measures what is missing; several processes must see the same report folder"
            )
        return result

    def _file(self, part: EvaluationPart) -> Path:
        return self.folder / f"{part.name}.npz"

    def _read_identity(self) -> dict[str, Any] | None:
        try:
            found = load_json((self.folder / IDENTITY).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _differences(self, found: Mapping[str, Any]) -> str:
        keys = self.identity.keys() | found.keys()
        return ", ".join(sorted(key.replace("_", " ") for key in keys if found.get(key) != self.identity.get(key)))


def remove_parts(out: Path) -> None:
    """Remove the parts of a report that is complete, or of another evaluation; files of the user's stay."""
    folder = inside(out, FOLDER)
    (folder / IDENTITY).unlink(missing_ok=True)  # first, since parts without an identity are never read
    for file in folder.iterdir() if folder.is_dir() else ():
        if _OURS.fullmatch(file.name):
            file.unlink()
    with suppress(OSError):  # there is no folder, or it holds files of the user's
        folder.rmdir()
