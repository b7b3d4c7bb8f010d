"""Command line: from simulations or The Well's files to shards, and what there is to know of them on the way.

Exit codes: 0 done, 2 the user's mistake (one message on stderr), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from data_pipeline.commands import audit, bench, download, inspect, register, shard, simulate
from data_pipeline.errors import UserError


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
    for command in (simulate, download, register, shard, audit, inspect, bench):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
