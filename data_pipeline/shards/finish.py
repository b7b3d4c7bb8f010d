"""The last step of a split: the records of its shards become the manifest, with findings and windows."""

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from data_pipeline import __version__
from data_pipeline.cards.registry import Channel
from data_pipeline.errors import UserError
from data_pipeline.shards.convert import PARTIAL, Part
from data_pipeline.shards.dataset_stats import FROM_FILE
from data_pipeline.shards.encoding import encoding_of
from data_pipeline.shards.findings import SKIPPABLE, Finding, usable_segments
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.shards.plan import Plan
from data_pipeline.shards.split_audit import condense, merge, split_findings
from data_pipeline.well.stats import Stats


def finish_split(
    plan: Plan,
    parts: Mapping[int, Part],
    stats: Stats,
    stats_source: str,
    skip: tuple[str, ...],
    channels: Mapping[str, Channel],
) -> Manifest:
    """Writes the manifest, which makes the split whole, then removes the records."""
    ordered = [parts[index] for index in range(len(plan.shards))]
    channel_names = plan.card.state_channels
    manifest = Manifest(
        dataset=plan.card.name,
        split=plan.split,
        state_channels=channel_names,
        constant_channels=plan.card.constant_channels,
        grid=plan.grid,
        boundary=plan.boundary,
        dt=plan.trajectories[0].dt,
        frames_per_chunk=plan.frames_per_chunk,
        dtype=plan.dtype,
        encoding=encoding_of(channel_names, stats) if plan.dtype == "float16" else {},
        stats=stats,
        stats_source=stats_source,
        sources=plan.sources,
        trajectories=tuple(trajectory for part in ordered for trajectory in part.trajectories),
        shards=tuple(part.shard for part in ordered),
        findings=_findings(plan, ordered, stats if stats_source == FROM_FILE else None, channels),
        skip=(),
        converter=f"data-pipeline {__version__}",
        plan=plan.digest,
    )
    manifest = choose_windows(manifest, skip)
    manifest.save(plan.folder / MANIFEST_NAME)
    shutil.rmtree(plan.folder / PARTIAL, ignore_errors=True)
    return manifest


def choose_windows(manifest: Manifest, skip: tuple[str, ...]) -> Manifest:
    """The same manifest with the windows that are left when findings of the kinds in `skip` are left out.

    Raises UserError if it holds NaN or Inf and these are not left out.
    """
    by_trajectory: dict[tuple[str, int | None], list[Finding]] = defaultdict(list)
    for finding in manifest.findings:
        if finding.kind == "nonfinite" and "nonfinite" not in skip:
            raise UserError(
                f"{manifest.dataset}, {manifest.split}: {finding.file}, trajectory {finding.trajectory}, channel "
                f"{finding.channel}: NaN or Inf, in shards that were made with `--skip nonfinite`; give it again"
            )
        if finding.kind in SKIPPABLE:
            by_trajectory[finding.file, finding.trajectory].append(finding)
    trajectories = []
    for trajectory in manifest.trajectories:
        found = by_trajectory[manifest.sources[trajectory.source].name, trajectory.source_index]
        segments = usable_segments(trajectory.frames, found, skip)
        trajectories.append(replace(trajectory, segments=segments))
    return replace(manifest, trajectories=tuple(trajectories), skip=skip)


def _findings(
    plan: Plan, parts: Sequence[Part], stats: Stats | None, channels: Mapping[str, Channel]
) -> tuple[Finding, ...]:
    """Those of the trajectories, those of the split, and what float16 cost. `stats` claim to be of the train split."""
    found = [finding for part in parts for finding in part.findings]
    found += split_findings(
        plan.card,
        channels,
        merge([part.sample for part in parts]),
        [trajectory.frames for trajectory in plan.trajectories],
        plan.grid,
        stats if plan.split == "train" and plan.whole else None,
    )
    if plan.dtype == "float16":
        worst = np.max([part.rounding for part in parts], axis=0)
        for name, error in zip(plan.card.state_channels, worst, strict=True):
            found.append(Finding("rounding", "note", "", None, name, (), f"float16 is off by at most {error:.2g} std"))
    return tuple(condense(found, len(plan.trajectories)))
