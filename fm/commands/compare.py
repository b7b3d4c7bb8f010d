"""fm compare: scores of evaluated runs side by side, and beside published ones."""

import argparse
import dataclasses
from pathlib import Path

from data_pipeline.errors import UserError
from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="scores of evaluated runs side by side, and beside published ones")
    compare.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run, report folder or errors.npz")
    compare.add_argument("--protocol", metavar="NAME_OR_FILE", help="protocol of all scores (default: the first run's)")
    compare.add_argument("--statistic", help="median or mean over trajectories (default: the protocol's)")
    compare.add_argument("--labels", metavar="A,B", help="names of the columns (default: the runs')")
    compare.add_argument("--format", default="md", help="md, csv, json or latex (default: md)")
    compare.add_argument("--out", type=Path, metavar="FILE", help="write there instead of printing")
    compare.add_argument("--published", action="store_true", help="only list the published scores, with their sources")
    compare.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipeline.cards.registry import load_registry
    from data_pipeline.files import atomic_file
    from fm.scores.compare import compare_document, load_scores
    from fm.scores.formats import render
    from fm.scores.protocol import load_protocol
    from fm.scores.published import beside_published, published_document

    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out}: expected a file to write, got a folder: name a file in it")
    if bool(options.runs) == options.published:
        raise UserError("compare: expected runs, or --published alone")
    if options.published:
        document = published_document(load_registry())
    else:
        protocol = load_protocol(options.protocol) if options.protocol else None
        labels = options.labels.split(",") if options.labels else None
        runs = load_scores(options.runs, protocol, options.statistic, labels)
        document = compare_document(runs)
        tables, notes = beside_published(runs, load_registry())
        document = dataclasses.replace(document, tables=[*document.tables, *tables], notes=[*document.notes, *notes])
    text = render(document, options.format)
    if options.out is None:
        print(text, end="")
    else:
        with atomic_file(options.out) as file:
            file.write(text.encode())
    return 0
