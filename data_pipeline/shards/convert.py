"""Write one shard from its plan: trajectory after trajectory, a few MiB of frames in memory at a time."""

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file, atomic_path, read_json
from data_pipeline.schema import Strict, canonical, validate
from data_pipeline.shards.audit import Summary, TrajectoryAudit, merge
from data_pipeline.shards.format import Shard, Trajectory
from data_pipeline.shards.plan import SplitPlan
from data_pipeline.shards.tar import (
    Encoder,
    ShardWriter,
    array_crcs,
    array_offsets,
    check_shard,
    sample_key,
    shard_name,
)
from data_pipeline.well.findings import Finding
from data_pipeline.well.hdf5 import WellFile, block_frames
from data_pipeline.well.stats import SKIP_NONFINITE, Stats
from data_pipeline.workers import OnBytes

PARTIAL = ".partial"  # folder of the records of finished shards, until the manifest is there


@dataclass(frozen=True)
class ShardTask:
    """A shard to write."""

    plan: SplitPlan
    shard: int
    stats: Stats
    keep_nonfinite: bool  # report NaN and Inf in place of ending the run


@dataclass(frozen=True)
class ShardRecord(Strict):
    """What is known of one finished shard, until its manifest is written."""

    plan: str  # digest
    shard: Shard
    trajectories: tuple[Trajectory, ...]
    findings: tuple[Finding, ...]
    summary: Summary
    rounding: tuple[float, ...]  # float16: worst error of each state channel, in std


def saved_record(plan: SplitPlan, shard: int) -> ShardRecord | None:
    """Return the record of a shard that an earlier run finished under the same plan, if the shard is still whole."""
    try:
        record: ShardRecord = validate(ShardRecord, read_json(_record_path(plan, shard)), "record")
        check_shard(plan.folder / record.shard.name, record.shard.bytes)
    except UserError:  # not there, or cut off: the shard is written again
        return None
    return record if record.plan == plan.digest else None


def _record_path(plan: SplitPlan, shard: int) -> Path:
    return plan.folder / PARTIAL / f"{shard_name(shard)}.json"


def write_shard(task: ShardTask, on_bytes: OnBytes) -> ShardRecord:
    """Write a shard, then its record; neither appears before it is whole.

    Raises UserError for NaN or Inf in a field unless they are kept, for values that float16 does not hold, for a file
    that cannot be read, and for a full disk.
    """
    plan = task.plan
    encoder = Encoder(plan.card.state_channels, task.stats) if plan.dtype == "float16" else None
    with atomic_path(plan.folder / shard_name(task.shard)) as temporary:
        with temporary.open("wb") as output:
            shard, copies = _copy_all(task, encoder, output, on_bytes)
        offsets = array_offsets(temporary)
    record = ShardRecord(
        plan=plan.digest,
        shard=shard,
        trajectories=tuple(copy.record(offsets) for copy in copies),
        findings=tuple(finding for copy in copies for finding in copy.findings),
        summary=merge([copy.summary for copy in copies]),
        rounding=() if encoder is None else tuple(map(float, encoder.worst)),
    )
    with atomic_file(_record_path(plan, task.shard), durable=False) as file:
        file.write(canonical(record))
    return record


