"""fm status: how a run stands."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    status = commands.add_parser("status", help="how a run stands: step, rate, time left, checkpoint, scores, events")
    status.add_argument("run", type=Path, help="run directory")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.status import read_status, status_json, status_text

    status = read_status(options.run)
    print(status_json(status) if options.json else status_text(status))
    return 0
