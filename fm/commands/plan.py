"""fm plan: what a run will cost, before it is launched."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a run will cost, before it is launched: work, time, memory",
        usage="fm plan [-h] [options] RECIPE [section.key=value ...]",
    )
    plan.add_argument("recipe", type=Path, help="a recipe, such as recipes/fm_pretrain.yaml")
    plan.add_argument("overrides", nargs="*", help="section.key=value")
    plan.add_argument(
        "--gpu", metavar="NAME", help="on this GPU (a100, h200, ...), by its data sheet; default: measured here"
    )
    plan.add_argument(
        "--utilisation",
        type=float,
        default=0.3,
        metavar="U",
        help="with --gpu: share of the peak that matrix products are assumed to reach (default: 0.3)",
    )
    plan.add_argument(
        "--probe-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="without --gpu: how long steps are measured here, at most and about (default: 60)",
    )
    plan.add_argument(
        "--shards", metavar="DIR", help="shards that are there, in place of the recipe's, which may not be"
    )
    plan.add_argument("--processes", type=int, default=1, metavar="N", help="that share each step (default: 1)")
    plan.add_argument(
        "--network",
        type=float,
        default=50.0,
        metavar="GBS",
        help="with --gpu: GB/s of each GPU to other nodes (default: 50, InfiniBand of 400 Gb/s)",
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    plan.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.errors import UserError
    from fm.planning.run import plan_run

    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation: expected a share in (0, 1], got {options.utilisation}")
    if not 0 < options.probe_seconds < float("inf"):
        raise UserError(f"--probe-seconds: expected seconds above 0, got {options.probe_seconds}")
    if options.processes < 1:
        raise UserError(f"--processes: expected a number of at least 1, got {options.processes}")
    if not 0 < options.network < float("inf"):
        raise UserError(f"--network: expected GB/s above 0, got {options.network}")
    overrides = [*options.overrides, *([f"data.shards={options.shards}"] if options.shards else [])]
    speed = options.probe_seconds if options.gpu is None else (options.gpu, options.utilisation)
    shards = options.shards is not None
    plan_run(options.recipe, overrides, speed, options.processes, shards, options.json, options.network)
    return 0
