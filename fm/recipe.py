"""A recipe is YAML that is also a Python program: `accelerate launch recipes/x.yaml key.sub=value` runs it.

The first and last lines that make it so stand in fm/config.py. To YAML the first is the key `launch`, ignored here,
and the last a comment; to Python everything between them is one string.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.files import UserError
from fm.config import load_recipe
from fm.distributed import EXIT_LOST, EXIT_USER_ERROR, ProcessLost
from fm.training.trainer import train


def run(path: str) -> None:
    """Train the recipe at `path` with the overrides on the command line, and exit.

    Exit codes: 0 done, 2 the user's mistake, 3 another process of the run is lost, 130 interrupted and saved.
    """
    sys.exit(main(path, sys.argv[1:]))


def main(path: str, overrides: Sequence[str]) -> int:
    """Train a recipe; a user's mistake is printed without a traceback. Returns the exit code."""
    if {"-h", "--help"} & set(overrides):
        print(f"usage: accelerate launch {path} [section.key=value ...]\n\n{Path(path).read_text()}")
        return 0
    try:
        return train(load_recipe(Path(path), overrides))
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except ProcessLost as lost:
        print(
            f"\nerror: {lost}.\nIts own last words are among the lines around this. What was saved is kept: the same "
            "command continues from the newest whole checkpoint (accelerate launch --max_restarts N: by itself).",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_LOST
