"""Writes one shard from its plan: trajectory after trajectory, one chunk of frames in memory at a time."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from data_pipeline.findings import Finding, frame_ranges
from data_pipeline.manifest import Shard, Trajectory
from data_pipeline.plan import Plan
from data_pipeline.records import canonical, decode, encode, load_json
from data_pipeline.shards import ShardWriter, check_shard, frame_crcs, sample_key, shard_name
from data_pipeline.well import WellFile
from data_pipeline.workers import OnBytes

PARTIAL = ".partial"  # folder of the records of finished shards, gone when the manifest is there


@dataclass(frozen=True)
class Part:
    """The record of one finished shard, until its manifest is written."""

    plan: str
    shard: Shard
    trajectories: tuple[Trajectory, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class ShardTask:
    plan: Plan
    shard: int


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

    Raises UserError for NaN or Inf in a field, a file that cannot be read, and a full disk.
    """
    plan, name = task.plan, shard_name(task.shard)
    first, stop = plan.shards[task.shard]
    records: list[Trajectory] = []
    findings: list[Finding] = []
    with atomic_file(plan.folder / name) as output:
        writer = ShardWriter(output)
        for source, numbers in groupby(range(first, stop), key=lambda number: plan.trajectories[number].source):
            with WellFile(plan.files[source], plan.card) as file:
                for number in numbers:
                    record, found = _write_trajectory(plan, task.shard, number, file, writer, on_bytes)
                    records.append(record)
                    findings += found
        shard = writer.finish(name)
    part = Part(plan.digest, shard, tuple(records), tuple(findings))
    with atomic_file(_part_path(plan, task.shard), durable=False) as output:
        output.write(canonical(encode(part)))
    return part


def _write_trajectory(
    plan: Plan, shard: int, number: int, file: WellFile, writer: ShardWriter, on_bytes: OnBytes
) -> tuple[Trajectory, list[Finding]]:
    """Copies one trajectory chunk by chunk, refusing NaN and Inf and noting frames equal to the one before."""
    planned = plan.trajectories[number]
    constants = file.constants(planned.source_index) if plan.card.constant_channels else None
    if constants is not None:
        file.check_finite(constants, planned.source_index, None)
    offsets, crcs = [], []
    duplicates: list[int] = []
    constants_offset: int | None = None
    last: np.ndarray | None = None
    for first in range(0, planned.frames, plan.frames_per_chunk):
        frames = file.read(planned.source_index, first, min(first + plan.frames_per_chunk, planned.frames))
        file.check_finite(frames, planned.source_index, first)
        duplicates += [first + place for place in _duplicates(frames, last)]
        last = frames[-1]
        meta = _meta(plan, number, file, first, len(frames))
        offset, at = writer.add(sample_key(number, first), frames, constants if first == 0 else None, meta)
        constants_offset = at if first == 0 else constants_offset
        offsets.append(offset)
        crcs.append(frame_crcs(frames))
        on_bytes(frames.nbytes)
    record = Trajectory(
        source=planned.source,
        source_index=planned.source_index,
        frames=planned.frames,
        dt=planned.dt,
        scalars=planned.scalars,
        shard=shard,
        offsets=tuple(offsets),
        crc32="".join(crcs),
        constants_offset=constants_offset,
        constants_crc32="" if constants is None else frame_crcs(constants[None]),
        segments=((0, planned.frames),),
    )
    if not duplicates:
        return record, []
    detail = f"{len(duplicates)} of {planned.frames} frames equal the frame before"
    name = plan.sources[planned.source].name
    ranges = frame_ranges(duplicates)
    return record, [Finding("duplicates", "warning", name, planned.source_index, None, ranges, detail)]


def _duplicates(frames: np.ndarray, last: np.ndarray | None) -> list[int]:
    """Which of `frames` (T, C, H, W) equal the frame before; `last` (C, H, W) is the one before the first."""
    pairs = enumerate(zip([last, *frames[:-1]], frames, strict=True))
    return [place for place, (before, frame) in pairs if before is not None and np.array_equal(before, frame)]


def _meta(plan: Plan, number: int, file: WellFile, first: int, num_frames: int) -> dict[str, Any]:
    """meta.json of a sample: what someone needs who reads the shards without our manifest."""
    planned = plan.trajectories[number]
    return {
        "dataset": plan.card.name,
        "split": plan.split,
        "trajectory": number,
        "first_frame": first,
        "time": file.times(planned.source_index)[first : first + num_frames].tolist(),
        "dt": planned.dt,
        "scalars": planned.scalars,
        "boundary": encode(plan.boundary),
        "state_channels": encode(plan.card.state_channels),
        "constant_channels": encode(plan.card.constant_channels),
        "source_file": plan.sources[planned.source].name,
        "source_trajectory": planned.source_index,
    }
