"""data-pipeline shard: HDF5 -> tar shards."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.commands.arguments import Commands, add_choice, add_jobs, add_registry, names, num_bytes

if TYPE_CHECKING:
    from data_pipeline.shards.build import Built


def add(commands: Commands) -> None:
    parser = commands.add_parser("shard", help="convert Well HDF5 files to tar shards; run again to go on")
    parser.add_argument(
        "--well", required=True, metavar="DIR_OR_URL", help="<dataset>/data/<split>/*.hdf5 under a folder or a URL"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    add_choice(parser)
    add_registry(parser)
    add_jobs(parser)
    parser.add_argument("--frames-per-chunk", type=int, default=16, metavar="N", help="frames per sample (default 16)")
    parser.add_argument(
        "--shard-size", type=num_bytes, default="512M", metavar="SIZE", help="e.g. 512M or 1G (default 512M)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the stored fields")
    parser.add_argument("--restrict", type=int, metavar="N", help="N trajectories of each split, those of N in N + 1")
    parser.add_argument(
        "--skip", type=names, default=[], metavar="KINDS", help="leave out windows: duplicates,stationary,nonfinite"
    )
    parser.add_argument("--dry-run", action="store_true", help="print sizes, free disk and time; write nothing")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.cards.registry import load_registry
    from data_pipeline.shards.build import build_shards
    from data_pipeline.shards.forecast import forecast
    from data_pipeline.shards.plan import Settings

    registry = load_registry(options.registry)
    what = (options.well, options.out, options.datasets, options.splits, options.jobs)
    how = (options.frames_per_chunk, options.shard_size, options.dtype, options.restrict)
    if options.dry_run:
        print(forecast(*what, Settings(*how), registry))
        return 0
    for built in build_shards(*what, *how, options.skip, registry):
        print(_line(built))
    return 0


def _line(built: "Built") -> str:
    from data_pipeline.shards.listing import count_severities

    manifest = built.manifest
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    notes = ["already there" if built.reused else "written"]
    if built.windows_changed:
        notes.append("windows chosen again")
    plural = "s" if len(manifest.shards) > 1 else ""
    notes.append(f"{len(manifest.shards)} shard{plural}, {num_bytes / 1e6:.1f} MB")
    notes.append(count_severities([found for found in manifest.findings if found.severity != "note"]))
    if manifest.skip:
        notes.append(f"{manifest.num_skipped_windows(2)} windows left out ({', '.join(manifest.skip)})")
    return f"{built.folder}: {', '.join(note for note in notes if note)}"
