"""Checkpoints: plain files, written whole or not at all, verified before they are used; and opening any trained model.

    <run>/checkpoints/step_00001000/
        model.json  model.safetensors  ema.safetensors  optimizer.safetensors
        state.json  step, format version, recipe, registry, shard digests, size and SHA-256 of the other files,
                    and the digest of all this

Nothing is pickled, and no RNG state is stored: everything random is a function of (seed, step). The files do not depend
on the launcher and the number of processes: tensors are whole and stored by name, moments as "<parameter>/<moment>".
"""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors

from data_pipeline.errors import UserError
from data_pipeline.files import TEMPORARY_SUFFIX, atomic_path, inside, read_json, remove, sha256
from data_pipeline.schema import Strict, at_least, sealed, unsealed, validate
from data_pipeline.workers import Threads
from fm.config import changed_settings
from fm.model import files
from fm.model.baselines import Baseline
from fm.model.files import EMA_FILE, MODEL_FILE, WEIGHTS_FILE
from fm.model.network import ImportedModel
from fm.model.surrogate import Surrogate
from fm.model.wavelit import WaveLiTFM

T = TypeVar("T")

FORMAT_VERSION = 3  # 3: the digest of state.json
READABLE = (2, 3)
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_STEP = re.compile(r"step_(\d{8,})")
EARLIER = {  # keys that some checkpoints of format 2 lack
    "symmetries": {},
    "gate": {**dict.fromkeys(("before", "best", "limit", "scored")), "failed": False},
}


@dataclass(frozen=True)
class _Registry(Strict):
    channels: tuple[str, ...]
    cards: dict[str, Any]


@dataclass(frozen=True)
class _Guard(Strict):
    refused: tuple[int, ...]
    history: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class _Best(Strict):
    worsening: float
    diverged: int
    score: float


@dataclass(frozen=True)
class _Gate(Strict):
    before: dict[str, float | None] | None
    best: _Best | None
    failed: bool
    limit: float | None
    scored: Any


@dataclass(frozen=True)
class _State(Strict):
    """The keys of state.json. A recipe is checked when it is resolved, `files` by `read_listing`."""

    format_version: int
    step: Annotated[int, at_least(0)]
    recipe: dict[str, dict[str, Any] | None]
    registry: _Registry
    shards: dict[str, str]
    symmetries: dict[str, tuple[str, ...]]
    sampling: Any  # checked by fm/training/mixing.py
    guard: _Guard
    gate: _Gate
    files: Any


@contextmanager
def _user_errors(prefix: str = "") -> Iterator[None]:
    """Turn errors of reading a model's files into UserError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{prefix}{error}") from error


def list_checkpoints(root: Path) -> dict[int, Path]:
    """Return step -> folder of the checkpoints under `root`, newest first, whole or not.

    UserError if `root` is a link out of the run: old checkpoints there would be deleted.
    """
    if not inside(root.parent, root.name).is_dir():
        return {}
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return dict(sorted(((int(p.name.removeprefix("step_")), p) for p in found), reverse=True))


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint under `root`, or None if there is none at all. As `look_at_newest`."""
    found = look_at_newest(root, report, lambda path: (path, verify_checkpoint(path)))
    return found[0] if found else None


def look_at_newest(root: Path, report: Callable[[str], None], look: Callable[[Path], T]) -> T | None:
    """Return `look(path)` of the newest checkpoint under `root` that it accepts, or None if there is none at all.

    A checkpoint for which `look` raises UserError or OSError is reported and the one before it is tried. If a run
    deletes the checkpoint meanwhile, the folder is read again. UserError if all are damaged.
    """
    while True:
        found = list_checkpoints(root)
        for path in found.values():
            try:
                return look(inside(root, path.name))
            except (UserError, OSError) as error:
                if not path.exists():
                    break
                report(f"skipping a damaged checkpoint: {error}")
        else:
            break
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {root} is whole (see above). Restore one from a copy, or start "
            "afresh in another folder with run.dir=... (checkpoint.resume=never starts over in this one)."
        )
    return None


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare each file with its size and SHA-256 in state.json; return that. UserError if anything differs."""
    state = read_state(path)
    with _user_errors():
        files.verify_files(path / STATE_FILE, state)
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json. UserError if it is missing, altered, or of another format version or step."""
    file = path / STATE_FILE
    state = read_json(file)
    version = state.get("format_version")
    if version not in READABLE:
        raise UserError(
            f"{file}: checkpoint format {version!r:.20}, this version of the project reads format {FORMAT_VERSION}; "
            "use the version that wrote it, or see CHANGELOG.md"
        )
    if version != 2 or "digest" in state:
        state = unsealed(state, str(file))
    state = {**EARLIER, **state}
    validate(_State, state, str(file))
    with _user_errors():
        listing = files.read_listing(file, state)
    if not {MODEL_FILE, WEIGHTS_FILE, EMA_FILE, OPTIMIZER_FILE} <= listing.keys():
        raise UserError(f"{file}: the list of files is incomplete")
    if _STEP.fullmatch(path.name) and int(path.name.removeprefix("step_")) != state["step"]:
        raise UserError(f"{file}: expected the state of {path.name}, got that of step {state['step']}")
    return state


