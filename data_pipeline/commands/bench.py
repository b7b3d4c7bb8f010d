"""data-pipeline bench: how fast the data come, and whether that limits training."""

import argparse
from pathlib import Path

from data_pipeline.commands.arguments import Commands, add_registry, names


def add(commands: Commands) -> None:
    parser = commands.add_parser("bench", help="measure how fast windows are read, beside other ways to read them")
    parser.add_argument("shards", nargs="?", type=Path, help="folder of shards; the train split of one dataset is read")
    parser.add_argument("--well", type=Path, metavar="DIR", help="the HDF5 files behind them, for the_well and h5py")
    parser.add_argument("--synthetic", metavar="HxWxC", help="make data of this shape for the purpose, e.g. 256x256x3")
    parser.add_argument("--datasets", type=names, metavar="NAME", help="one dataset (default: of the largest windows)")
    parser.add_argument(
        "--windows-per-s",
        type=float,
        metavar="X",
        help="what training needs: throughput/samples_per_s of a run in TensorBoard (default: the paper's 27)",
    )
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="time for each way (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    add_registry(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.bench.report import PAPER_WINDOWS_PER_S
    from data_pipeline.bench.run import bench
    from data_pipeline.cards.registry import load_registry

    table = bench(
        options.shards,
        options.well,
        options.synthetic,
        options.datasets,
        PAPER_WINDOWS_PER_S if options.windows_per_s is None else options.windows_per_s,
        options.seconds,
        options.json,
        load_registry(options.registry),
    )
    print(table)
    return 0
