"""fm replay: one step of a run again."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    replay = commands.add_parser("replay", help="run one step of a run again, and print what went through it")
    replay.add_argument("run", type=Path, help="run directory")
    replay.add_argument("--step", type=int, required=True, metavar="N", help="number of the step, counted from 1")
    replay.add_argument("--shards", help="folder or URL of the shards (default: the recipe's)")
    replay.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.replay import replay, replay_text

    print(replay_text(replay(options.run, options.step, options.shards)))
    return 0
