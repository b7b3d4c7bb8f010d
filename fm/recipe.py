"""The entry of a training run: `accelerate launch recipes/x.yaml key.sub=value`.

A recipe is YAML and a Python program at once, through its first and last lines (FIRST_LINE and LAST_LINE in
fm/config.py). To YAML the first line is the key `launch`, which the loader ignores, and the last line is a comment. To
Python everything between them is one string, and the first line calls `run`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import run_command
from fm.datasets import imported_sections, load_own_recipe
from fm.distributed import EXIT_LOST, ProcessLost, explain_launcher_traceback, launch
from fm.model.imports import remember_imports
from fm.training.trainer import train


def run(path: str) -> None:
    """Train the recipe at `path` with the overrides on the command line, and exit.

    Exit codes: 0 done, 2 a mistake of the user, 3 another process of the run is lost, 130 interrupted and saved.
    """
    sys.exit(explain_launcher_traceback(main(path, sys.argv[1:])))


def main(path: str, overrides: Sequence[str], processes: int = 1) -> int:
    """Train a recipe, here or in new processes, and return the exit code. Mistakes of the user have no traceback."""
    return run_command(lambda: _train(path, overrides, processes), "\ninterrupted: what was saved is kept")


def _train(path: str, overrides: Sequence[str], processes: int) -> int:
    if {"-h", "--help"} & set(overrides):
        print(f"usage: accelerate launch {path} [section.key=value ...]\n\n{Path(path).read_text()}")
        return 0
    try:
        recipe = load_own_recipe(Path(path), overrides)
        if processes != 1:
            return launch(processes, ["train", path, *overrides])
        remember_imports(imported_sections(recipe))
        return train(recipe)
    except ProcessLost as lost:
        print(
            f"\nerror: {lost}.\nIts own last words are among the lines around this. What was saved is kept: the same "
            "command continues from the newest whole checkpoint (accelerate launch --max_restarts N: by itself).",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_LOST
