"""fm benchmark: how fast this machine trains, and what stops it from being faster."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        help="how fast this machine trains, dataset by dataset, and what stops it from being faster",
        usage="fm benchmark [-h] [options] [section.key=value ...]",
    )
    benchmark.add_argument("overrides", nargs="*", help="section.key=value")
    benchmark.add_argument(
        "--recipe", type=Path, metavar="R", help="default: recipes/fm_pretrain.yaml on a GPU, else quickstart.yaml"
    )
    benchmark.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if any")
    benchmark.add_argument("--gpu", metavar="NAME", help="run nothing: the floor on this GPU, by its data sheet")
    benchmark.add_argument("--datasets", nargs="+", metavar="NAME", help="some of the recipe's; default: all")
    benchmark.add_argument(
        "--grid", choices=("full", "mini"), help="published grids or the mini-Well's; default: full on a GPU"
    )
    benchmark.add_argument("--variants", nargs="+", metavar="NAME", help="float32, bf16, batch8, ... or none")
    benchmark.add_argument(
        "--seconds", type=float, metavar="S", help="of taking steps, about (default: 45 on a CPU, 300 on a GPU)"
    )
    benchmark.add_argument("--data", metavar="SHARDS", help="also: how long training waits for the loader of these")
    benchmark.add_argument(
        "--step-ms", type=float, default=36.0, metavar="MS", help="with --data on a CPU: pace (default: 36)"
    )
    benchmark.add_argument("--profile", type=Path, metavar="DIR", help="also: traces and top kernels into this folder")
    benchmark.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    benchmark.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    benchmark.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.errors import UserError
    from fm.benchmark.run import Request, benchmark, floors
    from fm.benchmark.write import check_targets, write

    for name, value in (("--seconds", options.seconds), ("--step-ms", options.step_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name}: expected a number above 0, got {value}")
    check_targets(options.json, options.markdown, options.profile)
    request = Request(
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        device=options.device,
        size=options.grid,
        datasets=options.datasets and tuple(options.datasets),
        variants=options.variants and tuple(options.variants),
        seconds=options.seconds,
        profile=options.profile,
        shards=options.data,
        step_seconds=options.step_ms / 1e3,
    )
    write(floors(options.gpu, request) if options.gpu else benchmark(request), options.json, options.markdown)
    return 0
