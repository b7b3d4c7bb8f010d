"""The statistics of each dataset that is converted: its stats.yaml, or computed once from its train files and kept.

Writes one shard from its plan: trajectory after trajectory, a few MiB of frames in memory at a time.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.files import UserError, atomic_file
from data_pipeline.registry import Card
from data_pipeline.schema import canonical, decode, encode, load_json
from data_pipeline.shards.audit import Sample, TrajectoryAudit, merge
from data_pipeline.shards.format import Finding, Shard, Trajectory
from data_pipeline.shards.plan import Plan, stats_file
from data_pipeline.shards.tar import (
    Appended,
    Encoder,
    ShardWriter,
    array_crcs,
    check_shard,
    encoding_of,
    sample_key,
    shard_name,
)
from data_pipeline.well.hdf5 import WellFile, block_frames, split_files
from data_pipeline.well.layout import File, Folder, file_bytes
from data_pipeline.well.stats import Stats, compute_stats, read_stats
from data_pipeline.workers import OnBytes, run_tasks

FROM_FILE, FROM_DATA = "stats.yaml", "train files"  # where statistics come from
_NAME = "stats.json"


@dataclass(frozen=True)
class _Task:
    card: Card
    files: tuple[File, ...]
    frames_per_chunk: int
    result: Path
    key: str
    skip_nonfinite: bool


def dataset_stats(
    folders: Mapping[str, Folder], out: Path, plans: Sequence[Plan], jobs: int, skip_nonfinite: bool
) -> dict[str, tuple[Stats, str]]:
    """Dataset -> statistics and where they come from, for each dataset with a plan.

    folders: of each dataset. `skip_nonfinite`: frames with NaN or Inf count for nothing, else they raise UserError.
    """
    found: dict[str, tuple[Stats, str]] = {}
    tasks = []
    for plan in {plan.card.name: plan for plan in plans}.values():
        card, folder = plan.card, folders[plan.card.name]
        path = stats_file(folder)
        if path is not None:
            found[card.name] = (read_stats(path, card), FROM_FILE)
            continue
        files: tuple[File, ...] = tuple(split_files(folder, "train"))
        task = _Task(card, files, plan.frames_per_chunk, out / card.name / _NAME, plan.stats_key, skip_nonfinite)
        saved = _saved(task)
        if saved is None:
            tasks.append(task)
        else:
            found[card.name] = (saved, FROM_DATA)
    # What a task is worth in the bar: the size of its files, close to the bytes it reads.
    num_bytes = sum(file_bytes(file) for task in tasks for file in task.files)
    with closing(run_tasks(_compute_and_save, tasks, jobs, num_bytes, "statistics")) as results:
        found |= {task.card.name: (stats, FROM_DATA) for task, stats in results}
    return found


def _saved(task: _Task) -> Stats | None:
    """Statistics that an earlier run computed from the same files."""
    if not task.result.exists():
        return None
    saved = load_json(task.result)
    return decode(Stats, saved.get("stats"), str(task.result)) if saved.get("key") == task.key else None


def _compute_and_save(task: _Task, on_bytes: OnBytes) -> Stats:
    stats = compute_stats(task.files, task.card, task.frames_per_chunk, on_bytes, task.skip_nonfinite)
    with atomic_file(task.result) as file:
        file.write(canonical({"key": task.key, "stats": stats}))
    return stats


PARTIAL = ".partial"  # folder of the records of finished shards, gone when the manifest is there
_NUM_BUFFERS = 4  # one being read, the one before for comparison, two more being checksummed


@dataclass(frozen=True)
class Part:
    """The record of one finished shard, until its manifest is written."""

    plan: str
    shard: Shard
    trajectories: tuple[Trajectory, ...]
    findings: tuple[Finding, ...]
    sample: Sample
    rounding: tuple[float, ...]  # float16: worst error of each state channel, in std


@dataclass(frozen=True)
class ShardTask:
    plan: Plan
    shard: int
    stats: Stats
    keep_nonfinite: bool  # NaN and Inf are noted, else they end the run


def saved_part(plan: Plan, shard: int) -> Part | None:
    """The record of a shard that an earlier run finished under the same plan, if the shard is still whole."""
    try:
        part: Part = decode(Part, load_json(_part_path(plan, shard)), "record")
        check_shard(plan.folder / part.shard.name, part.shard.bytes)
    except UserError:  # not there, or cut off: the shard is written again
        return None
    return part if part.plan == plan.digest else None


def _part_path(plan: Plan, index: int) -> Path:
    return plan.folder / PARTIAL / f"{shard_name(index)}.json"


def write_shard(task: ShardTask, on_bytes: OnBytes) -> Part:
    """Writes a shard, then its record; neither appears before it is whole.

    Raises UserError for NaN or Inf in a field unless they are kept, for values that float16 does not hold, for a file
    that cannot be read, and for a full disk.
    """
    with atomic_file(task.plan.folder / shard_name(task.shard)) as output:
        part = _fill(task, output, on_bytes)
    with atomic_file(_part_path(task.plan, task.shard), durable=False) as record:
        record.write(canonical(encode(part)))
    return part


def _fill(task: ShardTask, output: BinaryIO, on_bytes: OnBytes) -> Part:
    plan = task.plan
    first, stop = plan.shards[task.shard]
    encoder = Encoder(plan.card.state_channels, task.stats) if plan.dtype == "float16" else None
    records: list[Trajectory] = []
    findings: list[Finding] = []
    samples: list[Sample] = []
    with ShardWriter(output) as writer:
        for source, numbers in groupby(range(first, stop), key=lambda number: plan.trajectories[number].source):
            with WellFile(plan.files[source], plan.card) as file:
                for number in numbers:
                    copy = _Copy(task, number, file, writer, encoder)
                    records.append(copy.run(on_bytes))
                    findings += copy.audit.findings(plan.sources[source].name, plan.trajectories[number].source_index)
                    samples.append(copy.audit.sample())
        shard = writer.finish(shard_name(task.shard))
    rounding = () if encoder is None else tuple(map(float, encoder.worst))
    return Part(plan.digest, shard, tuple(records), tuple(findings), merge(samples), rounding)


def rehearse(plan: Plan, stats: Stats | None, num_bytes: int) -> tuple[int, float]:
    """Converts up to `num_bytes` of a plan's first trajectory into nothing: bytes and seconds that it took.

    Without statistics, which would have to be computed first, the values are taken as float32.
    """
    one = plan.trajectories[0]
    frame_bytes = plan.source_bytes(0) // sum(each.frames for each in plan.trajectories[slice(*plan.shards[0])])
    one = replace(one, frames=max(1, min(one.frames, num_bytes // frame_bytes)))
    if stats is None:
        plan, stats = replace(plan, dtype="float32"), {"std": dict.fromkeys(plan.card.state_channels, 1.0)}
    task = ShardTask(replace(plan, trajectories=(one,), shards=((0, 1),)), 0, stats, keep_nonfinite=True)
    with open(os.devnull, "wb") as nowhere:
        start = time.perf_counter()
        _fill(task, nowhere, lambda num_bytes: None)
        return one.frames * frame_bytes, time.perf_counter() - start


class _Copy:
    """One trajectory on its way from the HDF5 file into the shard, block by block, under the eyes of the audit."""

    def __init__(
        self, task: ShardTask, number: int, file: WellFile, writer: ShardWriter, encoder: Encoder | None
    ) -> None:
        self.task, self.number, self.file, self.writer, self.encoder = task, number, file, writer, encoder
        self.plan, self.planned = task.plan, task.plan.trajectories[number]
        card = self.plan.card
        self.audit = TrajectoryAudit(
            card.state_channels, card.constant_channels, self.plan.grid, task.stats["std"], card.ranges
        )

    def run(self, on_bytes: OnBytes) -> Trajectory:
        """Copies all frames and the constant fields; returns the trajectory's record."""
        planned, per_chunk = self.planned, self.plan.frames_per_chunk
        constants = self._constants()
        offsets: list[int] = []
        written: list[Appended] = []
        constants_offset: int | None = None
        blocks = self._blocks(written, on_bytes)
        for first in range(0, planned.frames, per_chunk):
            count = min(per_chunk, planned.frames - first)
            key = sample_key(self.number, first)
            shape = (count, len(self.plan.card.state_channels), *self.plan.grid)
            offsets.append(self.writer.start_array(f"{key}.fields.npy", shape, self.plan.dtype))
            done = 0
            while done < count:
                done += next(blocks)
            self.writer.end_array()
            if first == 0 and constants is not None:
                constants_offset = self.writer.start_array(f"{key}.constants.npy", constants.shape)
                self.writer.extend(constants)
                self.writer.end_array()
            self.writer.add_json(f"{key}.meta.json", self._meta(first, count))
        return Trajectory(
            source=planned.source,
            source_index=planned.source_index,
            frames=planned.frames,
            dt=planned.dt,
            scalars=planned.scalars,
            shard=self.task.shard,
            offsets=tuple(offsets),
            crc32="".join(block.crcs() for block in written),
            constants_offset=constants_offset,
            constants_crc32="" if constants is None else array_crcs(constants[None]),
            segments=((0, planned.frames),),
        )

    def _constants(self) -> np.ndarray | None:
        if not self.plan.card.constant_channels:
            return None
        constants = np.ascontiguousarray(self.file.constants(self.planned.source_index), "<f4")
        if not self.task.keep_nonfinite:
            self.file.check_finite(constants, self.planned.source_index, None)
        self.audit.add_constants(constants)
        return constants

    def _blocks(self, written: list[Appended], on_bytes: OnBytes) -> Iterator[int]:
        """Reads, audits and writes block after block, none across chunks; yields their numbers of frames."""
        planned, per_chunk = self.planned, self.plan.frames_per_chunk
        shape = (len(self.plan.card.state_channels), *self.plan.grid)
        step = min(block_frames(4 * int(np.prod(shape))), per_chunk, planned.frames)
        buffers = [np.empty((step, *shape), "<f4") for _ in range(_NUM_BUFFERS)]
        first = turn = 0
        while first < planned.frames:
            stop = min(first + step, planned.frames, (first // per_chunk + 1) * per_chunk)
            if turn >= _NUM_BUFFERS:  # its checksums must be done before it is overwritten
                written[turn - _NUM_BUFFERS].crcs()
            frames = buffers[turn % _NUM_BUFFERS][: stop - first]
            self.file.read(planned.source_index, first, stop, frames)
            self.audit.add(frames)
            if not self.task.keep_nonfinite and not self.audit.finite:
                self.file.check_finite(frames, planned.source_index, first)
            stored = frames if self.encoder is None else self.encoder.encode(frames, self._place(first))
            written.append(self.writer.extend(stored))
            on_bytes(frames.nbytes)
            yield stop - first
            first, turn = stop, turn + 1

    def _place(self, first: int) -> str:
        return f"{self.file.path}: trajectory {self.planned.source_index}, frames from {first} on"

    def _meta(self, first: int, num_frames: int) -> dict[str, Any]:
        """meta.json of a sample: what someone needs who reads the shards without our manifest."""
        plan, planned = self.plan, self.planned
        meta = {
            "dataset": plan.card.name,
            "split": plan.split,
            "trajectory": self.number,
            "first_frame": first,
            "time": self.file.times(planned.source_index)[first : first + num_frames].tolist(),
            "dt": planned.dt,
            "scalars": planned.scalars,
            "boundary": encode(plan.boundary),
            "state_channels": encode(plan.card.state_channels),
            "constant_channels": encode(plan.card.constant_channels),
            "source_file": plan.sources[planned.source].name,
            "source_trajectory": planned.source_index,
        }
        if self.encoder is not None:  # value = stored * scale + offset
            meta["encoding"] = {
                name: list(pair) for name, pair in encoding_of(self.encoder.channels, self.task.stats).items()
            }
        return meta
