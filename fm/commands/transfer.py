"""fm transfer: does training together help or hurt, and whom?"""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    transfer = commands.add_parser("transfer", help="a joint run beside runs of one dataset: who gains, who loses")
    transfer.add_argument("joint", type=Path, metavar="FM_RUN", help="run directory of several datasets")
    transfer.add_argument(
        "bespoke", type=Path, nargs="+", metavar="BESPOKE_RUN", help="run directories of one of its datasets each"
    )
    transfer.add_argument("--out", type=Path, help="folder of the report (default: FM_RUN/report/transfer)")
    transfer.add_argument("--format", default="md", help="of the printed table: md, csv, json or latex (default: md)")
    transfer.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.lab.transfer_report import transfer

    print(transfer(options.joint, options.bespoke, options.out, options.format), end="")
    return 0
