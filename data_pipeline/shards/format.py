"""The manifest of one dataset and split: what the shards hold, where each frame lies, and what the audit found.

A manifest may come from anywhere, so nothing in it is trusted: types, names, sizes and offsets are checked when it is
loaded, and the digest shows any change. `SHARDS/<dataset>/<split>/manifest.json` is written last, so a folder without
one is not finished.

By default, findings of the audit are reported and every window is kept, so that counts equal the published ones.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from data_pipeline.errors import UserError, brief
from data_pipeline.files import parse_json, read_json, write_whole
from data_pipeline.registry import Boundary
from data_pipeline.remote import RemoteFile
from data_pipeline.schema import NAME, Strict, canonical, digest, unsealed, validate
from data_pipeline.well.findings import (
    KINDS,
    SEVERITIES,
    SKIPPABLE,
    Finding,
    Range,
    Spacing,
    StoredFrames,
    frame_ranges,
)
from data_pipeline.well.stats import DELTA_STATISTICS, VALUE_STATISTICS

FORMAT = "wavelit-shards"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
MAX_REMOTE_BYTES = 64 * 2**20  # of a manifest behind a URL
ITEM_BYTES = {"float32": 4, "float16": 2}  # types of stored state fields


def usable_segments(num_frames: int, findings: Sequence[Finding], skip: Sequence[str]) -> tuple[Range, ...]:
    """Return the segments of one trajectory when findings of the kinds in `skip` are left out.

    A window must lie inside one segment. A duplicate frame may not share a window with the frame before it. A
    stationary tail and frames with NaN or Inf are in no window.
    """
    removed, starts = set[int](), set[int]()
    for finding in findings:
        if finding.kind not in skip:
            continue
        for first, stop in finding.frames:
            if finding.kind == "duplicates":
                starts.update(range(first, stop))
            else:
                removed.update(range(first, stop))
    return frame_ranges((frame for frame in range(num_frames) if frame not in removed), starts)


@dataclass(frozen=True)
class SourceFile(Strict):
    """An HDF5 file that trajectories came from; `fingerprint` is a hash of its size and of blocks spread over it."""

    name: str
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Trajectory(Strict):
    """One trajectory and where its frames lie: chunk j starts at byte offsets[j] of its shard."""

    source: int  # index into Manifest.sources
    source_index: int  # index of the trajectory in that file
    frames: int
    dt: float | None  # time between frames; None if it differs
    scalars: dict[str, float]
    shard: int
    offsets: tuple[int, ...]
    crc32: str  # eight hex digits per frame
    constants_offset: int | None
    constants_crc32: str
    segments: tuple[Range, ...]  # frames [first, stop); a window lies inside one of them


def trajectory_key(dataset: str, split: str, file: str, index: int) -> tuple[str, str, str, str, int]:
    """Return what identifies trajectory `index` of a file for `nested_choice`, wherever it is stored."""
    return "restrict", dataset, split, file, index


@dataclass(frozen=True)
class Shard(Strict):
    """One tar file, by its plain name in the manifest's folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest(Strict):
    """All that a reader needs to know about one dataset and split.

    Raises ValueError, with the place in the manifest, when its parts contradict each other.
    """

    dataset: str
    split: str
    state_channels: tuple[str, ...]
    constant_channels: tuple[str, ...]
    grid: tuple[int, int]  # (H, W)
    boundary: Boundary
    dt: float | None  # of the first trajectory; each has its own
    frames_per_chunk: int
    dtype: str  # of stored state fields, a key of ITEM_BYTES; constants are always float32
    encoding: dict[str, tuple[float, float]]  # float16: state channel -> offset, scale; value = stored * scale + offset
    stats: dict[str, dict[str, float]]  # statistic -> channel -> value
    stats_source: str
    sources: tuple[SourceFile, ...]
    trajectories: tuple[Trajectory, ...]
    shards: tuple[Shard, ...]
    findings: tuple[Finding, ...]  # of the audit
    skip: tuple[str, ...]  # kinds of findings whose windows are left out
    converter: str
    plan: str  # digest of the sources and settings that the shards were made from
    spacing: Spacing | None = None  # of grid points along x and y, signed; None: not known, or it differs

    def __post_init__(self) -> None:
        for holds, message in _checks(self):
            if not holds:
                raise ValueError(message)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one frame."""
        return (len(self.state_channels), *self.grid)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored frame."""
        return ITEM_BYTES[self.dtype] * math.prod(self.frame_shape)

    @property
    def constants_bytes(self) -> int:
        """Bytes of one trajectory's constant fields; 0 when there are none."""
        return 4 * len(self.constant_channels) * math.prod(self.grid)

    @property
    def num_frames(self) -> int:
        """Frames of all trajectories."""
        return sum(trajectory.frames for trajectory in self.trajectories)

    def stored_frames(self) -> list[StoredFrames]:
        """Return the checksums of each trajectory's frames."""
        names = [source.name for source in self.sources]
        return [StoredFrames(self.split, names[t.source], t.source_index, t.crc32) for t in self.trajectories]

    def num_windows(self, length: int) -> int:
        """Return the number of windows of `length` frames at stride 1."""
        segments = (segment for trajectory in self.trajectories for segment in trajectory.segments)
        return sum(max(0, stop - first - length + 1) for first, stop in segments)

    def num_skipped_windows(self, length: int) -> int:
        """Return the number of windows of `length` frames that `skip` leaves out."""
        every = sum(max(0, trajectory.frames - length + 1) for trajectory in self.trajectories)
        return every - self.num_windows(length)

    def chunk_frames(self, trajectory: int, chunk: int) -> int:
        """Return the number of frames in one chunk of a trajectory."""
        return min(self.frames_per_chunk, self.trajectories[trajectory].frames - chunk * self.frames_per_chunk)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all fields: two datasets with the same digest hold the same bytes."""
        return digest(self._to_json())

    def _to_json(self) -> dict[str, Any]:
        content = {"format": FORMAT, "version": FORMAT_VERSION} | to_jsonable_python(self)
        if self.spacing is None:  # shards made before it was stored keep their digest
            del content["spacing"]
        return content

    def save(self, path: Path) -> None:
        """Write the manifest, whole or not at all. Raises UserError when the disk is full."""
        write_whole(path, canonical({**self._to_json(), "digest": self.digest}))

    @classmethod
    def load(cls, file: Path | RemoteFile) -> "Manifest":
        """Read and check a manifest. Raises UserError if it is missing, damaged, altered or of another format."""
        where = str(file)

        def damage(raw: bytes) -> str | None:
            try:
                unsealed(parse_json(raw, where), where)
                return None
            except UserError as error:
                return str(error)

        content = read_json(file) if isinstance(file, Path) else parse_json(file.read(MAX_REMOTE_BYTES, damage), where)
        kind, version = content.pop("format", None), content.pop("version", None)
        if kind != FORMAT or version != FORMAT_VERSION:
            raise UserError(
                f"{where}: expected format {FORMAT!r} version {FORMAT_VERSION}, got {kind!r} version {version!r}; "
                "make the shards again with `data-pipeline shard`"
            )
        stated = content.pop("digest", None)
        manifest: Manifest = validate(cls, content, where)
        if manifest.digest != stated:
            raise UserError(
                f"{where}: damaged or altered: its digest is {manifest.digest}, it says {stated}; "
                "copy it again, or remove the folder and run `data-pipeline shard`"
            )
        return manifest


def _checks(manifest: Manifest) -> Iterator[tuple[bool, str]]:
    """Yield what must hold, with the message if it does not; a condition may rely on those before it."""
    state, channels = manifest.state_channels, manifest.state_channels + manifest.constant_channels
    yield len(state) > 0, "state_channels is empty"
    for name in (manifest.dataset, *channels):  # they are printed, and name files
        yield NAME.fullmatch(name) is not None, f"expected a name of letters, digits and _, got {brief(name)}"
    yield len(set(channels)) == len(channels), f"a channel is listed twice: {', '.join(channels)}"
    yield min(manifest.grid) >= 1, f"grid: expected positive sizes, got {manifest.grid}"
    yield manifest.frames_per_chunk >= 1, "frames_per_chunk: expected at least 1"
    for shard in manifest.shards:
        plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", shard.name) is not None
        yield plain, f"shards: expected a plain file name in the manifest's folder, got {shard.name!r}"
        yield re.fullmatch(r"[0-9a-f]{64}", shard.sha256) is not None, f"shards: {shard.name}: no SHA-256"
    yield len({one.name for one in manifest.shards}) == len(manifest.shards), "shards: a name is listed twice"
    yield manifest.dtype in ITEM_BYTES, f"dtype: expected {' or '.join(ITEM_BYTES)}, got {manifest.dtype!r}"
    encoded = state if manifest.dtype == "float16" else ()
    yield set(manifest.encoding) == set(encoded), f"encoding: expected {', '.join(encoded) or 'none'}"
    yield all(scale > 0 for _, scale in manifest.encoding.values()), "encoding: expected scales above 0"
    for statistic in VALUE_STATISTICS + DELTA_STATISTICS:
        expected, got = channels if statistic in VALUE_STATISTICS else state, manifest.stats.get(statistic, {})
        yield set(got) == set(expected), f"stats.{statistic}: expected {', '.join(expected)}, got {', '.join(got)}"
    yield set(manifest.skip) <= set(SKIPPABLE), f"skip: expected {', '.join(SKIPPABLE)}, got {manifest.skip}"
    for index, one in enumerate(manifest.findings):
        known = one.kind in KINDS and one.severity in SEVERITIES
        yield known, f"findings[{index}]: no kind {one.kind!r} of severity {one.severity!r}"
    yield len(manifest.trajectories) > 0 and len(manifest.shards) > 0, "no trajectories"
    previous = 0
    for index, trajectory in enumerate(manifest.trajectories):
        for holds, message in _trajectory_checks(manifest, trajectory, previous):
            yield holds, f"trajectories[{index}]: {message}"
        previous = trajectory.shard


def _trajectory_checks(manifest: Manifest, one: Trajectory, previous: int) -> Iterator[tuple[bool, str]]:
    """Yield what must hold for a trajectory; `previous` is the shard of the trajectory before it."""
    yield one.frames >= 1, f"frames: expected at least 1, got {one.frames}"
    last = 0
    for first, stop in one.segments:
        inside = last <= first < stop <= one.frames
        yield inside, f"segments: [{first}, {stop}) is out of order or not in {one.frames} frames"
        last = stop
    yield 0 <= one.source < len(manifest.sources), "source: no such file"
    yield previous <= one.shard < len(manifest.shards), "shard: out of order or no such shard"
    size, per_chunk, frame_bytes = manifest.shards[one.shard].bytes, manifest.frames_per_chunk, manifest.frame_bytes
    # There may be many offsets: compare counts before looking at each.
    yield len(one.offsets) == -(-one.frames // per_chunk), "offsets: not one per chunk"
    hexes = re.fullmatch(r"(?:[0-9a-f]{8})*", one.crc32) is not None
    yield hexes and len(one.crc32) == 8 * one.frames, "crc32: not eight digits per frame"
    for chunk, offset in enumerate(one.offsets):
        frames = min(per_chunk, one.frames - chunk * per_chunk)
        if not 0 <= offset <= size - frames * frame_bytes:
            what = f"{frames} frames at byte {offset} do not fit into a shard of {size} bytes"
            yield False, f"offsets[{chunk}]: {what}"
    at, needed = one.constants_offset, manifest.constants_bytes
    if needed == 0:
        yield at is None and one.constants_crc32 == "", "constants: there are none"
        return
    yield at is not None and 0 <= at <= size - needed, "constants_offset: not in the shard"
    yield re.fullmatch(r"[0-9a-f]{8}", one.constants_crc32) is not None, "constants_crc32: not eight digits"
