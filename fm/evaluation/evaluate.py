"""An evaluation cut into items: what its processes divide among them, and what a restart finds done or not.

An item is a range of one dataset's one-step windows, or one batch of its rollouts. What items hold, and the batches
within them, does not depend on the number of processes. So one process and several give the same errors, on one
machine bit for bit.

What an evaluation has finished: a file for each item, kept until the report is written.

    <report>/parts/
        identity.json                           whose parts these are: model, protocol, data, batch size, device
        <dataset>-one_step-00000.npz  ...       Measured: trajectories, steps, values
        <dataset>-rollout-00000.npz  ...        of each dataset's first rollouts also `shown`: truth and prediction

A file appears whole or not at all, and nothing in it is pickled. Parts of another identity are removed.

Evaluation: measure once, store the errors, derive the scores, the tables and the pictures from them.

Its items (fm/evaluation/evaluate.py) are divided among the processes; each leaves a part when it is finished
(fm/evaluation/evaluate.py). When all are there, the main process makes the report of them. Killed at any moment, an
evaluation goes on from its parts.

What is done with a run once it is trained: open it, and score it.

Scores on the valid split while training: a few windows and rollouts per dataset, by evaluation's own code.
"""

import heapq
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from data_pipeline.files import UserError, atomic_file, only_process, sha256
from data_pipeline.registry import Registry, load_folders, packaged_folder, user_folders
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import find_checkpoint, load_pretrained, verify_model
from fm.config import Recipe, ValidationSettings, load_recipe, resolve
from fm.datasets import check_channels
from fm.distributed import broadcast_from_main, make_accelerator, naming_lost_processes
from fm.evaluation.errors import FILE_NAME, FORMAT, DatasetErrors, ErrorFile, check_names
from fm.evaluation.measure import (
    Measured,
    Recorder,
    as_errors,
    as_sample,
    longest_recorder,
    measure_rollouts,
    measure_windows,
    one_step_errors,
    one_step_length,
    one_step_windows,
    rollout_batches,
    rollout_errors,
    rollout_steps,
    shown_channel,
)
from fm.evaluation.protocol import Protocol, load_protocol
from fm.evaluation.report import write_report
from fm.evaluation.samples import Domain, Sample, evenly_spaced
from fm.evaluation.scores import score
from fm.evaluation.tables import score_table
from fm.model.files import CARDS, RECIPE_FILE, is_exported
from fm.model.surrogate import Surrogate

BATCHES = 8  # of an item of one-step windows, at most


@dataclass(frozen=True)
class Item:
    """A piece of an evaluation that is measured as a whole."""

    dataset: str
    task: str  # one_step or rollout
    number: int  # among those of its dataset and task
    ids: tuple[int, ...]  # of windows (one_step), or of trajectories, longest first (rollout)
    frames: int  # predictions that are scored
    cost: int  # predictions x grid cells

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}-{self.number:05d}"


def list_items(readers: Mapping[str, ShardReader], protocol: Protocol, batch_size: int) -> list[Item]:
    """All items of an evaluation: dataset by dataset, one step before rollouts."""
    return [
        item
        for reader in readers.values()
        for item in [*_one_step(reader, protocol, batch_size), *_rollouts(reader, protocol, batch_size)]
    ]


def divide(items: Sequence[Item], processes: int) -> list[list[Item]]:
    """What each process measures, most expensive first: each item goes to the process with the least to do so far.

    A pure function, so that each process knows its share without asking (Graham's LPT rule, SIAM J. Appl. Math. 17,
    1969: the last one ends at most 4/3 as late as is possible).
    """
    loads = [(0, process) for process in range(processes)]
    shares: list[list[Item]] = [[] for _ in range(processes)]
    for item in sorted(items, key=lambda item: (-item.cost, item.name)):
        load, process = heapq.heappop(loads)
        shares[process].append(item)
        heapq.heappush(loads, (load + item.cost, process))
    return shares


