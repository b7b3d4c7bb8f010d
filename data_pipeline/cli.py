"""Arguments that several commands share, and how their texts are read.

A command module has `add(commands)`, which declares its arguments, and `_run(options)`, which imports what it needs:
`--help` answers at once.

data-pipeline simulate: the mini-Well.

data-pipeline download: The Well, verified file by file.

data-pipeline register: the draft of a card.

data-pipeline audit: what is wrong with the data.

data-pipeline shard: HDF5 -> tar shards.

data-pipeline inspect and verify: what shards hold, and whether they are whole.

data-pipeline bench: how fast the data come, and whether that limits training.

Command line: from simulations or The Well's files to shards, and what there is to know of them on the way.

Exit codes: 0 done, 2 the user's mistake (one message on stderr), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from data_pipeline.files import UserError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_choice(parser: argparse.ArgumentParser, default: str = "all if left out") -> None:
    """--datasets and --splits."""
    parser.add_argument("--datasets", type=names, help=f"comma-separated names; {default}")
    parser.add_argument("--splits", type=names, help="comma-separated: train, valid, test; all if left out")


def add_registry(parser: argparse.ArgumentParser) -> None:
    """--registry."""
    parser.add_argument("--registry", metavar="DIR", help="folder of your own cards (default: WAVELIT_REGISTRY)")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """--jobs."""
    parser.add_argument("--jobs", type=count, metavar="N", help="processes (default: one per core)")


def names(text: str) -> list[str]:
    """A comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def num_bytes(text: str) -> int:
    """Bytes written as 512M: K, M and G are powers of 1024."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in ("K", "M", "G") else (text, "")
    try:
        value = int(float(number) * 1024 ** ["", "K", "M", "G"].index(unit))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 1G, got {text!r}")
    return value


def _add_simulate(commands: Commands) -> None:
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
    parser.set_defaults(command=_run_simulate)


def _run_simulate(options: argparse.Namespace) -> int:
    from data_pipeline.miniwell.contact_sheet import contact_sheet
    from data_pipeline.miniwell.generate import simulate

    simulate(options.out, options.preset, options.datasets, options.seed, options.jobs)
    if options.contact_sheet is not None:
        contact_sheet(options.out, options.contact_sheet)
    return 0


def _add_download(commands: Commands) -> None:
    parser = commands.add_parser("download", help="download The Well; every file verified; run again to go on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="files go to DIR/datasets/<dataset>/...")
    add_choice(parser, "those with a card if left out")
    add_registry(parser)
    parser.add_argument("--first-only", action="store_true", help="the first file of each split alone")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="URL",
        help="another source, such as hf://datasets/polymathic-ai or https://...",
    )
    parser.add_argument("--urls", type=Path, metavar="FILE", help="another list of addresses like the_well's")
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="files at a time (default 4)")
    parser.add_argument("--dry-run", action="store_true", help="print files, bytes and free disk; fetch nothing")
    parser.set_defaults(command=_run_download)


def _run_download(options: argparse.Namespace) -> int:
    from data_pipeline.registry import load_registry
    from data_pipeline.well.download import download

    download(
        options.out,
        load_registry(options.registry),
        options.datasets,
        options.splits,
        first_only=options.first_only,
        source=options.source,
        jobs=options.jobs,
        dry_run=options.dry_run,
        urls=options.urls,
    )
    return 0


def _add_register(commands: Commands) -> None:
    parser = commands.add_parser("register", help="draft the card of a dataset that has none")
    parser.add_argument("source", type=Path, metavar="DIR_OR_FILE", help="dataset folder, HDF5 files, or one file")
    parser.add_argument("--name", help="name of the dataset (default: that of the folder or file)")
    parser.add_argument("--registry", type=Path, metavar="DIR", help="folder of your cards (default: WAVELIT_REGISTRY)")
    parser.set_defaults(command=_run_register)


def _run_register(options: argparse.Namespace) -> int:
    from data_pipeline.well.register import draft_folder, open_registry, register

    directory = draft_folder(options.registry)
    made = register(options.source, options.name, directory, open_registry(directory))
    for path in made.paths:
        print(f"{path}: written")
    print("It can be used as it is; a person decides:", *made.decisions, sep="\n  - ")
    return 0


def _add_audit(commands: Commands) -> None:
    parser = commands.add_parser(
        "audit", help="look for faults in HDF5 files or shards; exit code 2 if there are errors"
    )
    parser.add_argument("location", metavar="WELL_OR_SHARDS", help="folder or URL of a Well, or folder of shards")
    add_choice(parser)
    add_registry(parser)
    add_jobs(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")
    parser.set_defaults(command=_run_audit)


def _run_audit(options: argparse.Namespace) -> int:
    from data_pipeline.files import atomic_file
    from data_pipeline.registry import load_registry
    from data_pipeline.schema import canonical
    from data_pipeline.shards.review import as_json, as_text, audit

    reviews = audit(options.location, load_registry(options.registry), options.datasets, options.splits, options.jobs)
    print(as_text(reviews))
    if options.json is not None:
        with atomic_file(options.json) as file:
            file.write(canonical(as_json(reviews)))
    return 2 if any(found.severity == "error" for review in reviews for found in review.findings) else 0


if TYPE_CHECKING:
    from data_pipeline.shards.build import Built


def _add_shard(commands: Commands) -> None:
    parser = commands.add_parser("shard", help="convert Well HDF5 files to tar shards; run again to go on")
    parser.add_argument(
        "--well", required=True, metavar="DIR_OR_URL", help="<dataset>/data/<split>/*.hdf5 under a folder or a URL"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    add_choice(parser)
    add_registry(parser)
    add_jobs(parser)
    parser.add_argument("--frames-per-chunk", type=int, default=16, metavar="N", help="frames per sample (default 16)")
    parser.add_argument(
        "--shard-size", type=num_bytes, default="512M", metavar="SIZE", help="e.g. 512M or 1G (default 512M)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the stored fields")
    parser.add_argument("--restrict", type=int, metavar="N", help="N trajectories of each split, those of N in N + 1")
    parser.add_argument(
        "--skip", type=names, default=[], metavar="KINDS", help="leave out windows: duplicates,stationary,nonfinite"
    )
    parser.add_argument("--dry-run", action="store_true", help="print sizes, free disk and time; write nothing")
    parser.set_defaults(command=_run_shard)


def _run_shard(options: argparse.Namespace) -> int:
    from data_pipeline.registry import load_registry
    from data_pipeline.shards.build import build_shards
    from data_pipeline.shards.plan import Settings

    registry = load_registry(options.registry)
    what = (options.well, options.out, options.datasets, options.splits, options.jobs)
    how = (options.frames_per_chunk, options.shard_size, options.dtype, options.restrict)
    if options.dry_run:
        from data_pipeline.inspect import forecast  # loads torch: 180 MiB that a conversion does without

        print(forecast(*what, Settings(*how), registry))
        return 0
    for built in build_shards(*what, *how, options.skip, registry):
        print(_line(built))
    return 0


def _line(built: "Built") -> str:
    from data_pipeline.shards.review import count_severities

    manifest = built.manifest
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    notes = ["already there" if built.reused else "written"]
    if built.windows_changed:
        notes.append("windows chosen again")
    plural = "s" if len(manifest.shards) > 1 else ""
    notes.append(f"{len(manifest.shards)} shard{plural}, {num_bytes / 1e6:.1f} MB")
    notes.append(count_severities([found for found in manifest.findings if found.severity != "note"]))
    if manifest.skip:
        notes.append(f"{manifest.num_skipped_windows(2)} windows left out ({', '.join(manifest.skip)})")
    return f"{built.folder}: {', '.join(note for note in notes if note)}"


def _add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser("inspect", help="show what shards hold, or the paper's tables of the datasets")
    inspect.add_argument("shards", nargs="?", metavar="DIR_OR_URL", help="folder of shards")
    inspect.add_argument("--paper", action="store_true", help="print the paper's tables 7 and 8 from the cards")
    inspect.add_argument("--findings", action="store_true", help="list all that the audit found, not the worst alone")
    add_registry(inspect)
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="compare every byte of the shards with their checksums")
    verify.add_argument("shards", type=Path, help="folder of shards")
    add_choice(verify)
    verify.set_defaults(command=_verify)


def _inspect(options: argparse.Namespace) -> int:
    if options.paper == (options.shards is not None):
        raise UserError("inspect: expected a folder of shards or --paper, one of the two")
    from data_pipeline.inspect import overview, paper_tables
    from data_pipeline.registry import load_registry

    registry = load_registry(options.registry)
    known = tuple(registry.cards)
    print(paper_tables(registry) if options.paper else overview(options.shards, known, options.findings))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data_pipeline.shards.review import find_manifests
    from data_pipeline.shards.tar import damage

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


def _add_bench(commands: Commands) -> None:
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
    parser.set_defaults(command=_run_bench)


def _run_bench(options: argparse.Namespace) -> int:
    from data_pipeline.bench import PAPER_WINDOWS_PER_S, bench
    from data_pipeline.registry import load_registry

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


COMMANDS = (_add_simulate, _add_download, _add_register, _add_shard, _add_audit, _add_inspect, _add_bench)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data-pipeline", description="Makes training data for PDE models from The Well, or from the mini-Well."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser
