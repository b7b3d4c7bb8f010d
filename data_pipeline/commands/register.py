"""data-pipeline register: the draft of a card."""

import argparse
from pathlib import Path

from data_pipeline.commands.arguments import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("register", help="draft the card of a dataset that has none")
    parser.add_argument("source", type=Path, metavar="DIR_OR_FILE", help="dataset folder, HDF5 files, or one file")
    parser.add_argument("--name", help="name of the dataset (default: that of the folder or file)")
    parser.add_argument("--registry", type=Path, metavar="DIR", help="folder of your cards (default: WAVELIT_REGISTRY)")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.well.register import draft_folder, open_registry, register

    directory = draft_folder(options.registry)
    made = register(options.source, options.name, directory, open_registry(directory))
    for path in made.paths:
        print(f"{path}: written")
    print("It can be used as it is; a person decides:", *made.decisions, sep="\n  - ")
    return 0