def measure_speed(plan: SplitPlan, stats: Stats | None, num_bytes: int) -> tuple[int, float]:
    """Convert up to `num_bytes` of a plan's first trajectory into nothing; return the bytes and the seconds.

    Without statistics, which would have to be computed first, the values are taken as float32.
    """
    one = plan.trajectories[0]
    frame_bytes = plan.source_bytes(0) // sum(each.frames for each in plan.trajectories[slice(*plan.shards[0])])
    one = replace(one, frames=max(1, min(one.frames, num_bytes // frame_bytes)))
    plan = replace(plan, trajectories=(one,), shards=((0, 1),))
    if stats is None:
        plan, stats = replace(plan, dtype="float32"), {"std": dict.fromkeys(plan.card.state_channels, 1.0)}
    encoder = Encoder(plan.card.state_channels, stats) if plan.dtype == "float16" else None
    with open(os.devnull, "wb") as nowhere:
        start = time.perf_counter()
        _copy_all(ShardTask(plan, 0, stats, keep_nonfinite=True), encoder, nowhere, lambda num_bytes: None)
        return one.frames * frame_bytes, time.perf_counter() - start


def _copy_all(
    task: ShardTask, encoder: Encoder | None, output: BinaryIO, on_bytes: OnBytes
) -> tuple[Shard, list["_Copy"]]:
    plan, copies = task.plan, list[_Copy]()
    with ShardWriter(output) as writer:
        in_shard = range(*plan.shards[task.shard])
        for source, numbers in groupby(in_shard, lambda number: plan.trajectories[number].source):
            with WellFile(plan.files[source], plan.card) as file:
                for number in numbers:
                    copies.append(_Copy(task, number, encoder, writer, on_bytes))
                    copies[-1].run(file)
        return writer.finish(shard_name(task.shard)), copies


class _Copy:
    """The copy of one trajectory from its HDF5 file into the shard, with its audit and its checksums."""

    def __init__(
        self, task: ShardTask, number: int, encoder: Encoder | None, writer: ShardWriter, on_bytes: OnBytes
    ) -> None:
        self.task, self.plan, self.number, self.encoder = task, task.plan, number, encoder
        self.writer, self.on_bytes = writer, on_bytes
        self.planned = self.plan.trajectories[number]
        self.shape = (len(self.plan.card.state_channels), *self.plan.grid)
        self.crcs: list[Future[str]] = []
        self.constants_crc = ""

    def run(self, file: WellFile) -> None:
        card, source_index = self.plan.card, self.planned.source_index
        stds = self.task.stats["std"]
        audit = TrajectoryAudit(card.state_channels, card.constant_channels, self.plan.grid, stds, card.ranges)
        times = file.times(source_index)
        for first, stop in self._chunks():
            key, shape = sample_key(self.number, first), (stop - first, *self.shape)
            self.writer.add_array(f"{key}.fields.npy", shape, self.plan.dtype, self._frames(file, audit, first, stop))
            if first == 0 and card.constant_channels:
                constants = self._constants(file, audit)
                self.writer.add_array(f"{key}.constants.npy", constants.shape, "float32", [constants])
            self.writer.add_json(f"{key}.meta.json", self._meta(first, times[first:stop].tolist()))
        self.findings = audit.findings(self.plan.sources[self.planned.source].name, source_index)
        self.summary = audit.summary()

    def record(self, offsets: dict[str, int]) -> Trajectory:
        """Return the trajectory's entry in the manifest; `offsets` are those of the shard's arrays, by name."""
        keys = [sample_key(self.number, first) for first, _ in self._chunks()]
        return Trajectory(
            **vars(self.planned),
            shard=self.task.shard,
            offsets=tuple(offsets[f"{key}.fields.npy"] for key in keys),
            crc32="".join(crcs.result() for crcs in self.crcs),
            constants_offset=offsets.get(f"{keys[0]}.constants.npy"),
            constants_crc32=self.constants_crc,
            segments=((0, self.planned.frames),),
        )

    def _chunks(self) -> Iterator[tuple[int, int]]:
        frames, per_chunk = self.planned.frames, self.plan.frames_per_chunk
        return ((first, min(first + per_chunk, frames)) for first in range(0, frames, per_chunk))

    def _frames(self, file: WellFile, audit: TrajectoryAudit, start: int, end: int) -> Iterator[np.ndarray]:
        """Read and check the frames of a chunk; yield them as they are stored, a few MiB at a time."""
        source_index, step = self.planned.source_index, block_frames(4 * math.prod(self.shape))
        for first in range(start, end, step):
            frames = file.read(source_index, first, min(first + step, end))
            audit.add(frames)
            if not self.task.keep_nonfinite and not audit.finite:
                file.check_finite(frames, source_index, first, SKIP_NONFINITE)
            self.on_bytes(frames.nbytes)
            if self.encoder is not None:
                where = f"{file.path}: trajectory {source_index}, frames from {first} on"
                frames = self.encoder.encode(frames, where)
            self.crcs.append(self.writer.crcs(frames))
            yield frames

    def _constants(self, file: WellFile, audit: TrajectoryAudit) -> np.ndarray:
        constants = np.ascontiguousarray(file.constants(self.planned.source_index), "<f4")
        if not self.task.keep_nonfinite:
            file.check_finite(constants, self.planned.source_index, None, SKIP_NONFINITE)
        audit.add_constants(constants)
        self.constants_crc = array_crcs(constants[None])
        return constants

    def _meta(self, first: int, times: list[float]) -> dict[str, Any]:
        """Return the meta.json of a sample: what a reader needs who has no manifest."""
        plan, planned = self.plan, self.planned
        meta = {
            "dataset": plan.card.name,
            "split": plan.split,
            "trajectory": self.number,
            "first_frame": first,
            "time": times,
            "dt": planned.dt,
            "scalars": planned.scalars,
            "boundary": plan.boundary,
            "state_channels": plan.card.state_channels,
            "constant_channels": plan.card.constant_channels,
            "source_file": plan.sources[planned.source].name,
            "source_trajectory": planned.source_index,
        }
        if self.encoder is not None:  # value = stored * scale + offset
            meta["encoding"] = {name: list(pair) for name, pair in self.encoder.encoding.items()}
        return meta
