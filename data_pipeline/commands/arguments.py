"""Arguments that several commands share, and how their texts are read.

A command module has `add(commands)`, which declares its arguments, and `_run(options)`, which imports what it needs:
`--help` answers at once.
"""

import argparse
from typing import TypeAlias

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
