"""data-pipeline download: The Well, verified file by file."""

import argparse
from pathlib import Path

from data_pipeline.commands.arguments import Commands, add_choice, add_registry


def add(commands: Commands) -> None:
    parser = commands.add_parser("download", help="download The Well; every file verified; run again to go on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="files go to DIR/datasets/<dataset>/...")
    add_choice(parser, "those with a card if left out")
    add_registry(parser)
    parser.add_argument("--first-only", action="store_true", help="the first file of each split alone")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="URL",
        help="another source, such as hf://datasets/polymathic-ai or https://...",
    )
    parser.add_argument("--urls", type=Path, metavar="FILE", help="another list of addresses like the_well's")
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="files at a time (default 4)")
    parser.add_argument("--dry-run", action="store_true", help="print files, bytes and free disk; fetch nothing")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.cards.registry import load_registry
    from data_pipeline.well.download import download

    download(
        options.out,
        load_registry(options.registry),
        options.datasets,
        options.splits,
        first_only=options.first_only,
        source=options.source,
        jobs=options.jobs,
        dry_run=options.dry_run,
        urls=options.urls,
    )
    return 0
