"""Kill a training (kill -9) at random moments, more than half of them in saves, and compare it with an undisturbed run.

    python tests/benchmarks/kill_training.py SHARDS [--kills 30] [--world-sizes 1,2] [--steps 400] [--seed 0]

A kill ends all processes, or one rank; then the launcher and the other ranks must end by themselves. The same command
continues the run, in a random number of processes out of --world-sizes. Every step must have the datasets and windows
of the undisturbed run, and its loss to 1e-4. With a single world size, log.jsonl and the parameters must be the same
bytes. The exit code is 1 if anything differs.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fm.checkpoint import list_checkpoints
from fm.config import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from whole_runs import accelerate, last_weights, log, small, start

PATIENCE = 60.0  # seconds that all have to end in after the death of one rank
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"width": 64},  # 1 MB of weights, so that a save lasts
    "train": {"learning_rate": 3e-5},  # at 1e-3, roundings grow to 1e-3 of a loss within a hundred steps
    "checkpoint": {"every": 3, "keep": 2},
    "validation": {"every": 50, "windows": 2, "rollouts": 0},
}


@dataclass(frozen=True)
class Kill:
    what: str
    step: int  # lines of the log
    in_save: bool  # a temporary folder of this process was there after the kill
    seconds: float  # until all processes had ended
    output: str


def launch(recipe: Recipe, world_size: int) -> "subprocess.Popen[str]":
    return start(recipe, *(accelerate("cpu2", "--num_processes", str(world_size)) if world_size > 1 else ()))


def run_to_the_end(recipe: Recipe, world_size: int) -> str:
    process = launch(recipe, world_size)
    output = "".join(process.communicate())
    if process.returncode:
        raise SystemExit(f"{recipe.run.directory}: exit code {process.returncode} without a kill\n{output}")
    return output


def train_and_kill(recipe: Recipe, world_size: int, chance: random.Random) -> Kill:
    """Continue the run, kill it some steps later, and wait until none of its processes is left."""
    directory, began = recipe.run.directory, time.time()
    root, lines = directory / "checkpoints", directory / "log.jsonl"
    newest = max(list_checkpoints(root), default=0)
    until, wait_for_save, pause = newest + chance.randrange(7), chance.random() < 0.7, chance.uniform(0, 0.015)
    victim = chance.choice([None, *range(world_size)]) if world_size > 1 else None

    def saving() -> bool:
        return any(is_since(folder, began) for folder in root.glob("*.tmp"))  # earlier kills leave some, too

    process = launch(recipe, world_size)
    wait_for(lambda: is_since(directory / "run.json", began) and lines.is_file(), process)
    ranks = ranks_of(process, world_size)
    wait_for(lambda: count_lines(lines) >= until, process)
    if wait_for_save:
        wait_for(saving, process)
    time.sleep(pause)
    for target in {psutil.Process(process.pid), *ranks} if victim is None else [ranks[victim]]:
        target.kill()
    killed, in_save = time.perf_counter(), saving()
    try:  # ranks write to the launcher's pipes, which are open until the last has ended
        output = "".join(process.communicate(timeout=PATIENCE))
    except subprocess.TimeoutExpired:
        left = [target for target in {psutil.Process(process.pid), *ranks} if target.is_running()]
        for target in left:
            target.kill()
        raise SystemExit(f"alive {PATIENCE:.0f} s after rank {victim} was killed: {left}") from None
    if victim is not None and process.returncode == 0:
        raise SystemExit(f"the launcher's exit code is 0, but rank {victim} was killed\n{output}")
    if newest and f"from step {newest}\n" not in output:
        raise SystemExit(f"did not continue from the newest checkpoint, of step {newest}\n{output}")
    what = f"{world_size} process{'' if world_size == 1 else 'es'}, {'all' if victim is None else f'rank {victim}'}"
    return Kill(what, count_lines(lines), in_save, time.perf_counter() - killed, output)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not condition():
        if process.poll() is not None:
            output = "".join(process.communicate())
            raise SystemExit(f"ended before its kill (exit code {process.returncode}); too few --steps?\n{output}")
        time.sleep(0.002)


def is_since(path: Path, began: float) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime > began
    return False


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n")


def ranks_of(process: "subprocess.Popen[str]", world_size: int) -> list[psutil.Process]:
    """Return the processes of the ranks, by rank.

    Torch's launcher starts each rank in a session of its own, so a signal to the process group would not reach them.
    """
    launcher = psutil.Process(process.pid)
    ranks = [child for child in launcher.children() if "RANK" in child.environ()] if world_size > 1 else [launcher]
    assert len(ranks) == world_size, ranks
    return sorted(ranks, key=lambda rank: int(rank.environ().get("RANK", "0")))


def compare(killed: Path, undisturbed: Path, exact: bool) -> list[str]:
    """Return the differences."""
    lines, expected = log(killed), log(undisturbed)
    keys = ("step", "dataset", "windows", "lr")
    wrong = [key for key in keys if [line[key] for line in lines] != [line[key] for line in expected]]
    pairs = [(line["loss"], other["loss"]) for line, other in zip(lines, expected, strict=False)]
    largest = max(abs(loss / other - 1) for loss, other in pairs)
    identical = last_weights(killed) == last_weights(undisturbed)
    bits = "yes" if identical else "no"
    print(f"largest relative difference of a loss {largest:.2g}, parameters bit-identical: {bits}")
    if largest > 1e-4 or (exact and lines != expected):
        wrong.append("losses")
    if exact and not identical:
        wrong.append("parameters")
    if left := [path.name for path in (killed / "checkpoints").glob(".*")]:
        wrong.append(f"left behind: {', '.join(left)}")
    return wrong


def chaos(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the differences between the killed and the undisturbed run."""
    chance, sizes, steps = random.Random(options.seed), options.world_sizes, options.steps or 40 + 12 * options.kills
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "steps": steps}}
    killed, undisturbed = (small(options.shards, folder / name, **sections) for name in ("killed", "undisturbed"))
    kills: list[Kill] = []
    for number in range(1, options.kills + 1):
        kills.append(kill := train_and_kill(killed, chance.choice(sizes), chance))
        where = f"step {kill.step}{' in a save' if kill.in_save else ''}"
        print(f"{number:3} {kill.what} killed at {where}, {kill.seconds:.1f} s until all had ended", flush=True)
    outputs = [*(kill.output for kill in kills), run_to_the_end(killed, chance.choice(sizes))]
    run_to_the_end(undisturbed, sizes[0])
    print(f"{len(kills)} kills in {steps} steps, {sum(kill.in_save for kill in kills)} of them in saves:")
    for (what, in_save), count in sorted(Counter((kill.what, kill.in_save) for kill in kills).items()):
        print(f"{count:5} {what}{', in a save' if in_save else ''}")
    ends = [kill.seconds for kill in kills if "rank" in kill.what]
    print(f"{max(ends, default=0):.1f} s at most until all had ended after the death of a rank")
    damaged = [line for output in outputs for line in output.splitlines() if "damaged" in line]
    print("\n".join([f"{len(damaged)} damaged checkpoints", *damaged]))
    return compare(killed.run.directory, undisturbed.run.directory, len(sizes) == 1) + damaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--world-sizes", type=lambda text: [int(size) for size in text.split(",")], default=[1, 2])
    parser.add_argument("--steps", type=int, help="of the run, which must outlast its kills (default: 40 + 12 a kill)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs stay (default: they do not)")
    options = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"  # or a kill takes along what a run has said
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        wrong = chaos(options, options.folder or Path(temporary))
    print(f"{time.perf_counter() - began:.0f} s")
    print("\n".join(f"DIFFERENT: {what}" for what in wrong) or "as the undisturbed run")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
