"""The `fm` command: train, status, replay, evaluate, compare."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 2 the user's mistake, 130 interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    from fm.recipe import main as train_recipe

    return train_recipe(options.recipe, options.overrides)


def _status(options: argparse.Namespace) -> int:
    from fm.status import read_status, status_json, status_text

    status = read_status(options.run)
    print(status_json(status) if options.json else status_text(status))
    return 0


def _replay(options: argparse.Namespace) -> int:
    from fm.replay import replay, replay_text

    print(replay_text(replay(options.run, options.step, options.shards)))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from fm.runs import evaluate_run

    evaluate_run(options.run, options.shards, options.out, options.protocol, options.split, options.windows)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from fm.runs import compare_runs

    print(compare_runs(options.before, options.after))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fm", description="Train and evaluate WaveLiT-FM.")
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="run a recipe, as `accelerate launch RECIPE` does, in this process")
    train.add_argument("recipe", help="a recipe, such as recipes/quickstart.yaml")
    train.add_argument("overrides", nargs="*", help="section.key=value")
    train.set_defaults(command=_train)

    status = commands.add_parser("status", help="how a run stands: step, rate, time left, checkpoint, scores, events")
    status.add_argument("run", type=Path, help="run directory")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(command=_status)

    replay = commands.add_parser("replay", help="run one step of a run again, and print what went through it")
    replay.add_argument("run", type=Path, help="run directory")
    replay.add_argument("--step", type=int, required=True, metavar="N", help="number of the step, counted from 1")
    replay.add_argument("--shards", help="folder or URL of the shards (default: the recipe's)")
    replay.set_defaults(command=_replay)

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
    evaluate.set_defaults(command=_evaluate)

    compare = commands.add_parser("compare", help="scores of two evaluated runs side by side")
    compare.add_argument("before", type=Path, help="run directory")
    compare.add_argument("after", type=Path, help="run directory")
    compare.set_defaults(command=_compare)
    return parser


if __name__ == "__main__":
    sys.exit(main())
