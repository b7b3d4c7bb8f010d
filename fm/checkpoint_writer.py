"""Saving while training goes on: a copy of the state in memory, and a thread that brings it to disk.

The copy is taken between two steps, so it is consistent. The thread serialises, hashes, syncs and renames it, verifies
what is then on disk, and only after that deletes checkpoints that are no longer wanted. One save is in flight at most.
"""

import copy
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save as serialize_tensors

from data_pipeline.errors import UserError
from data_pipeline.files import sync_directory
from data_pipeline.threads import Threads
from fm.checkpoint import FORMAT_VERSION, list_checkpoints, step_directory, verify_checkpoint


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` optimiser steps; nothing in it changes when training goes on."""

    step: int
    description: dict[str, Any]  # what model.json says
    tensors: dict[str, dict[str, torch.Tensor]]  # file name -> tensors by name, on the CPU
    facts: dict[str, Any]  # JSON types, stored in state.json


def take_snapshot(
    step: int,
    description: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    average: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
) -> Snapshot:
    """Copy weights, averaged weights and moments to CPU memory."""
    tensors = {
        "model.safetensors": _copies(weights),
        "ema.safetensors": _copies(average),
        "optimizer.safetensors": _copies(moments),
    }
    return Snapshot(step, copy.deepcopy(dict(description)), tensors, copy.deepcopy(dict(facts)))


def write_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Write the snapshot's checkpoint under `root` and return its folder.

    The files go to a temporary sibling, are synced, and the folder is renamed, so a crash at any moment leaves either
    the whole checkpoint or none. UserError when the disk is full, not writable or does not give back what was written;
    the temporary files are removed and earlier checkpoints are untouched.
    """
    final = step_directory(root, snapshot.step)
    temporary = root / f".writing_{final.name}"
    try:
        _remove_leftovers(root)
        temporary.mkdir(parents=True)
        _write_files(temporary, snapshot)
        verify_checkpoint(temporary)
        if final.exists():  # damaged, or of a run before this one (checkpoint.resume=never)
            final.rename(root / f".deleting_{final.name}")
        temporary.rename(final)
        sync_directory(root)
    except (OSError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(
            f"could not save the checkpoint {final}: {reason}.\n"
            f"Earlier checkpoints in {root} are untouched. Free some space or make the folder writable, then start the "
            "same command again: it continues from the newest whole checkpoint."
        ) from error
    return final


def prune_checkpoints(root: Path, newest: Path, keep: int, keep_every: int | None) -> None:
    """Delete checkpoints older than `newest`, which is whole, but `keep` - 1 and those at multiples of `keep_every`.

    Each is renamed before it is deleted, so that a kill leaves no half of one. UserError where one cannot be deleted.
    """
    steps = list_checkpoints(root)
    newest_step = next(step for step, path in steps.items() if path == newest)
    older = [step for step in steps if step < newest_step][keep - 1 :]
    try:
        for step in older:
            if not (keep_every and step % keep_every == 0):
                steps[step].rename(root / f".deleting_{steps[step].name}")
        _remove_leftovers(root)
    except OSError as error:
        raise UserError(
            f"could not delete old checkpoints in {root}: {error.filename}: {error.strerror}.\n"
            f"{newest} was saved and is whole. Make the folder writable, or raise checkpoint.keep."
        ) from error


def keep_incident(root: Path, snapshot: Snapshot, report: Callable[[str], None]) -> None:
    """Write what preceded a refused step for `fm replay`; the newest three are kept. A failure is reported, no more."""
    try:
        prune_checkpoints(root, write_checkpoint(root, snapshot), keep=3, keep_every=None)
    except UserError as error:
        report(f"what `fm replay` needs could not be kept: {error}")


def keep_best(root: Path, snapshot: Snapshot) -> None:
    """Write the best compromise of a run (fm/training/gate.py) in place of the one before. UserError as above."""
    best = write_checkpoint(root, snapshot)
    for step, path in list_checkpoints(root).items():
        if step > snapshot.step:  # of a run that has gone back since
            path.rename(root / f".deleting_{path.name}")
    prune_checkpoints(root, best, keep=1, keep_every=None)


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Saves a run's checkpoints from a thread. As a context it ends when the save in flight has ended.

    A failure is handed out once, by `failure` or `wait`; whoever trains must ask at every step.
    """

    def __init__(self, root: Path, keep: int, keep_every: int | None) -> None:
        self.root, self.keep, self.keep_every = root, keep, keep_every
        self._thread = Threads(1)
        self._save: Future[None] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return  # asked to leave at once
        failure = self.wait()
        if failure is not None and error is None:
            raise failure
        if failure is not None:
            print(failure, file=sys.stderr)

    def start(self, snapshot: Snapshot) -> None:
        """Begin to save; the save before must have been waited for."""
        assert self._save is None, "a save is in flight"
        self._save = self._thread.submit(self._write_and_prune, snapshot)

    def failure(self) -> UserError | None:
        """Why the last save failed, if it has by now. Does not wait."""
        return self.wait() if self._save is not None and self._save.done() else None

    def wait(self) -> UserError | None:
        """Wait for the save in flight; why it failed, or None."""
        if self._save is None:
            return None
        error = self._save.exception()
        self._save = None
        if error is not None and not isinstance(error, UserError):
            raise error
        return error

    def _write_and_prune(self, snapshot: Snapshot) -> None:
        newest = write_checkpoint(self.root, snapshot)
        prune_checkpoints(self.root, newest, self.keep, self.keep_every)


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    """Write and sync every file, one in memory at a time; state.json is the last."""
    digests = {}
    for name in ("model.json", *snapshot.tensors):
        if name == "model.json":
            data = json.dumps(snapshot.description, indent=1).encode()
        else:
            data = serialize_tensors(snapshot.tensors[name])
        digests[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write_synced(folder / name, data)
    state = {"format_version": FORMAT_VERSION, "step": snapshot.step, **snapshot.facts, "files": digests}
    _write_synced(folder / "state.json", json.dumps(state, indent=1).encode())
    sync_directory(folder)


def _write_synced(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _remove_leftovers(root: Path) -> None:
    """Remove what a killed save or deletion left."""
    for pattern in (".writing_*", ".deleting_*"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover)
