"""Compare training in two processes on a CPU with one process: the quickstart, launched as a user does, in turns.

    python tests/benchmarks/scaling_in_processes.py SHARDS [key=value ...] [--rounds 3] [--steps 60]
    ... SHARDS 'data.datasets=[shear_flow]'  # few datasets, so that all have been met when counting begins

Two gloo processes (launch/cpu2.yaml), a thread each, against one process with a thread or two: with the same global
batch (strong scaling) and with the same windows a process (weak scaling). All draw the same datasets in the same steps.

    step          seconds by the run's own events, median over paces of ten steps and rounds; validation is off
    efficiency    of the step's windows/s, over those of one thread times the threads
    CPU           of all processes a step, a window: what is done twice, exchanged or spent in spinning; waiting costs
                  none. Other load disturbs it less than wall-clock time
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from launched import finish, log, paces, start

EVERY = 10  # steps of a pace; the first does not count
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Way:
    name: str
    config: str
    threads: int  # of each process
    growth: int  # global batch over that of the first way

    @property
    def cores(self) -> int:
        return self.threads * (2 if self.config else 1)


WAYS = (
    Way("one process, one thread", "", 1, 1),
    Way("one process, two threads", "", 2, 1),
    Way("two processes, the same global batch", "cpu2", 1, 1),
    Way("two processes, the same windows each", "cpu2", 1, 2),
)


def measure(way: Way, options: argparse.Namespace) -> tuple[list[float], float]:
    """Train; return the seconds of a step, averaged over every ten, and the CPU seconds of a step of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        settings = [f"data.shards={options.shards}", f"train.global_batch={options.batch * way.growth}"]
        settings += [f"run.stop_at={EVERY + options.steps}", f"tracking.every={EVERY}", *options.overrides]
        process = start(directory, settings, way.config, threads=way.threads)
        cpu = watch(process, directory)
        finish(process, directory)
        return paces(directory), cpu


def watch(process: Any, directory: Path) -> float:
    """Return the CPU seconds of a step of the process and its children, after the first pace, which counts FLOPs."""
    seen: list[tuple[int, float]] = []
    while process.poll() is None:
        steps = len(log(directory)) if (directory / "log.jsonl").exists() else 0
        if steps > EVERY and (not seen or steps > seen[-1][0]):
            seen.append((steps, cpu_seconds(process.pid)))
        time.sleep(POLL_SECONDS)
    if len(seen) < 2:
        raise SystemExit(f"{directory}: too few steps to count; more --steps")
    (first, before), (last, after) = seen[0], seen[-1]
    return (after - before) / (last - first)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and its descendants that are alive."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("overrides", nargs="*", help="of recipes/quickstart.yaml, such as model.width=128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="that count, a multiple of ten (default 60)")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step (default 4)")
    parser.add_argument("--json", type=Path, help="also write all paces to this file, after each round")
    options = parser.parse_args()
    steps: dict[str, list[float]] = {way.name: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way.name: [] for way in WAYS}
    loads = []
    for number in range(options.rounds):
        turn = number % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            found, used = measure(way, options)
            steps[way.name] += found
            cpu[way.name].append(used)
            loads.append(os.getloadavg()[0])
        if options.json:
            options.json.write_text(json.dumps({"steps": steps, "cpu": cpu, "loads": loads}))
    print(f"{options.rounds} x {options.steps} steps of each way, load {min(loads):.1f} to {max(loads):.1f}\n")
    print("| way | windows | step, ms (quartiles) | windows/s | efficiency | CPU ms/window | over the first |")
    print("|:---|---:|---:|---:|---:|---:|---:|")
    for way in WAYS:
        print(row(way, options.batch, steps, cpu))


def row(way: Way, batch: int, steps: dict[str, list[float]], cpu: dict[str, list[float]]) -> str:
    windows, first = batch * way.growth, WAYS[0].name
    found = sorted(steps[way.name])
    seconds, low, high = median(found), found[len(found) // 4], found[3 * len(found) // 4]
    rate, alone = windows / seconds, batch / median(steps[first])
    used = median(cpu[way.name]) / windows
    cells = [str(windows), f"{1e3 * seconds:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})", f"{rate:.1f}"]
    cells += [f"{rate / alone / way.cores:.2f}", f"{1e3 * used:.1f}", f"{used * batch / median(cpu[first]):.2f}"]
    return f"| {way.name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
