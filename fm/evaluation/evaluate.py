"""Evaluation: measure once, store the errors, derive the scores, the tables and the pictures from them.

Its items (fm/evaluation/items.py) are divided among the processes; each leaves a part when it is finished
(fm/evaluation/parts.py). When all are there, the main process makes the report of them. Killed at any moment, an
evaluation goes on from its parts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.files import only_process
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.items import Item, divide, list_items
from fm.evaluation.measure import as_errors, measure_rollouts, measure_windows, one_step_length, rollout_steps
from fm.evaluation.parts import Part, Parts, remove_parts
from fm.evaluation.shown import as_sample, longest_recorder
from fm.report.sample import Domain, Sample
from fm.report.write import write_report
from fm.scores.errors import DatasetErrors, ErrorFile, check_names
from fm.scores.protocol import Protocol
from fm.scores.scoring import score
from fm.specs import check_channels
from fm.surrogate import Surrogate


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
    `fm.report.write.write_report` under `out`; what an interrupted evaluation of the same model, data and protocol has
    left there is not measured again. With an `accelerator` all its processes call this and share the work. `origin`
    (plain JSON) says whose scores they are and is stored with them; `domains`, by dataset, are the axes of pictures.
    The model stays on `device`; its training mode is put back.
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
        digest = hashlib.sha256(json.dumps(self.model.description(), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return {
            "model": digest.hexdigest(),
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
