"""What a folder of shards holds, as a table, and what the audit found in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFolder, is_url
from data_pipeline.shards.listing import count_severities, find_manifests, findings_table, table
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.well.hdf5 import SPLITS
from data_pipeline.windows.fetching import load_manifest
from data_pipeline.windows.index import WindowIndex
from data_pipeline.windows.schedule import Source, sampling_shares

COLUMNS = (
    *("dataset", "split", "trajectories", "frames", "windows", "grid", "channels", "shards", "MB"),
    *("boundary x", "boundary y", "stats", "stored", "findings", "skipped", "share"),
)
USUAL = {"stats": "stats.yaml", "stored": "float32", "skipped": "0"}  # a column that holds nothing else is left out
LEGEND = "windows: pairs of neighbouring frames; channels: state+constant; share: of the draws of a training on all"
FEW = 4  # errors and warnings of a dataset that are shown unless all findings are asked for


def overview(shards: str | Path, known: Sequence[str], all_findings: bool = False) -> str:
    """A line per dataset and split: counts, grid, channels (state+constant), bytes, boundaries, findings and share.

    LEGEND says what some columns are; `stats` (where the statistics come from), `stored` (the type) and `skipped`
    (windows left out) are there where a split has other than the USUAL. A few errors and warnings follow the table, or
    all findings. `known` names the datasets that are looked for behind a URL, which may not list what it has.
    Raises UserError as `find_manifests` does.
    """
    found_there = _manifests_behind(str(shards), known) if is_url(shards) else find_manifests(Path(shards))
    manifests = list(found_there.values())
    shares = _shares([manifest for manifest in manifests if manifest.split == "train"])
    rows = [_row(manifest, shares) for manifest in manifests]
    num_bytes = sum(shard.bytes for manifest in manifests for shard in manifest.shards)
    found = [(one.dataset, one.split, finding) for one in manifests for finding in one.findings]
    listed = findings_table(found, None if all_findings else FEW)
    num_datasets = len({one.dataset for one in manifests})
    total = f"{num_datasets} datasets, {len(rows)} splits, {num_bytes / 1e6:.1f} MB in {shards}"
    return "\n".join([_table(rows), total, LEGEND, *([f"\n{listed}"] if listed else [])])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The table without the columns that hold nothing but the usual."""
    columns = [(name, [row[number] for row in rows]) for number, name in enumerate(COLUMNS)]
    shown = [(name, cells) for name, cells in columns if set(cells) != {USUAL.get(name)}]
    return table([name for name, _ in shown], list(zip(*(cells for _, cells in shown), strict=True)))


def _manifests_behind(url: str, known: Sequence[str]) -> Mapping[RemoteFolder, Manifest]:
    """As `find_manifests`, of the known datasets behind a URL."""
    folders = [RemoteFolder(url) / name / split for name in sorted(known) for split in SPLITS]
    found = {folder: folder.file(MANIFEST_NAME) for folder in folders}
    manifests = {folder: load_manifest(file) for folder, file in found.items() if file.exists()}
    if not manifests:
        raise UserError(
            f"{url}: expected <dataset>/<split>/{MANIFEST_NAME} of {', '.join(sorted(known))}, got none; upload shards "
            "made with `data-pipeline shard`, or name your own cards with --registry"
        )
    return manifests


def _shares(manifests: Sequence[Manifest]) -> dict[str, float]:
    found = []
    for manifest in manifests:
        trajectories = manifest.trajectories
        index = WindowIndex([one.segments for one in trajectories], 2, [one.shard for one in trajectories])
        if len(index):
            tokens = manifest.grid[0] * manifest.grid[1] // 4
            found.append(Source(manifest.dataset, len(index), tokens, index.shard_windows))
    return sampling_shares(found, "sqrt") if found else {}


def _row(manifest: Manifest, shares: dict[str, float]) -> list[str]:
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    lengths = sorted({trajectory.frames for trajectory in manifest.trajectories})
    constants = f"+{len(manifest.constant_channels)}" if manifest.constant_channels else ""
    return [
        manifest.dataset,
        manifest.split,
        str(len(manifest.trajectories)),
        "/".join(map(str, lengths)),
        str(manifest.num_windows(2)),
        f"{manifest.grid[0]}x{manifest.grid[1]}",
        f"{len(manifest.state_channels)}{constants}",
        str(len(manifest.shards)),
        f"{num_bytes / 1e6:.1f}",
        *("-".join(dict.fromkeys(sides)).lower() for sides in manifest.boundary),
        manifest.stats_source,
        manifest.dtype,
        count_severities(manifest.findings),
        str(manifest.num_skipped_windows(2)),
        f"{shares.get(manifest.dataset, 0):.3f}" if manifest.split == "train" else "",
    ]
