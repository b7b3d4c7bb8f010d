"""Measure what a checkpoint every 100 steps costs a training step: asynchronous, waited for, and never.

    python tests/benchmarks/bench_checkpoint.py SHARDS [--rounds 20] [--steps 10] [--every 100] [key=value ...]

One run of the quickstart's model, whose blocks of steps take the ways in turn, in an order that rotates. A block that
saves does so at its beginning, and the write ends within it. Short blocks separate a save from the noise of a shared
machine. Datasets vary in cost. So the cost of a save is the seconds of a block, less the usual seconds of its steps:
the median of their dataset over the "never" blocks. The CPU seconds of all threads, which other load disturbs less, are
treated alike.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from fm.config import load_recipe
from fm.distributed import StopSignal, make_accelerator
from fm.training.trainer import Trainer

WAYS = ("never", "asynchronous", "waited for")
WARM_UP = 40  # steps in which every dataset is seen and moments are allocated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each way (default 20)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block (default 10)")
    parser.add_argument("--every", type=int, default=100, help="steps between saves that the result is for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:  # beside runs/, on the disk that they are on
        steps = WARM_UP + options.steps * len(WAYS) * options.rounds
        settings = [f"data.shards={options.shards}", f"run.dir={folder}/run", f"train.steps={steps}"]
        settings += ["validation.every=0", "tracking.progress=false", *options.overrides]
        recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml", settings)
        blocks, stalls = measure(Trainer(recipe, make_accelerator(recipe.train.clip)), options.rounds, options.steps)
        size = sum(file.stat().st_size for file in next(Path(folder).glob("run/checkpoints/step_*")).iterdir())
    report(blocks, stalls, size, options.every)


def measure(trainer: Trainer, rounds: int, steps: int) -> tuple[dict, dict]:
    """Return the blocks of each way, and the seconds that each of its saves held the loop.

    A block is a list of steps (dataset, seconds, CPU seconds).
    """
    blocks, stalls = defaultdict(list), defaultdict(list)
    stop = StopSignal()
    with trainer.open_record() as trainer.record, trainer.writer:
        for _ in range(WARM_UP):
            trainer.train_steps(stop)
        for round_ in range(rounds):
            for way in WAYS[round_ % 3 :] + WAYS[: round_ % 3]:
                taken, before = [], (time.perf_counter(), time.process_time())
                if way != "never":
                    trainer.save(wait=way == "waited for")
                    stalls[way].append(time.perf_counter() - before[0])
                for _ in range(steps):
                    dataset = trainer.division.draws_of(trainer.step)[0].dataset
                    trainer.train_steps(stop)
                    now = time.perf_counter(), time.process_time()
                    taken.append((dataset, now[0] - before[0], now[1] - before[1]))
                    before = now
                trainer.writer.wait()
                blocks[way].append(taken)
    return blocks, stalls


def report(blocks: dict, stalls: dict, size: int, every: int) -> None:
    usual = [usual_cost(blocks["never"], column) for column in (1, 2)]
    step = statistics.mean(entry[1] for block in blocks["never"] for entry in block)
    cpu_step = statistics.mean(entry[2] for block in blocks["never"] for entry in block)
    print(
        f"{len(blocks['never'])} blocks of {len(blocks['never'][0])} steps each way, checkpoint of {size / 1e6:.1f} MB"
    )
    print(f"load {os.getloadavg()[0]:.1f}, {os.environ.get('OMP_NUM_THREADS', 'default')} threads per operation")
    print(f"a step without saves: {step:.4f} s, {cpu_step:.4f} s of CPU")
    base = [statistics.median(excess(block, usual[i], i + 1) for block in blocks["never"]) for i in (0, 1)]
    for way in WAYS[1:]:
        extra = [[excess(block, usual[i], i + 1) - base[i] for block in blocks[way]] for i in (0, 1)]
        wall, cpu, stall = (statistics.median(values) for values in (*extra, stalls[way]))
        quarter, _, three_quarters = (100 * q / every / step for q in statistics.quantiles(extra[0], n=4))
        print(
            f"{way:>12} every {every} steps: {100 * wall / every / step:+.2f} % of the time (blocks, quartiles: "
            f"{quarter:+.2f} to {three_quarters:+.2f}), {100 * cpu / every / cpu_step:+.2f} % of the CPU time; "
            f"the loop stood still for {1000 * stall:.0f} ms, {100 * stall / every / step:.2f} %"
        )


def usual_cost(blocks: list, column: int) -> dict[str, float]:
    """Return dataset -> median of a column over its steps."""
    values = defaultdict(list)
    for entry in (entry for block in blocks for entry in block):
        values[entry[0]].append(entry[column])
    return {dataset: statistics.median(found) for dataset, found in values.items()}


def excess(block: list, usual: dict[str, float], column: int) -> float:
    return sum(entry[column] - usual[entry[0]] for entry in block)


if __name__ == "__main__":
    main()
