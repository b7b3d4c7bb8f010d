"""The command that imports files which `register` refused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.importer.fields import plain_name
from data_pipeline.importer.options import Options
from data_pipeline.importer.plan import NotEnoughKnown, make_plan
from data_pipeline.schema import NAME
from data_pipeline.well.register import NotWell

OUT = Path("data/imported")


@contextmanager
def with_import_command(source: Path, name: str | None) -> Iterator[None]:
    """End the message for files that are not in the Well's layout with the command that imports them."""
    try:
        yield
    except NotWell as error:
        if not source.exists():
            raise
        command = import_command(source, name)
        raise UserError(f"{error}\n`import` reads other layouts, and writes the Well's:\n  {command}") from error


def import_command(source: Path, name: str | None) -> str:
    """Return the `data-pipeline import` command for a file, or for the files of a folder.

    What the files leave open is guessed, as `import` guesses it. Where a look at them fails, the command has no options
    beside the names: `import` says what is wrong.
    """
    options = Options((_pattern(source),), name or _name(source), OUT)
    try:
        make_plan(options)
    except NotEnoughKnown as needs:
        return needs.command
    except UserError:
        pass
    return options.command()


def _name(source: Path) -> str:
    """Return the name for a dataset, made from the name of its folder or file."""
    stem = Path(os.path.abspath(source)).stem
    try:
        return plain_name(stem) if not NAME.fullmatch(stem) else stem
    except UserError:
        return "mine"


def _pattern(source: Path) -> str:
    """Return a file's path, or a glob of the files that a folder holds most of; a zarr store is one file."""
    if not source.is_dir() or any((source / name).is_file() for name in (".zgroup", ".zarray", "zarr.json")):
        return str(source)
    inside = "data/*/*" if (source / "data").is_dir() else "*"
    suffixes = Counter(path.suffix for path in source.glob(inside) if not path.name.startswith("."))
    return f"{source}/{inside}{suffixes.most_common(1)[0][0] if suffixes else ''}"
