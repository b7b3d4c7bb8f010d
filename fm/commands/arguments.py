"""What the command modules share.

A command module has `add(commands)`, which declares its arguments, and imports what it needs when it runs: `--help`
answers at once.
"""

import argparse
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class CommandParser(argparse.ArgumentParser):
    """The parser of a command; where it takes `overrides`, they may stand before, between and after options.

    argparse alone wants all positional arguments side by side.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = super().parse_known_args(args, namespace)
        if hasattr(options, "overrides"):
            found = [word for word in rest if "=" in word and not word.startswith("-")]
            options.overrides = [*options.overrides, *found]
            rest = [word for word in rest if word not in found]
        return options, rest
