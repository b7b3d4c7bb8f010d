"""What a folder of shards holds, as a table."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.index import WindowIndex
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.schedule import Source, sampling_shares
from data_pipeline.well import SPLITS

COLUMNS = (
    *("dataset", "split", "trajectories", "frames", "windows", "grid", "channels", "shards", "MB"),
    *("boundary x", "boundary y", "stats", "duplicates", "share"),
)
TEXT_COLUMNS = {"dataset", "split", "boundary x", "boundary y", "stats"}


def find_manifests(
    shards: Path, datasets: Sequence[str] | None = None, splits: Sequence[str] | None = None
) -> dict[Path, Manifest]:
    """Folder -> manifest of every dataset and split under `shards`, by name, splits in the order train, valid, test.

    Raises UserError if there is none, if one that was asked for is missing, or if a manifest is damaged.
    """
    if datasets is None:
        datasets = sorted({path.parts[-3] for path in shards.glob(f"*/*/{MANIFEST_NAME}")})
    folders = []
    for dataset in datasets:
        present = [split for split in SPLITS if (shards / dataset / split / MANIFEST_NAME).exists()]
        missing = [split for split in splits or () if split not in present]
        if missing or not present:
            raise UserError(
                f"{shards / dataset}: expected shards of {', '.join(missing) or 'any split'}, got "
                f"{', '.join(present) or 'none'}; make them with `data-pipeline shard`"
            )
        folders += [shards / dataset / split for split in present if splits is None or split in splits]
    if not folders:
        raise UserError(
            f"{shards}: expected <dataset>/<split>/{MANIFEST_NAME}, got none; make shards with `data-pipeline shard`"
        )
    return {folder: Manifest.load(folder / MANIFEST_NAME) for folder in folders}


def overview(shards: Path) -> str:
    """A line per dataset and split: counts, grid, channels (state+constant), bytes, boundaries and share.

    A window is a pair of neighbouring frames; the share is how often training on all of them draws the
    dataset under the default scheme. Raises UserError as `find_manifests` does.
    """
    manifests = list(find_manifests(shards).values())
    shares = _shares([manifest for manifest in manifests if manifest.split == "train"])
    rows = [_row(manifest, shares) for manifest in manifests]
    num_bytes = sum(shard.bytes for manifest in manifests for shard in manifest.shards)
    return f"{_table(rows)}\n{len(rows)} datasets and splits, {num_bytes / 1e6:.1f} MB in {shards}"


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
        str(manifest.count_frames("duplicates")),
        f"{shares.get(manifest.dataset, 0):.3f}" if manifest.split == "train" else "",
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [COLUMNS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in TEXT_COLUMNS else cell.rjust(width)
            for name, cell, width in zip(COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
