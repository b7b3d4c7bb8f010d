"""fm compare: scores of evaluated runs side by side."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="scores of two evaluated runs side by side")
    compare.add_argument("before", type=Path, help="run directory")
    compare.add_argument("after", type=Path, help="run directory")
    compare.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.evaluation.runs import compare_runs

    print(compare_runs(options.before, options.after))
    return 0