def load_checkpoint(path: Path, model: Surrogate, average: Surrogate) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fill model and averaged model from a verified checkpoint that fits them; return its state and the moments."""
    state = read_state(path)
    with _user_errors():
        differences = changed_settings(files.read_description(path), model.description())
    if differences:
        raise UserError(
            f"the checkpoint {path} does not fit this run: {differences[0][:200]} (there -> here).\n"
            "Resume with the recipe, registry and shards that it was trained with, start afresh in another folder with "
            "run.dir=..., or finetune from it (finetune.pretrained)."
        )
    for target, name in ((model, WEIGHTS_FILE), (average, EMA_FILE)):
        target.load_state_dict(_read_tensors(path / name))
    return state, _read_tensors(path / OPTIMIZER_FILE)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    with _user_errors(f"{file}: cannot be read as safetensors: "):
        return load_tensors(file.read_bytes())


def find_checkpoint(source: Path | str) -> Path:
    """Return the folder meant by a run, one of its checkpoints, an exported model, or `hf://organization/name`.

    A run's is its newest whole checkpoint, or its best one if finetune.gate watched over it. UserError if there is
    none, or the Hub does not give it.
    """
    with _user_errors():
        path = files.locate(source)
    if (path / MODEL_FILE).is_file() or files.is_exported(path):
        return path
    newest = look_at_newest(path / "checkpoints", print, lambda found: (found, verify_checkpoint(found)))
    if newest is None:
        raise UserError(
            f"no checkpoint found: looked for {path / MODEL_FILE} and {path / 'checkpoints' / 'step_*'}.\n"
            "Expected a run directory (such as runs/quickstart), one of its checkpoints, or an exported model."
        )
    folder, state = newest
    gate = (state["recipe"].get("finetune") or {}).get("gate")
    return (newest_checkpoint(path / "best", print) if gate is not None else None) or folder


def use_checkpoint(source: Path | str, use: Callable[[Path], T]) -> T:
    """Return `use(find_checkpoint(source))`; find again if a run deletes that checkpoint meanwhile."""
    while True:
        found = find_checkpoint(source)
        try:
            return use(found)
        except (UserError, OSError):
            if found.exists():
                raise


def load_pretrained(source: Path | str) -> Surrogate:
    """Return the averaged model that `find_checkpoint` finds, of any kind, in eval mode on the CPU."""

    def load(checkpoint: Path) -> Surrogate:
        with _user_errors(f"{checkpoint}: cannot be loaded as a model: "):
            kind = files.kind_of(files.read_description(checkpoint))
            cls = WaveLiTFM if kind is None else {files.BASELINE: Baseline, files.IMPORTED: ImportedModel}[kind]
            return cls.from_pretrained(checkpoint)

    return use_checkpoint(source, load)


def verify_model(folder: Path) -> tuple[str, dict[str, Any]]:
    """Compare all files of a checkpoint or an exported model; return the digest of its weights, and its facts."""
    if files.is_exported(folder):
        with _user_errors():
            content = files.verify_exported(folder)
    elif (folder / STATE_FILE).is_file():
        content = verify_checkpoint(folder)
    else:
        raise UserError(
            f"{folder}: expected a run, one of its checkpoints, or an exported model (`fm export`, `fm extend`), "
            f"got a model's folder with neither {STATE_FILE} nor {files.EXPORT_FILE}, one of which holds its recipe"
        )
    return weights_digest(folder), content


def weights_digest(folder: Path) -> str:
    """Return the listed SHA-256 of the averaged weights of a checkpoint or an exported model. UserError if neither."""
    if not files.is_exported(folder):
        return str(read_state(folder)["files"][EMA_FILE]["sha256"])
    with _user_errors():
        return str(files.read_exported(folder)["files"][WEIGHTS_FILE]["sha256"])


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` optimizer steps; nothing in it changes when training goes on."""

    step: int
    description: dict[str, Any]  # the content of model.json
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
        file: {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in given.items()
        }
        for file, given in ((WEIGHTS_FILE, weights), (EMA_FILE, average), (OPTIMIZER_FILE, moments))
    }
    return Snapshot(step, copy.deepcopy(dict(description)), tensors, copy.deepcopy(dict(facts)))