def _one_step(reader: ShardReader, protocol: Protocol, batch_size: int) -> list[Item]:
    windows = one_step_windows(reader, protocol)
    ranges = np.array_split(windows, -(-len(windows) // (BATCHES * batch_size)))
    return [
        Item(reader.dataset, "one_step", number, tuple(ids.tolist()), len(ids), len(ids) * _cells(reader))
        for number, ids in enumerate(ranges)
    ]


def _rollouts(reader: ShardReader, protocol: Protocol, batch_size: int) -> list[Item]:
    items = []
    for number, ids in enumerate(rollout_batches(reader, range(reader.num_trajectories), protocol, batch_size)):
        steps = [rollout_steps(reader, trajectory, protocol) for trajectory in ids]
        cost = len(ids) * steps[0] * _cells(reader)  # those that end early go on with the batch
        items.append(Item(reader.dataset, "rollout", number, tuple(ids), sum(steps), cost))
    return items


def _cells(reader: ShardReader) -> int:
    height, width = reader.manifest.grid
    return height * width


PART_FORMAT = 1
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
        self.identity = json.loads(json.dumps({"format": PART_FORMAT, **identity}))

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


def evaluate_model(
    model: Surrogate,
    readers: Mapping[str, ShardReader],
    out: Path,
    protocol: Protocol,
    device: torch.device,
    batch_size: int = 8,
    progress: bool = True,
    origin: Mapping[str, Any] | None = None,
    domains: Mapping[str, Domain] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Score the model on every reader's dataset under the protocol; returns what scores.json holds.

    One-step over the protocol's windows of the split, one rollout per trajectory. Writes the files of
    `fm.evaluation.report.write_report` under `out`; what an interrupted evaluation of the same model, data and
    protocol has left there is not measured again. With an `accelerator` all its processes call this and share the
    work. `origin` (plain JSON) says whose scores they are and is stored with them; `domains`, by dataset, are the axes
    of pictures. The model stays on `device`; its training mode is put back.
    Raises UserError where model, data and protocol do not fit together, or the disk is full.
    """
    readers = dict(sorted(readers.items()))
    _check(model, readers, protocol)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    wait: Callable[[], object] = accelerator.wait_for_everyone if accelerator else lambda: None
    job = _Job(model, readers, protocol, device, batch_size)
    items, parts = list_items(readers, protocol, batch_size), Parts(out, job.identity())
    with only_process(out, "evaluation") if rank == 0 else nullcontext():
        if rank == 0:
            parts.prepare()
        wait()
        parts.check()
        _measure_share(job, items, parts, rank, processes, progress)
        wait()
        if rank == 0:
            datasets, samples = job.collect(items, parts, domains or {})
            errors = ErrorFile(protocol, datasets, dict(origin or {}))
            write_report(out, errors, score(errors), samples)
            remove_parts(out)
        wait()
    scores: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return scores


@dataclass(frozen=True)
class _Job:
    """What is measured, and where."""

    model: Surrogate
    readers: Mapping[str, ShardReader]
    protocol: Protocol
    device: torch.device
    batch_size: int

    def identity(self) -> dict[str, Any]:
        """What the errors depend on, but for rounding: parts of another identity may not be taken over."""
        parts = [json.dumps(self.model.description(), sort_keys=True).encode()]
        parts += [
            name.encode() + tensor.cpu().numpy().tobytes() for name, tensor in sorted(self.model.state_dict().items())
        ]
        return {
            "model": sha256(*parts),
            "protocol": self.protocol.to_json(),
            "data": {name: reader.manifest.digest for name, reader in self.readers.items()},
            "batch_size": self.batch_size,
            "device": self.device.type,
        }

    def measure(self, item: Item, advance: Callable[[int], object]) -> Part:
        """The errors of one item. `advance` is told how many predictions were made."""
        reader = self.readers[item.dataset]
        if item.task == "one_step":
            windows = np.array(item.ids, np.int64)
            return Part(measure_windows(self.model, reader, windows, self.device, self.batch_size, advance))
        shown = longest_recorder(reader, self.protocol)
        measured = measure_rollouts(self.model, reader, item.ids, self.protocol, self.device, advance, shown)
        return Part(measured, shown.stacked())

    def collect(
        self, items: Sequence[Item], parts: Parts, domains: Mapping[str, Domain]
    ) -> tuple[dict[str, DatasetErrors], list[Sample]]:
        """What all parts hold: the errors of each dataset, and what pictures show of it."""
        datasets, samples = {}, []
        for name, reader in self.readers.items():
            found = [(item, parts.require(item)) for item in items if item.dataset == name]
            datasets[name] = self._errors(reader, found)
            kept = longest_recorder(reader, self.protocol)
            vrmse = datasets[name].rollout.vrmse("model", self.protocol.eps)[kept.trajectory]
            shown = [part.shown for _, part in found if part.shown is not None]
            samples += [as_sample(reader, kept, fields, vrmse, domains.get(name)) for fields in shown]
        return datasets, samples

    def _errors(self, reader: ShardReader, found: Sequence[tuple[Item, Part]]) -> DatasetErrors:
        manifest, trajectories = reader.manifest, list(range(reader.num_trajectories))
        horizon = max(rollout_steps(reader, trajectory, self.protocol) for trajectory in trajectories)
        tasks = {
            task: as_errors(
                [part.measured for item, part in found if item.task == task],
                trajectories,
                length,
                len(manifest.state_channels),
            )
            for task, length in (("one_step", one_step_length(reader)), ("rollout", horizon))
        }
        ids = np.array(trajectories, np.int64)
        return DatasetErrors(manifest.state_channels, ids, **tasks, data_digest=manifest.digest, grid=manifest.grid)


def _measure_share(job: _Job, items: Sequence[Item], parts: Parts, rank: int, processes: int, progress: bool) -> None:
    """Measure what this process has to do; the main one's bar counts the frames of all."""
    share = [item for item in divide(items, processes)[rank] if parts.load(item) is None]
    kept = parts.finished(items)
    if rank == 0 and kept:
        print(f"{parts.folder}: {len(kept)} of {len(items)} parts are there, measuring the rest")
    bar = tqdm(
        total=sum(item.frames for item in items),
        initial=sum(item.frames for item in kept),
        desc="evaluate" if processes == 1 else f"evaluate ({processes} processes)",
        unit="frame",
        disable=rank > 0 or not progress,
        leave=False,
    )
    training = job.model.training
    job.model.to(job.device).eval()
    try:
        with bar:
            for item in share:
                bar.set_postfix_str(f"{item.dataset}, {item.task}")
                parts.save(item, job.measure(item, bar.update))
                bar.update(sum(one.frames for one in parts.finished(items)) - bar.n)  # what others have finished
    finally:
        job.model.train(training)


def _check(model: Surrogate, readers: Mapping[str, ShardReader], protocol: Protocol) -> None:
    if protocol.context != 1:
        raise UserError(
            f"protocol {protocol.name}: expected context 1, the frames this model sees; got {protocol.context}"
        )
    if not readers:
        raise UserError("evaluate: expected at least one dataset, got none")
    for name, reader in readers.items():
        manifest = reader.manifest
        try:
            check_names(name, manifest.state_channels)
        except ValueError as error:
            raise UserError(f"{reader.folder}: {error}: pictures and errors are kept under it") from error
        if manifest.split != protocol.split:
            raise UserError(
                f"{reader.folder}: protocol {protocol.name} scores the split {protocol.split}, this is {manifest.split}"
            )
        if name not in model.specs:
            raise UserError(
                f"evaluate: expected datasets that the model knows ({', '.join(model.specs)}), got {name}: "
                "leave that one out"
            )
        spec = model.specs[name]
        check_channels(reader, spec.state_channels, spec.constant_channels, "the model was trained on")


@dataclass(frozen=True)
class Trained:
    """Averaged weights, on the CPU, and what is known of them: of a run, of a checkpoint, or of an exported model."""

    checkpoint: Path  # the folder with the weights
    report: Path  # where reports go by default
    step: int
    weights: str  # SHA-256 of their file
    recipe: Recipe
    model: Surrogate
    shards: Mapping[str, str]  # dataset -> digest of the shards that it is known from
    lineage: Mapping[str, Any]  # what it comes from, as artefact.json has it; empty where training began with nothing
    licence: str | None  # SPDX identifier; a run has none

    @classmethod
    def open(cls, source: Path | str) -> "Trained":
        """What `find_checkpoint` finds. UserError if there is nothing, or it is damaged."""
        folder = find_checkpoint(source)
        weights, facts = verify_model(folder)
        if is_exported(folder):  # is left as it is
            recipe, report = load_recipe(folder / RECIPE_FILE), Path(f"{facts['name']}_report")
            shards = {name: one["shards"] for name, one in facts["datasets"].items()}
            lineage, licence = facts["lineage"], facts["licence"]
        else:
            recipe = resolve(facts["recipe"], str(folder / "state.json"))
            report = (folder.parent.parent if Path(source) == folder else Path(source)) / "report"
            shards = facts["shards"]
            lineage, licence = {"pretrained": recipe.finetune.pretrained} if recipe.finetune else {}, None
        model = load_pretrained(folder)
        return cls(folder, report, facts["step"], weights, recipe, model, shards, lineage, licence)

    def card_folders(self) -> list[Traversable]:
        """The folders that make the registry: an exported model has its own. UserError where one is not there."""
        if is_exported(self.checkpoint):
            return [self.checkpoint / CARDS]
        return [packaged_folder(), *user_folders(self.recipe.data.registry)]

    def registry(self) -> Registry:
        """The cards. UserError where they are not at hand."""
        return load_folders(self.card_folders())

    def readers(self, datasets: Sequence[str], split: str, shards: str | Path | None = None) -> dict[str, ShardReader]:
        """Readers of `shards`, the recipe's by default. UserError where there are none."""
        stream = self.recipe.data.stream(self.recipe.sampling.shuffle, self.recipe.sampling.shards_per_block)
        return open_readers(shards or self.recipe.data.shards, datasets, split, stream=stream)


def evaluate_run(
    run: Path | str,
    shards: str | Path | None = None,
    out: Path | None = None,
    protocol: str | None = None,
    split: str | None = None,
    windows: int | None = None,
) -> Path:
    """Score the averaged weights of a run, or of an exported model, and print the table. Returns the report's folder.

    Under a launcher all processes share the work. `shards`, `protocol` (a name or a file) default to the recipe's,
    `split` to the protocol's, `out` to <run>/report, for an exported model to <name>_report where you are. With
    `windows`, so many one-step windows of each dataset are scored, not all. A report of the same weights, data and
    protocol is not made again; one that was interrupted goes on. UserError if there is no checkpoint or there are no
    shards.
    """
    if windows is not None and windows < 1:
        raise UserError(f"--windows: expected at least 1 one-step window per dataset, got {windows}")
    trained = Trained.open(run)
    checkpoint, recipe = trained.checkpoint, trained.recipe
    chosen = load_protocol(protocol or recipe.validation.protocol)
    chosen = replace(chosen, split=split or chosen.split, one_step_windows=windows or chosen.one_step_windows)
    readers = trained.readers(sorted(trained.model.specs), chosen.split, shards)
    out = out or trained.report
    origin = {"checkpoint": str(checkpoint), "step": trained.step, "weights": trained.weights}
    identity = {
        "weights": _weights(origin),
        "protocol": chosen.to_json(),
        "data": {name: reader.manifest.digest for name, reader in readers.items()},
    }
    with naming_lost_processes():
        accelerator = make_accelerator(recipe.train.clip)  # nothing is clipped; DeepSpeed wants to be told
        say = print if accelerator.is_main_process else lambda text: None
        if broadcast_from_main(accelerator, lambda: _holds(out, identity)):
            if accelerator.is_main_process:
                remove_parts(out)  # of an evaluation that was killed when all but this was done
            say(f"{out} already holds the scores of {checkpoint.name}:\n\n{score_table(_read_scores(out))}")
        else:
            # float64 sums, which Apple's GPUs do not have
            device = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
            domains = _domains(trained, sorted(readers), say)
            scores = evaluate_model(
                trained.model, readers, out, chosen, device, origin=origin, domains=domains, accelerator=accelerator
            )
            say(f"{checkpoint}, averaged weights:\n\n{score_table(scores)}\nreport: {out}")
        accelerator.end_training()
    return out


def _domains(trained: Trained, datasets: Sequence[str], say: Callable[[str], object]) -> dict[str, Domain]:
    """The physical extent of each dataset whose card tells. A model can be scored where its cards are not at hand."""
    try:
        cards = trained.registry().cards
    except UserError as error:
        say(f"pictures will have no physical axes: {error}")
        return {}
    return {name: domain for name in datasets if name in cards and (domain := cards[name].domain) is not None}


def _holds(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the report is there already, whole: of this format, with its page and with errors that can be read."""
    if not (out / "scores.json").is_file():
        return False
    scores = _read_scores(out)
    try:
        ErrorFile.load(out / FILE_NAME)
    except UserError:
        return False
    whole = scores.get("format") == FORMAT and (out / "index.html").is_file()
    return whole and _identity(scores) == json.loads(json.dumps(identity))


def _identity(scores: Mapping[str, Any]) -> dict[str, Any]:
    data = {name: part["data_digest"] for name, part in scores["datasets"].items()}
    return {"weights": _weights(scores["origin"]), "protocol": scores["protocol"], "data": data}


def _weights(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Which weights they are, wherever the checkpoint lies."""
    return {key: origin.get(key) for key in ("step", "weights")}


def _read_scores(out: Path) -> dict[str, Any]:
    file = out / "scores.json"
    try:
        scores = json.loads(file.read_text())
        _identity(scores)
    except OSError as error:
        raise UserError(f"no scores at {file} ({error.strerror}); make them with `fm evaluate RUN`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a report's scores.json ({error}); remove it and evaluate again") from error
    return scores


SHOWN_STEPS = 16  # of one rollout, for TensorBoard's pictures


@dataclass(frozen=True)
class ValidationResult:
    """Scores as `fm.evaluation.scores.score` gives them, and of each dataset one rollout to look at."""

    scores: Mapping[str, Any]
    samples: Mapping[str, Sample]

    @property
    def mean_ratio(self) -> float | None:
        """Geometric mean over datasets of one-step VRMSE over persistence; None where a prediction was not finite."""
        return self.scores["geometric_mean_ratio_to_persistence"]

    def ratios(self) -> dict[str, float | None]:
        """One-step VRMSE over persistence's by dataset; None where it is not finite."""
        return {name: part["one_step"]["ratio_to_persistence"] for name, part in self.scores["datasets"].items()}

    def one_step(self) -> dict[str, dict[str, float | None]]:
        """One-step VRMSE, and that over persistence's, by dataset; None where it is not finite."""
        lead = self.scores["protocol"]["trajectories"]
        return {
            name: {"vrmse": part["one_step"][lead], "over_persistence": part["one_step"]["ratio_to_persistence"]}
            for name, part in self.scores["datasets"].items()
        }

    def scalars(self) -> dict[str, float]:
        """TensorBoard tags and values; NaN where there is no finite score."""
        lead = self.scores["protocol"]["trajectories"]
        values: dict[str, float | None] = {"valid_over_persistence/geometric_mean": self.mean_ratio}
        for name, part in self.scores["datasets"].items():
            values[f"valid_vrmse/{name}"] = part["one_step"][lead]
            values[f"valid_over_persistence/{name}"] = part["one_step"]["ratio_to_persistence"]
            for channel, cell in part["one_step"]["per_channel"].items():
                values[f"valid_vrmse_field/{name}/{channel}"] = cell[lead]
            for window, cell in part["windows"].items():
                if cell is not None:
                    values[f"rollout_vrmse/{name}/{window}"] = cell[lead]
        return {tag: float("nan") if value is None else value for tag, value in values.items()}


def protocol_windows(name: str) -> list[str]:
    """Names of the rollout windows of a protocol, by its name or file. UserError where there is none."""
    return list(load_protocol(name).windows)


def validate(
    model: Surrogate, readers: Mapping[str, ShardReader], settings: ValidationSettings, device: torch.device
) -> ValidationResult:
    """Score `settings.windows` windows, evenly spaced, and `settings.rollouts` rollouts of each dataset."""
    protocol = replace(load_protocol(settings.protocol), split="valid", one_step_windows=settings.windows)
    datasets, samples = {}, {}
    for name, reader in sorted(readers.items()):
        trajectories = list(range(min(settings.rollouts, reader.num_trajectories)))
        recorder = _recorder(reader, protocol)
        one_step = one_step_errors(model, reader, one_step_windows(reader, protocol), device)
        rollouts = rollout_errors(model, reader, trajectories, protocol, device, watch=recorder)
        manifest, ids = reader.manifest, np.array(trajectories, np.int64)
        datasets[name] = DatasetErrors(manifest.state_channels, ids, one_step, rollouts, manifest.digest, manifest.grid)
        fields = recorder.stacked()
        if fields is not None:
            samples[name] = as_sample(reader, recorder, fields, rollouts.vrmse("model", protocol.eps)[0])
    return ValidationResult(score(ErrorFile(protocol, datasets)), samples)


def _recorder(reader: ShardReader, protocol: Protocol) -> Recorder:
    """Keeps some steps of the first trajectory."""
    shown = evenly_spaced(rollout_steps(reader, 0, protocol), SHOWN_STEPS)
    return Recorder(0, shown_channel(reader.manifest), tuple(index + 1 for index in shown))
