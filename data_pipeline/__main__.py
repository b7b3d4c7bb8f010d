"""Command line: simulate the mini-Well, make shards, look at them, check them.

Exit codes: 0 done, 2 the user's mistake (one message on stderr), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError

# Only what argparse needs is imported here, so that --help answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return 1
    except OSError as error:
        return _explain(error)
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept; run the same command again to go on", file=sys.stderr)
        return 130


def _explain(error: OSError) -> int:
    """What the user can mend ends in a message; any other error is ours and keeps its traceback."""
    from data_pipeline.files import disk_full_error, is_disk_full

    if is_disk_full(error):
        print(f"error: {disk_full_error(error.filename or 'the output', error)}", file=sys.stderr)
    elif isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | FileExistsError):
        print(f"error: {error.filename}: {error.strerror}; choose another folder", file=sys.stderr)
    else:
        raise error
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data-pipeline", description="Makes training data for PDE models from The Well, or from the mini-Well."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_simulate(commands)
    _add_shard(commands)

    inspect = commands.add_parser("inspect", help="show what shards hold, or the paper's tables of the datasets")
    inspect.add_argument("shards", nargs="?", type=Path, help="folder of shards")
    inspect.add_argument("--paper", action="store_true", help="print the paper's tables 7 and 8 from the cards")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="compare every byte of the shards with their checksums")
    verify.add_argument("shards", type=Path, help="folder of shards")
    _add_choice(verify)
    verify.set_defaults(command=_verify)
    return parser


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    simulate = commands.add_parser("simulate", help="simulate the mini-Well: all eight systems, small, no download")
    simulate.add_argument("--preset", required=True, choices=("mini", "tiny"), help="mini: 1 minute; tiny: for tests")
    simulate.add_argument("--out", required=True, type=Path, help="folder for the HDF5 files")
    simulate.add_argument("--datasets", type=_names, help="comma-separated names; all if left out")
    simulate.add_argument("--seed", type=int, default=0, help="same seed, same arrays (default 0)")
    simulate.add_argument("--jobs", type=int, help="processes (default: one per core)")
    simulate.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="also draw a picture of all systems")
    simulate.set_defaults(command=_simulate)


def _add_shard(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    shard = commands.add_parser("shard", help="convert Well HDF5 files to tar shards; run again to go on")
    shard.add_argument("--well", required=True, type=Path, help="folder with <dataset>/data/<split>/*.hdf5")
    shard.add_argument("--out", required=True, type=Path, help="folder for the shards")
    _add_choice(shard)
    shard.add_argument("--jobs", type=int, help="processes (default: one per core)")
    shard.add_argument("--frames-per-chunk", type=int, default=16, metavar="N", help="frames per sample (default 16)")
    shard.add_argument("--shard-mib", type=int, default=512, metavar="N", help="size of a shard in MiB (default 512)")
    shard.set_defaults(command=_shard)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--datasets", type=_names, help="comma-separated names; all if left out")
    parser.add_argument("--splits", type=_names, help="comma-separated: train, valid, test; all if left out")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _simulate(options: argparse.Namespace) -> int:
    from data_pipeline.miniwell.generate import contact_sheet, simulate

    simulate(options.out, options.preset, options.datasets, options.seed, options.jobs)
    if options.contact_sheet is not None:
        contact_sheet(options.out, options.contact_sheet)
    return 0


def _shard(options: argparse.Namespace) -> int:
    from data_pipeline.build import build_shards

    built = build_shards(
        options.well,
        options.out,
        options.datasets,
        options.splits,
        options.jobs,
        options.frames_per_chunk,
        options.shard_mib * 2**20,
    )
    for one in built:
        num_bytes = sum(shard.bytes for shard in one.manifest.shards)
        state = "already there" if one.reused else "written"
        print(f"{one.folder}: {state}, {len(one.manifest.shards)} shards, {num_bytes / 1e6:.1f} MB")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if options.paper == (options.shards is not None):
        raise UserError("inspect: expected a folder of shards or --paper, one of the two")
    if options.paper:
        from data_pipeline.paper import paper_tables
        from data_pipeline.registry import load_registry

        print(paper_tables(load_registry()))
        return 0
    from data_pipeline.overview import overview

    print(overview(options.shards))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data_pipeline.overview import find_manifests
    from data_pipeline.shards import damage

    manifests = find_manifests(options.shards, options.datasets, options.splits)
    damaged = False
    for folder, manifest in manifests.items():
        lines = list(damage(folder, manifest))
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        damaged = damaged or bool(lines)
        num_bytes = sum(shard.bytes for shard in manifest.shards)
        verdict = "damaged" if lines else f"good, {manifest.num_frames} frames, {num_bytes / 1e6:.1f} MB"
        print(f"{folder}: {verdict}")
    return 2 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
