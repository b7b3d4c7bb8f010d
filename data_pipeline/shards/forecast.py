"""What `shard` would do: sizes, free disk and time, with nothing written."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.cards.registry import Registry, load_registry
from data_pipeline.shards.build import finished_manifest, plan_all
from data_pipeline.shards.convert import rehearse
from data_pipeline.shards.listing import table
from data_pipeline.shards.plan import Plan, Settings, stats_file
from data_pipeline.well.location import Folder
from data_pipeline.well.stats import read_stats
from data_pipeline.workers import available_cores

COLUMNS = ("dataset", "split", "files", "trajectories", "windows", "shards", "MB", "state")
PROBE_BYTES = 128 * 2**20  # read, audited and checksummed for the estimate of the time


def forecast(
    well: str | Path,
    out: Path,
    datasets: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    jobs: int | None = None,
    settings: Settings | None = None,
    registry: Registry | None = None,
) -> str:
    """A table of what `build_shards` would write, the free disk, and the time from a short trial without writing.

    Raises UserError where `build_shards` would before it writes: for files that are damaged or not the cards', and for
    shards of other files or settings.
    """
    folders, plans = plan_all(well, out, datasets, splits, settings or Settings(), registry or load_registry())
    pending = [plan for plan in plans if finished_manifest(plan) is None]
    rows = [_row(plan, plan in pending) for plan in plans]
    needed = sum(plan.stored_bytes for plan in pending)
    free = shutil.disk_usage(next(path for path in (out, *out.resolve().parents) if path.exists())).free
    verdict = "" if needed < free else ": NOT ENOUGH, choose another --out or fewer --datasets"
    lines = [table(COLUMNS, rows), f"{needed / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free under {out}{verdict}"]
    if pending:
        lines.append(_time(folders, pending, jobs or available_cores()))
    return "\n".join([*lines, "nothing was written (--dry-run)"])


def _row(plan: Plan, pending: bool) -> list[str]:
    return [
        plan.card.name,
        plan.split,
        str(len(plan.files)),
        str(len(plan.trajectories)),
        str(sum(one.frames - 1 for one in plan.trajectories)),
        str(len(plan.shards)),
        f"{plan.stored_bytes / 1e6:.1f}",
        "to write" if pending else "already there",
    ]


def _time(folders: Mapping[str, Folder], plans: Sequence[Plan], jobs: int) -> str:
    """How long it takes by the speed of the largest plan's first frames."""
    probed = max(plans, key=lambda plan: plan.stored_bytes)
    path = stats_file(folders[probed.card.name])
    num_bytes, seconds = rehearse(probed, None if path is None else read_stats(path, probed.card), PROBE_BYTES)
    total = sum(plan.source_bytes(shard) for plan in plans for shard in range(len(plan.shards)))
    without = {plan.card.name for plan in plans if stats_file(folders[plan.card.name]) is None}
    jobs = min(jobs, sum(len(plan.shards) for plan in plans))
    rate = num_bytes / seconds
    needed = total / rate / jobs
    text = (
        f"about {f'{needed / 60:.0f} min' if needed > 100 else f'{math.ceil(needed)} s'} with --jobs {jobs}, from a "
        f"trial of {num_bytes / 1e6:.1f} MB of {probed.card.name} at {rate / 1e6:.0f} MB/s, reading and checking "
        "without writing; a slower disk takes longer"
    )
    if without:
        text += f"; and once more the reading of the train files of {', '.join(sorted(without))}, for the statistics"
    return text
