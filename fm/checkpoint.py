"""Checkpoints: plain files, written whole or not at all, verified before they are used.

    <run>/checkpoints/step_00001000/
        model.json  model.safetensors  ema.safetensors  optimizer.safetensors
        state.json  step, format version, recipe, registry, shard digests, size and SHA-256 of the other files

No RNG state is stored: everything random in training is a function of (seed, step). Nothing is pickled. The files are
the same whatever launched the run, however many processes it has: parameters and moments are whole and stored by name,
these as "<parameter>/<moment>", none for a parameter that no step has moved. Written by fm/checkpoint.py.

Saving while training goes on: a copy of the state in memory, and a thread that brings it to disk.

The copy is taken between two steps, so it is consistent. The thread serialises, hashes, syncs and renames it, verifies
what is then on disk, and only after that deletes checkpoints that are no longer wanted. One save is in flight at most.
"""

import copy
import json
import os
import re
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
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors

from data_pipeline.files import UserError, sha256, sha256_file, sync
from data_pipeline.workers import Threads
from fm.model.baselines import Baseline
from fm.model.files import (
    BASELINE,
    EMA_FILE,
    EXPORT_FILE,
    WEIGHTS_FILE,
    is_exported,
    locate,
    read_description,
    read_exported,
    verify_exported,
)
from fm.model.surrogate import Surrogate
from fm.model.wavelit import WaveLiTFM

FORMAT_VERSION = 2
_STEP = re.compile(r"step_(\d{8,})")


def step_directory(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimiser steps, under a run's checkpoints folder `root`."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints under `root`, newest first. Whole or not: `verify_checkpoint` tells."""
    if not root.is_dir():
        return {}
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return dict(sorted(((int(p.name.removeprefix("step_")), p) for p in found), reverse=True))


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint under `root`, or None.

    Found by scanning and verified against the sizes and digests in state.json; a damaged one is reported and the one
    before it is tried. If none of those present is whole: UserError.
    """
    found = list_checkpoints(root)
    for path in found.values():
        try:
            verify_checkpoint(path)
        except UserError as error:
            report(f"skipping a damaged checkpoint: {error}")
        else:
            return path
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {root} is whole (see above). Restore one from a copy, or start "
            "afresh in another folder with run.dir=... (checkpoint.resume=never starts over in this one)."
        )
    return None


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare each file with its size and SHA-256 in state.json. Returns the state; UserError if anything differs."""
    state = read_state(path)
    for name, expected in state["files"].items():
        file = path / Path(name).name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            size = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise UserError(f"{file}: expected {expected['bytes']} bytes, found {size}")
        if sha256_file(file) != expected["sha256"]:
            raise UserError(f"{file}: its bytes differ from the SHA-256 in state.json")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint; UserError if it is missing, not JSON, or of another format version."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_text())
        version, files = state["format_version"], state["files"]
        sizes_known = all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a checkpoint's state.json ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: checkpoint format {version}, this version of the project reads format {FORMAT_VERSION}; "
            "use the version that wrote it, or see CHANGELOG.md"
        )
    if not sizes_known or "model.safetensors" not in files:
        raise UserError(f"{file}: the list of files is incomplete")
    return state


def load_checkpoint(path: Path, model: Surrogate, average: Surrogate) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fill model and averaged model from a verified checkpoint; returns what state.json holds, and the moments.

    Raises UserError if the architecture, the datasets or their statistics are not those of `model`.
    """
    state = read_state(path)
    _require_same(path, read_description(path), model.description())
    for target, name in ((model, "model.safetensors"), (average, "ema.safetensors")):
        target.load_state_dict(_read_tensors(path / name))
    return state, _read_tensors(path / "optimizer.safetensors")


def load_pretrained(source: Path | str) -> Surrogate:
    """The averaged model that `find_checkpoint` finds, on the CPU: a WaveLiT or a baseline, as model.json says.

    UserError where there is none or its files do not fit together.
    """
    checkpoint = find_checkpoint(source)
    try:
        kind = Baseline if BASELINE in read_description(checkpoint) else WaveLiTFM
        return kind.from_pretrained(checkpoint)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: cannot be loaded as a model: {error}") from error


def verify_model(folder: Path) -> tuple[str, dict[str, Any]]:
    """The SHA-256 of the averaged weights, and what state.json or artefact.json holds; every file is compared with it.

    `folder` is a checkpoint or an exported model. UserError if anything differs, or it is neither.
    """
    if not is_exported(folder):
        if not (folder / "state.json").is_file():
            raise UserError(
                f"{folder}: expected a run, one of its checkpoints, or an exported model (`fm export`, `fm extend`), "
                f"got a model's folder with neither state.json nor {EXPORT_FILE}, one of which tells its recipe"
            )
        state = verify_checkpoint(folder)
        return state["files"][EMA_FILE]["sha256"], state
    try:
        content = verify_exported(folder)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    return content["files"][WEIGHTS_FILE]["sha256"], content


def weights_digest(folder: Path) -> str:
    """The SHA-256 of the averaged weights that a checkpoint or an exported model names. UserError if it names none."""
    if not is_exported(folder):
        return str(read_state(folder)["files"][EMA_FILE]["sha256"])
    try:
        return str(read_exported(folder)["files"][WEIGHTS_FILE]["sha256"])
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def find_checkpoint(source: Path | str) -> Path:
    """The folder meant by a run, one of its checkpoints, an exported model, or `hf://organisation/name`.

    A run means its newest whole checkpoint, or if finetune.gate watched over it the best compromise. UserError if there
    is none, or the Hub does not give it.
    """
    try:
        path = locate(source)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if (path / "model.json").is_file() or is_exported(path):
        return path
    newest = newest_checkpoint(path / "checkpoints", print)
    if newest is None:
        raise UserError(
            f"no checkpoint found: looked for {path / 'model.json'} and {path / 'checkpoints' / 'step_*'}.\n"
            "Expected a run directory (such as runs/quickstart), one of its checkpoints, or an exported model."
        )
    finetune = read_state(newest)["recipe"].get("finetune") or {}
    best = newest_checkpoint(path / "best", print) if finetune.get("gate") is not None else None
    return best or newest


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error})") from error


def _require_same(path: Path, saved: Any, wanted: Any, key: str = "") -> None:
    """UserError at the first place where two nested descriptions differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for name in sorted(saved.keys() | wanted.keys()):
            _require_same(path, saved.get(name), wanted.get(name), f"{key}.{name}" if key else name)
    elif saved != wanted:
        raise UserError(
            f"the checkpoint {path} does not fit this run: {key} is {_brief(saved)} there and {_brief(wanted)} here.\n"
            "Resume with the recipe, registry and shards that it was trained with, start afresh in another folder with "
            "run.dir=..., or finetune from it (finetune.pretrained)."
        )


def _brief(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
        sync(root)
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
    """Write the best compromise of a run (fm/training/guard.py) in place of the one before. UserError as above."""
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
        digests[name] = {"bytes": len(data), "sha256": sha256(data)}
        _write_synced(folder / name, data)
    state = {"format_version": FORMAT_VERSION, "step": snapshot.step, **snapshot.facts, "files": digests}
    _write_synced(folder / "state.json", json.dumps(state, indent=1).encode())
    sync(folder)


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
