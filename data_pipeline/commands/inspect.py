"""data-pipeline inspect and verify: what shards hold, and whether they are whole."""

import argparse
import sys
from pathlib import Path

from data_pipeline.commands.arguments import Commands, add_choice, add_registry
from data_pipeline.errors import UserError


def add(commands: Commands) -> None:
    inspect = commands.add_parser("inspect", help="show what shards hold, or the paper's tables of the datasets")
    inspect.add_argument("shards", nargs="?", metavar="DIR_OR_URL", help="folder of shards")
    inspect.add_argument("--paper", action="store_true", help="print the paper's tables 7 and 8 from the cards")
    inspect.add_argument("--findings", action="store_true", help="list all that the audit found, not the worst alone")
    add_registry(inspect)
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="compare every byte of the shards with their checksums")
    verify.add_argument("shards", type=Path, help="folder of shards")
    add_choice(verify)
    verify.set_defaults(command=_verify)


def _inspect(options: argparse.Namespace) -> int:
    if options.paper == (options.shards is not None):
        raise UserError("inspect: expected a folder of shards or --paper, one of the two")
    from data_pipeline.cards.registry import load_registry
    from data_pipeline.overview import overview
    from data_pipeline.paper import paper_tables

    registry = load_registry(options.registry)
    known = tuple(registry.cards)
    print(paper_tables(registry) if options.paper else overview(options.shards, known, options.findings))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data_pipeline.shards.listing import find_manifests
    from data_pipeline.shards.tar import damage

    manifests = find_manifests(options.shards, options.datasets, options.splits)
    damaged = False
    for folder, manifest in manifests.items():
        lines = list(damage(folder, manifest))
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        damaged = damaged or bool(lines)
        num_bytes = sum(shard.bytes for shard in manifest.shards)
        verdict = "damaged" if lines else f"good, {manifest.num_frames} frames, {num_bytes / 1e6:.1f} MB"
        print(f"{folder}: {verdict}")
    return 2 if damaged else 0
