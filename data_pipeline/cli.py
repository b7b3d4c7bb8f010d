"""The command `data-pipeline`: from simulations or The Well's files to shards, and what they hold.

COMMANDS lists the commands with their options. A command's function imports what it needs when it runs, so `--help`
answers at once. Exit codes: 0 done, 1 `check` found errors, 2 the user's mistake or damaged data (a message on stderr),
130 interrupted.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError, run_command
from data_pipeline.files import write_whole


def names(text: str) -> list[str]:
    """Return the items of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def count(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def num_bytes(text: str) -> int:
    """Return the bytes written as 512M: K, M and G are powers of 1024."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in ("K", "M", "G") else (text, "")
    try:
        value = int(float(number) * 1024 ** ["", "K", "M", "G"].index(unit))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 1G, got {text!r}")
    return value


def _simulate(options: argparse.Namespace) -> int:
    from data_pipeline.miniwell.contact_sheet import contact_sheet
    from data_pipeline.miniwell.generate import simulate

    simulate(options.out, options.preset, options.datasets, options.seed, options.jobs)
    if options.contact_sheet is not None:
        contact_sheet(options.out, options.contact_sheet)
    return 0


def _download(options: argparse.Namespace) -> int:
    from data_pipeline.registry import load_registry
    from data_pipeline.well.download import download

    given = ("out", "datasets", "splits", "first_only", "source", "jobs", "dry_run", "urls")
    download(registry=load_registry(options.registry), **{name: getattr(options, name) for name in given})
    return 0


def _register(options: argparse.Namespace) -> int:
    from data_pipeline.importer.suggest import with_import_command
    from data_pipeline.well.headers import usable
    from data_pipeline.well.register import register

    with with_import_command(options.source, options.name):
        made = register(options.source, options.name, options.registry, options.share)
    for path in made.paths:
        print(f"{path}: written")
    print(f"{usable(made.findings)} Please check:", *made.decisions, sep="\n  - ")
    return 0


def _check(options: argparse.Namespace) -> int:
    from data_pipeline.check import check, table
    from data_pipeline.importer.suggest import with_import_command
    from data_pipeline.registry import load_registry

    with with_import_command(options.folder, None):
        checks = check(options.folder, load_registry(options.registry), options.jobs)
    print(table(checks))
    return 1 if any(one.severity == "error" for made in checks for one in made.findings) else 0


def _import(options: argparse.Namespace) -> int:
    from data_pipeline.importer.options import Options
    from data_pipeline.importer.plan import make_plan

    plan = make_plan(Options(**{one.name: getattr(options, one.name) for one in fields(Options)}))
    print(plan)
    if options.dry_run:
        return 0
    from data_pipeline.importer.convert import import_files
    from data_pipeline.registry import VARIABLE
    from data_pipeline.well.headers import usable

    made = import_files(plan, options.registry)
    for path in (made.folder, made.preview, *(made.card.paths if made.card else ())):
        print(f"{path}: written")
    print("Look at the preview: x points right and y up.", end=" ")
    if made.card is None:
        print(f"The package has the card {options.name}, and it describes these fields.")
    else:
        print(usable(made.card.findings), "Please check:", end="")
        print("", *made.card.decisions, sep="\n  - ")
    shards = options.shards or options.out / "shards"
    command = ["shard", "--well", str(options.out), "--out", str(shards), "--datasets", options.name]
    following = ["data-pipeline", *command]
    if options.shards is not None:
        if code := main([*command, *(["--registry", str(made.cards)] if made.cards else [])]):
            return code
        following = ["fm", "train", "recipes/quickstart.yaml"]
        following += [f"data.shards={options.shards}", f"data.datasets=[{options.name}]"]
    export = f"  export {VARIABLE}={shlex.quote(str(made.cards))}\n" if made.cards else ""
    print(f"Next:\n{export}  {shlex.join(following)}")
    return 0


def _shard(options: argparse.Namespace) -> int:
    from data_pipeline.check import well_headers
    from data_pipeline.registry import load_registry
    from data_pipeline.shards.build import build_shards
    from data_pipeline.shards.plan import Settings
    from data_pipeline.shards.review import across_splits, find_manifests, findings_table

    registry = load_registry(options.registry)
    what = (options.well, options.out, options.datasets, options.splits, options.jobs)
    settings = Settings(options.frames_per_chunk, options.shard_size, options.dtype, options.restrict)
    if options.dry_run:
        from data_pipeline.inspect import forecast  # loads torch: 180 MiB that a conversion does without

        print(forecast(*what, settings, registry))
        return 0
    made = build_shards(*what, settings, options.skip, registry)
    for built in made:
        print(_built_line(built))
    datasets = sorted({built.manifest.dataset for built in made})
    errors = [(one.manifest.dataset, one.manifest.split, finding) for one in made for finding in one.manifest.findings]
    errors = [one for one in errors if one[2].severity == "error"] + well_headers(options.well, datasets, registry)
    if found := errors + across_splits(find_manifests(options.out, datasets).values()):
        print(findings_table(found, None), file=sys.stderr)
    return 0


def _built_line(built: Any) -> str:
    """Return a line about a finished split (shards.build.Built)."""
    from data_pipeline.shards.review import count_severities

    manifest = built.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    notes = ["already there" if built.reused else "written"]
    if built.windows_changed:
        notes.append("windows chosen again")
    plural = "s" if len(manifest.shards) > 1 else ""
    notes.append(f"{len(manifest.shards)} shard{plural}, {size / 1e6:.1f} MB")
    notes.append(count_severities([found for found in manifest.findings if found.severity != "note"]))
    if manifest.skip:
        notes.append(f"{manifest.num_skipped_windows(2)} windows left out ({', '.join(manifest.skip)})")
    return f"{built.folder}: {', '.join(note for note in notes if note)}"


def _audit(options: argparse.Namespace) -> int:
    from data_pipeline.registry import load_registry
    from data_pipeline.schema import canonical
    from data_pipeline.shards.review import as_text, audit

    reviews = audit(options.location, load_registry(options.registry), options.datasets, options.splits, options.jobs)
    print(as_text(reviews))
    if options.json is not None:
        write_whole(options.json, canonical(reviews))
    return 2 if any(found.severity == "error" for review in reviews for found in review.findings) else 0


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
    from data_pipeline.progress import progress_bar
    from data_pipeline.shards.review import find_manifests
    from data_pipeline.shards.tar import damage

    damaged, found = False, find_manifests(options.shards, options.datasets, options.splits)
    sizes = {folder: sum(shard.bytes for shard in manifest.shards) for folder, manifest in found.items()}
    with progress_bar(total=sum(sizes.values()), desc="verify", unit="B", leave=False) as bar:
        for folder, manifest in found.items():
            lines = list(damage(folder, manifest, bar.update))
            for line in lines:
                bar.write(f"error: {line}", file=sys.stderr)
            damaged = damaged or bool(lines)
            state = "damaged" if lines else f"good, {manifest.num_frames} frames, {sizes[folder] / 1e6:.1f} MB"
            bar.write(f"{folder}: {state}")
    return 2 if damaged else 0


def _bench(options: argparse.Namespace) -> int:
    from data_pipeline.bench import PAPER_WINDOWS_PER_S, bench
    from data_pipeline.registry import load_registry

    needed = PAPER_WINDOWS_PER_S if options.windows_per_s is None else options.windows_per_s
    what = (options.shards, options.well, options.synthetic, options.datasets)
    print(bench(*what, needed, options.seconds, options.json, load_registry(options.registry)))
    return 0


_Argument = tuple[str, dict[str, Any]]  # name and settings, as argparse takes them


def _arg(name: str, help: str, **settings: Any) -> _Argument:
    return name, {"help": help, **settings}


def _flag(name: str, help: str) -> _Argument:
    return _arg(name, help, action="store_true")


def _datasets(help: str) -> _Argument:
    return _arg("--datasets", f"comma-separated names; {help}", type=names)


_ALL = _datasets("all if left out")
_SPLITS = _arg("--splits", "comma-separated: train, valid, test; all if left out", type=names)
_REGISTRY = _arg("--registry", "folder of your own cards (default: WAVELIT_REGISTRY)", metavar="DIR")
_SHARE = _arg(
    *("--share", "fields that are the canonical channels of their names, all or none (default: names of 3 letters on)"),
    type=names,
    default=[],
    metavar="FIELDS",
)
_JOBS = _arg("--jobs", "processes (default: one per core)", type=count, metavar="N")


# name, help, function, and the arguments
COMMANDS: tuple[tuple[Any, ...], ...] = (
    (
        *("simulate", "simulate the mini-Well: all eight systems, small, no download", _simulate),
        _arg("--preset", "mini: 1 minute; tiny: for tests", required=True, choices=("mini", "tiny")),
        _arg("--out", "folder for the HDF5 files", required=True, type=Path, metavar="DIR"),
        _datasets("the eight if left out. Extras: burgers, euler_multi_quadrants_periodicBC, pdearena_navier_stokes"),
        _arg("--seed", "same seed, same arrays (default 0)", type=int, default=0),
        _JOBS,
        _arg("--contact-sheet", "also draw a picture of all systems", type=Path, metavar="FILE.png"),
    ),
    (
        *("download", "download The Well; every file verified; run again to go on", _download),
        _arg("--out", "files go to DIR/datasets/<dataset>/...", required=True, type=Path, metavar="DIR"),
        _datasets("those with a card if left out"),
        _SPLITS,
        _REGISTRY,
        _flag("--first-only", "the first file of each split alone"),
        _arg(
            *("--from", "another source, such as hf://datasets/polymathic-ai or https://..."),
            dest="source",
            metavar="URL",
        ),
        _arg("--urls", "another list of addresses like the_well's", type=Path, metavar="FILE"),
        _arg("--jobs", "files at a time (default 4)", type=int, default=4, metavar="N"),
        _flag("--dry-run", "print files, bytes and free disk; fetch nothing"),
    ),
    (
        *("register", "draft the card of a dataset that has none", _register),
        _arg("source", "dataset folder, HDF5 files, or one file", type=Path, metavar="DIR_OR_FILE"),
        _arg("--name", "name of the dataset (default: the name of the folder or file)"),
        _arg("--registry", "folder of your cards (default: WAVELIT_REGISTRY)", type=Path, metavar="DIR"),
        _SHARE,
    ),
    (
        *("check", "look for what hinders training, with or without a card; exit code 1 if there are errors", _check),
        _arg("folder", "dataset folder, or folder of datasets", type=Path, metavar="DIR"),
        *(_REGISTRY, _JOBS),
    ),
    (
        *("import", "import data in files of your own: npy, npz, HDF5, netCDF, zarr", _import),
        _arg("files", "files, or globs in quotes", nargs="+", metavar="FILE"),
        _arg("--name", "name of the dataset", required=True),
        _arg("--out", "folder of the dataset, DIR/NAME", required=True, type=Path, metavar="DIR"),
        _arg(
            "--map", "an array or a component: 'data[...,0]=activator'", action="extend", nargs="+", metavar="KEY=FIELD"
        ),
        _arg("--vector", "vector field: velocity=u,v", action="extend", nargs="+", metavar="FIELD=X,Y"),
        _arg("--dims", "axes of the arrays, such as n,t,y,x,c", metavar="AXES"),
        _arg("--boundary", "such as x=periodic,y=wall", metavar="TYPES"),
        _arg("--dt", "time between frames", type=float, metavar="X"),
        _arg("--extent", "length of the domain: L, or LX,LY, or X0,X1,Y0,Y1", metavar="LENGTHS"),
        _arg(
            *("--scalars", "parameters: attrs for all attributes, KEY=NAME for one"),
            action="extend",
            nargs="+",
            metavar="PARAMETERS",
        ),
        _arg("--units", "such as u=m/s,p=Pa"),
        _arg("--split", "fractions of train, valid, test (default 0.8,0.1,0.1)", metavar="FRACTIONS"),
        _arg("--seed", "of the division (default 0)", type=int, default=0),
        _arg("--crop", "even: leave out the last point of an odd axis", choices=("even",)),
        _arg("--leave-out", "numbers of trajectories to leave out, such as 3,7", metavar="NUMBERS"),
        _SHARE,
        _arg("--registry", "folder for the card (default: WAVELIT_REGISTRY, else OUT/cards)", type=Path, metavar="DIR"),
        _arg("--shards", "also make shards in this folder", type=Path, metavar="DIR"),
        _flag("--dry-run", "print what would be done; write nothing"),
    ),
    (
        *("shard", "convert Well HDF5 files to tar shards; run again to go on", _shard),
        _arg(
            *("--well", "<dataset>/data/<split>/*.hdf5 under a folder or a URL"),
            required=True,
            metavar="DIR_OR_URL",
        ),
        _arg("--out", "folder for the shards", required=True, type=Path, metavar="DIR"),
        *(_ALL, _SPLITS, _REGISTRY, _JOBS),
        _arg("--frames-per-chunk", "frames per sample (default 16)", type=int, default=16, metavar="N"),
        _arg("--shard-size", "e.g. 512M or 1G (default 512M)", type=num_bytes, default="512M", metavar="SIZE"),
        _arg("--dtype", "of the stored fields", choices=("float32", "float16"), default="float32"),
        _arg(
            "--restrict",
            "use only N trajectories of each split; those for N are among those for N + 1",
            type=int,
            metavar="N",
        ),
        _arg("--skip", "leave out windows: duplicates,stationary,nonfinite", type=names, default=[], metavar="KINDS"),
        _flag("--dry-run", "print sizes, free disk and time; write nothing"),
    ),
    (
        *("audit", "look for faults in HDF5 files or shards; exit code 2 if there are errors", _audit),
        _arg("location", "folder or URL of a Well, or folder of shards", metavar="WELL_OR_SHARDS"),
        *(_ALL, _SPLITS, _REGISTRY, _JOBS),
        _arg("--json", "also write the findings as JSON", type=Path, metavar="FILE"),
    ),
    (
        *("inspect", "show what shards hold, or the paper's tables of the datasets", _inspect),
        _arg("shards", "folder of shards", nargs="?", metavar="DIR_OR_URL"),
        _flag("--paper", "print the paper's Tables 7 to 9 from the cards"),
        _flag("--findings", "list all that the audit found, not the worst alone"),
        _REGISTRY,
    ),
    (
        *("verify", "compare every byte of the shards with their checksums", _verify),
        *(_arg("shards", "folder of shards", type=Path), _ALL, _SPLITS),
    ),
    (
        *("bench", "measure how fast windows are read, beside other ways to read them", _bench),
        _arg("shards", "folder of shards; the train split of one dataset is read", nargs="?", type=Path),
        _arg("--well", "the HDF5 files behind them, for the_well and h5py", type=Path, metavar="DIR"),
        _arg("--synthetic", "make data of this shape for the purpose, e.g. 256x256x3", metavar="HxWxC"),
        _arg("--datasets", "one dataset (default: of the largest windows)", type=names, metavar="NAME"),
        _arg(
            "--windows-per-s",
            "what training needs: throughput/samples_per_s of a run in TensorBoard (default: the paper's 27)",
            type=float,
            metavar="X",
        ),
        _arg("--seconds", "time for each way (default 3)", type=float, default=3.0, metavar="S"),
        _arg("--json", "also write the figures as JSON", type=Path, metavar="FILE"),
        _REGISTRY,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="data-pipeline", description="Makes training data for PDE models from The Well, or from the mini-Well."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, about, function, *own in COMMANDS:
        command = commands.add_parser(name, help=about)
        command.set_defaults(function=function)
        for argument, settings in own:
            command.add_argument(argument, **settings)

    def run() -> int:
        options = parser.parse_args(arguments)
        code: int = options.function(options)
        return code

    return run_command(run, "\ninterrupted: what was finished is kept; run the same command again to go on")