def write_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Write the snapshot's checkpoint under `root` and return its folder.

    A crash at any moment leaves either the whole checkpoint or none. UserError when the disk is full, not writable or
    does not give back what was written; earlier checkpoints are untouched.
    """
    final = root / f"step_{snapshot.step:08d}"
    try:
        for leftover in root.iterdir() if root.exists() else ():
            if leftover.suffix == TEMPORARY_SUFFIX:  # of a killed save or deletion
                remove(leftover)
        # A checkpoint that was there is damaged, or of a run before this one (checkpoint.resume=never): it is replaced.
        with atomic_path(final) as folder:
            folder.mkdir()
            _write_files(folder, snapshot)
            verify_checkpoint(folder)
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__  # a full disk is a UserError already
        reason = (isinstance(cause, OSError) and cause.strerror) or str(error)
        raise UserError(
            f"could not save the checkpoint {final}: {reason}.\n"
            f"Earlier checkpoints in {root} are untouched. Free some space or make the folder writable, then start the "
            "same command again: it continues from the newest whole checkpoint."
        ) from error
    return final


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    """Write every file, one in memory at a time; state.json is the last."""
    listing = {}
    description = json.dumps(snapshot.description, indent=1).encode()
    for name in (MODEL_FILE, *snapshot.tensors):
        data = description if name == MODEL_FILE else serialize_tensors(snapshot.tensors[name])
        listing[name] = {"bytes": len(data), "sha256": sha256(data)}
        (folder / name).write_bytes(data)
    state = {"format_version": FORMAT_VERSION, "step": snapshot.step, **snapshot.facts, "files": listing}
    (folder / STATE_FILE).write_text(json.dumps(sealed(state), indent=1))


def prune_checkpoints(root: Path, newest: Path, keep: int, keep_every: int | None) -> None:
    """Delete checkpoints older than `newest`, which is whole, but `keep` - 1 and multiples of `keep_every`."""
    steps = list_checkpoints(root)
    newest_step = next(step for step, path in steps.items() if path == newest)
    older = [step for step in steps if step < newest_step][keep - 1 :]
    try:
        delete_checkpoints(steps[step] for step in older if not (keep_every and step % keep_every == 0))
    except OSError as error:
        raise UserError(
            f"could not delete old checkpoints in {root}: {error.filename}: {error.strerror}.\n"
            f"{newest} was saved and is whole. Make the folder writable, or raise checkpoint.keep."
        ) from error


def delete_checkpoints(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints, each at once: a kill leaves a whole one or none."""
    for path in checkpoints:
        remove(path.rename(path.with_name(path.name + TEMPORARY_SUFFIX)))


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Saves a run's checkpoints from a thread, one at a time. As a context it ends when the save in flight has ended.

    A failure is returned once, by `failure` or `wait`; the caller must look for it after every step.
    """

    def __init__(self, root: Path, keep: int, keep_every: int | None) -> None:
        self.root, self.keep, self.keep_every = root, keep, keep_every
        self._thread = Threads(1)
        self._save: Future[None] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return  # the user wants to leave at once
        failure = self.wait()
        if failure is not None and error is None:
            raise failure
        if failure is not None:
            print(failure, file=sys.stderr)

    def start(self, snapshot: Snapshot) -> None:
        """Begin to save; the caller has waited for the save before."""
        assert self._save is None, "a save is in flight"
        self._save = self._thread.submit(self._write_and_prune, snapshot)

    def failure(self) -> UserError | None:
        """Return why the last save failed, if it has by now. Does not wait."""
        return self.wait() if self._save is not None and self._save.done() else None

    def wait(self) -> UserError | None:
        """Wait for the save in flight; return why it failed, or None."""
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
