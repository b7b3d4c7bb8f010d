"""fm diagnose: why rollouts of one dataset diverge."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    diagnose = commands.add_parser(
        "diagnose", help="why rollouts of one dataset diverge: numbers, and a page of pictures"
    )
    diagnose.add_argument("run", help="run, one of its checkpoints, exported model, or hf://organisation/name")
    diagnose.add_argument("--dataset", required=True, metavar="NAME", help="a dataset that the run was trained on")
    diagnose.add_argument("--shards", help="folder or URL of the shards (default: the recipe's)")
    diagnose.add_argument(
        "--out",
        type=Path,
        help="folder of the page (default: RUN/report/diagnosis; of an exported model ./NAME_report/diagnosis)",
    )
    diagnose.add_argument(
        "--trajectories", type=int, default=4, metavar="N", help="how many test trajectories to roll out (default: 4)"
    )
    diagnose.add_argument(
        "--well",
        type=Path,
        help="folder of the simulated HDF5 files, for twins of the true flow (default: `well` beside the shards)",
    )
    diagnose.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.diagnosis.diagnose import diagnose_run

    diagnose_run(options.run, options.dataset, options.shards, options.out, options.trajectories, options.well)
    return 0
