"""How a command of `fm` is declared: one function, with its arguments above it.

The parser is argparse: options with several values, such as `--datasets NAME NAME`, are not possible with click, and so
with typer.
"""

import argparse
from collections.abc import Callable
from typing import Any

from data_pipeline.errors import UserError

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


MODEL_HELP = "run directory, checkpoint, exported model, or hf://organization/name"


def arg(*names: str, **parameters: Any) -> Argument:
    """Return an argument of a command; its default, if it has one, is added to the help."""
    if "default" in parameters:
        parameters["help"] += " (default: %(default)s)"
    return names, parameters


def check_above_zero(option: str, value: float | None, quantity: str = "a number") -> None:
    """Raise UserError for the value of an option that is given and not above 0, or not finite."""
    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"{option}: expected {quantity} above 0, got {value}")


class AllowImport(argparse.Action):
    """Allow a class of the user's to be imported, here and in the processes that the command starts."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add a name to those that are allowed."""
        from fm.model.imports import allow_imports  # here, since `--help` does not wait for torch

        allow_imports([values])


OVERRIDES = arg("overrides", nargs="*", help="section.key=value")
PROCESSES = arg("--processes", type=int, default=1, metavar="N", help="number of processes, of one thread each")
WITHOUT_MODEL = ("status", "score", "compare")  # commands that read scores and logs only
ALLOW_IMPORT = arg(
    "--allow-import",
    action=AllowImport,
    dest=argparse.SUPPRESS,
    metavar="MODULE:CLASS",
    help="class of yours that a model's files may name; may be repeated (also: the environment's WAVELIT_IMPORT)",
)


def command(*arguments: Argument, usage: str | None = None) -> Callable[[Run], Run]:
    """Make the decorated function a command: its name is the command's name and its docstring the help.

    All have the option --allow-import but those in WITHOUT_MODEL.
    """

    def register(run: Run) -> Run:
        text = run.__doc__ or ""
        summary = text.partition("\n")[0].removesuffix(".")
        parser = _SUBPARSERS.add_parser(run.__name__.replace("_", "-"), help=summary, description=text, usage=usage)
        for names, parameters in (*arguments, *(() if run.__name__ in WITHOUT_MODEL else (ALLOW_IMPORT,))):
            parser.add_argument(*names, **parameters)
        parser.set_defaults(command=run)
        return run

    return register
