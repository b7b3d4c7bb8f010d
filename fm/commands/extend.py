"""fm extend: a trained model learns to know more datasets, and stays the same on those it knows."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    extend = commands.add_parser(
        "extend",
        help="add datasets and their channels to a trained model",
        description="Add datasets and their channels to a trained model. What it knows stays the same bit for bit, "
        "which is proved by a step on every old dataset and printed; where a bit differs, nothing is written. The "
        "added datasets begin at persistence or the mean. DIR is an exported model: finetune.pretrained=DIR trains it.",
    )
    extend.add_argument(
        "model", metavar="MODEL", help="run directory, checkpoint, exported model, or hf://organisation/name"
    )
    extend.add_argument(
        "--dataset",
        action="append",
        required=True,
        dest="datasets",
        metavar="NAME_OR_CARD",
        help="a dataset with a card, or the card itself, FOLDER/datasets/NAME.yaml; may be given again",
    )
    extend.add_argument("--shards", required=True, metavar="DIR", help="folder or URL with shards of their train split")
    extend.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, whole or not at all")
    extend.add_argument(
        "--rows",
        default="nearest",
        metavar="zero|nearest|drawn|NEW=OLD,...",
        help="lifting rows of channels that the model has not seen: zeros, those of the nearest channel (same unit, "
        "similar name), those drawn for a new model, or those of a channel of yours; where there is no nearest channel "
        "and yours are not named, they are drawn (default: nearest)",
    )
    extend.add_argument("--seed", type=int, default=0, help="draws what is drawn (default: 0)")
    extend.add_argument("--registry", metavar="DIR", help="folders of cards of your own (default: WAVELIT_REGISTRY)")
    extend.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.extension.extend import extend

    extend(
        options.model,
        options.datasets,
        options.shards,
        options.out,
        options.rows,
        seed=options.seed,
        registry=options.registry,
    )
    return 0
