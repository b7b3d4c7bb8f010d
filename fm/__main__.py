"""The `fm` command.

Exit codes: 0 done, 2 the user's mistake (one message on stderr), 130 interrupted; `train` has more (fm/recipe.py).
"""

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.errors import UserError
from fm.commands import (
    benchmark,
    compare,
    diagnose,
    evaluate,
    export,
    extend,
    few_shot,
    plan,
    replay,
    rollout,
    score,
    status,
    sweep,
    train,
    transfer,
)
from fm.commands.arguments import CommandParser

COMMANDS = (
    *(plan, benchmark, train, status, replay),
    *(export, rollout, extend),
    *(evaluate, score, compare),
    *(diagnose, sweep, few_shot, transfer),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fm", description="Train and evaluate WaveLiT-FM.")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=CommandParser)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
