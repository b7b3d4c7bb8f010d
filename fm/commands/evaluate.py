"""fm evaluate: measure a run, and write its report."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    evaluate = commands.add_parser("evaluate", help="score a run's averaged weights: one-step and rollout VRMSE")
    evaluate.add_argument("run", type=Path, help="run directory, or one of its checkpoints")
    evaluate.add_argument("--shards", help="folder or URL of the shards to score on (default: the recipe's)")
    evaluate.add_argument("--out", type=Path, help="folder of the report (default: RUN/report)")
    evaluate.add_argument("--protocol", help="named protocol (default: the recipe's validation.protocol)")
    evaluate.add_argument("--split", help="split to score (default: the protocol's, test)")
    evaluate.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="score N evenly spaced one-step windows per dataset, as validation does (default: all)",
    )
    evaluate.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.evaluation.runs import evaluate_run

    evaluate_run(options.run, options.shards, options.out, options.protocol, options.split, options.windows)
    return 0
