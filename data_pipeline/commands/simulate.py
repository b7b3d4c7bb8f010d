"""data-pipeline simulate: the mini-Well."""

import argparse
from pathlib import Path

from data_pipeline.commands.arguments import Commands, add_jobs, names


def add(commands: Commands) -> None:
    parser = commands.add_parser("simulate", help="simulate the mini-Well: all eight systems, small, no download")
    parser.add_argument("--preset", required=True, choices=("mini", "tiny"), help="mini: 1 minute; tiny: for tests")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the HDF5 files")
    parser.add_argument(
        "--datasets",
        type=names,
        help="comma-separated names; the eight if left out. Extras: burgers, euler_multi_quadrants_periodicBC",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same arrays (default 0)")
    add_jobs(parser)
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="also draw a picture of all systems")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.miniwell.generate import contact_sheet, simulate

    simulate(options.out, options.preset, options.datasets, options.seed, options.jobs)
    if options.contact_sheet is not None:
        contact_sheet(options.out, options.contact_sheet)
    return 0
