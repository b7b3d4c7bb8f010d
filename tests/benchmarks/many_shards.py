"""Train on more shards than a process may open files: The Well as 3,000 small shards, at `ulimit -n 256`.

    python tests/benchmarks/many_shards.py [--shards 3000] [--open-files 256] [--steps 2000] [--stream]

Writes random shards of all eight datasets, on a grid of 16x24, and trains a small model on them by `fm train` in a
process with that limit. With --stream a server on this machine sends the shards, whole. The exit code is fm's.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from data_pipeline.registry import load_registry

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from faulty_server import FaultyServer
from streamed import write_dataset
from whole_runs import small, written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=3000)
    parser.add_argument("--open-files", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stream", action="store_true")
    options = parser.parse_args()
    cards = load_registry().cards
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        for name, card in cards.items():
            each = -(-options.shards // len(cards))
            write_dataset(shards, name, "float32", card.state_channels, card.constant_channels, num_shards=each)
        with FaultyServer(shards) if options.stream else nullcontext() as server:
            recipe = small(
                shards,
                Path(folder) / "run",
                data={"shards": server.url if server else str(shards), "datasets": None, "cache": f"{folder}/cache"},
                train={"steps": options.steps},
                sampling={"shuffle": "blocks" if server else "global"},
                checkpoint={"every": options.steps},
            )
            limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (options.open_files, options.open_files))
            command, start = ["fm", "train", str(written(recipe))], time.perf_counter()
            code = subprocess.run(command, preexec_fn=limit).returncode
        print(
            f"{len(list(shards.rglob('*.tar')))} shards, {options.open_files} open files, {options.steps} steps: ",
            end="",
        )
        print(f"exit code {code} after {time.perf_counter() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
