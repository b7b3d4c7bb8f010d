"""fm sweep: variants of a recipe, trained, scored and ranked."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train and score the variants of a recipe, resumable, and print their table",
        usage="fm sweep [-h] [options] FILE [section.key=value ...]",
    )
    sweep.add_argument("file", help="a sweep, such as recipes/ablations/table14 (.yaml may be left out)")
    sweep.add_argument("overrides", nargs="*", help="section.key=value, of all variants")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweeps/<file>)")
    sweep.add_argument(
        "--only", action="append", default=[], metavar="VARIANT", help="run this variant, and others so named"
    )
    sweep.add_argument(
        "--seconds", type=float, metavar="S", help="train each variant for S seconds, not for the file's time or steps"
    )
    sweep.add_argument(
        "--launch-config", type=Path, metavar="FILE", help="train under this configuration of accelerate launch"
    )
    sweep.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from data_pipeline.errors import UserError
    from fm.lab.sweep import run_sweep
    from fm.lab.sweep_file import load_sweep

    sweep = load_sweep(options.file)
    if options.seconds is not None:
        if not 0 < options.seconds < float("inf"):
            raise UserError(f"--seconds: expected seconds of training above 0, got {options.seconds}")
        sweep = replace(sweep, seconds=options.seconds)
    out = options.out or Path("runs/sweeps") / sweep.file.stem
    return run_sweep(sweep, out, options.overrides, options.only, options.launch_config)
