"""data-pipeline audit: what is wrong with the data."""

import argparse
from pathlib import Path

from data_pipeline.commands.arguments import Commands, add_choice, add_jobs, add_registry


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "audit", help="look for faults in HDF5 files or shards; exit code 2 if there are errors"
    )
    parser.add_argument("location", metavar="WELL_OR_SHARDS", help="folder or URL of a Well, or folder of shards")
    add_choice(parser)
    add_registry(parser)
    add_jobs(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.cards.registry import load_registry
    from data_pipeline.files import atomic_file
    from data_pipeline.records import canonical
    from data_pipeline.shards.review import as_json, as_text, audit

    reviews = audit(options.location, load_registry(options.registry), options.datasets, options.splits, options.jobs)
    print(as_text(reviews))
    if options.json is not None:
        with atomic_file(options.json) as file:
            file.write(canonical(as_json(reviews)))
    return 2 if any(found.severity == "error" for review in reviews for found in review.findings) else 0
