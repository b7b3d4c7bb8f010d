"""How a command of `fm` is declared: one function, with its arguments above it.

The parser is argparse: options with several values, such as `--datasets NAME NAME`, are not possible with click, and so
with typer.
"""

import argparse
from collections.abc import Callable
from typing import Any

Run = Callable[[argparse.Namespace], int | None]  # returns the exit code, None for 0
Argument = tuple[tuple[str, ...], dict[str, Any]]  # names and parameters for ArgumentParser.add_argument


class CommandParser(argparse.ArgumentParser):
    """The parser of a command: `overrides`, if it has any, may stand before, between and after options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the options and the words that belong to none."""
        options, rest = super().parse_known_args(args, namespace)
        if hasattr(options, "overrides"):
            found = [word for word in rest if "=" in word and not word.startswith("-")]
            options.overrides = [*options.overrides, *found]
            rest = [word for word in rest if word not in found]
        return options, rest


PARSER = argparse.ArgumentParser(prog="fm", description="Train and evaluate WaveLiT-FM.")
_SUBPARSERS = PARSER.add_subparsers(required=True, metavar="command", parser_class=CommandParser)
COMMANDS = _SUBPARSERS.choices  # name -> parser


def arg(*names: str, **parameters: Any) -> Argument:
    """Return an argument of a command; its default, if it has one, is added to the help."""
    if "default" in parameters:
        parameters["help"] += " (default: %(default)s)"
    return names, parameters


def command(*arguments: Argument, usage: str | None = None) -> Callable[[Run], Run]:
    """Make the decorated function a command: its name is the command's name and its docstring the help."""

    def register(run: Run) -> Run:
        text = run.__doc__ or ""
        summary = text.partition("\n")[0].removesuffix(".")
        parser = _SUBPARSERS.add_parser(run.__name__.replace("_", "-"), help=summary, description=text, usage=usage)
        for names, parameters in arguments:
            parser.add_argument(*names, **parameters)
        parser.set_defaults(command=run)
        return run

    return register
