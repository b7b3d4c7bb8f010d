"""Compare the quickstart's losses under every launch configuration, and when a run goes from one to the next.

    python tests/benchmarks/compare_launches.py SHARDS [--steps 50] [--configs cpu2 fsdp ...] [key=value ...]

The reference is one process of one thread. Compared are --steps steps from the beginning, as many from its checkpoint,
and a run that goes through all configurations, 10 steps under each, and ends in one process. Windows and learning rates
must be equal. Losses differ by the order of summation, and training amplifies the difference; one row shows by how much
for one process with two threads. The optimizer is AdamW, since FSDP and DeepSpeed refuse Muon. The exit code is 1 if
windows differ, or losses by more than 1e-3. On GPUs, name their configurations: --configs ddp fsdp deepspeed_zero2.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from launched import finish, log, start

CONFIGS = ("cpu2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp")


def run(config: str, directory: Path, stop_at: int, options: argparse.Namespace, threads: int = 1) -> None:
    """Train to `stop_at`, in one process if `config` is empty."""
    settings = [f"data.shards={options.shards}", f"run.stop_at={stop_at}", "train.optimizer=adamw", *options.overrides]
    finish(start(directory, settings, config, options.processes, threads), directory)


def difference(found: list[dict], expected: list[dict]) -> float:
    """Return the largest relative difference of losses. SystemExit if the windows differ."""
    for line, other in zip(found, expected, strict=True):
        if (line["step"], line["windows"], line["lr"]) != (other["step"], other["windows"], other["lr"]):
            raise SystemExit(f"step {other['step']}: other windows")
    return max(abs(line["loss"] / other["loss"] - 1) for line, other in zip(found, expected, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    options = parser.parse_args()
    steps, chain = options.steps, [*options.configs, ""]
    with tempfile.TemporaryDirectory() as folder:
        whole, half = Path(folder) / "whole", Path(folder) / "half"
        run("", whole, steps, options)
        shutil.copytree(whole, half)
        run("", whole, max(2 * steps, 10 * len(chain)), options)
        expected, worst = log(whole), 0.0
        print(f"{steps} steps, {options.processes} processes; largest relative difference of losses from one process's")
        print("                   from the start   from step", steps)
        for config, threads in [("", 2), *((config, 1) for config in options.configs)]:
            fresh, further = (Path(folder) / f"{config}{part}" for part in ("fresh", "further"))
            shutil.copytree(half, further)
            run(config, fresh, steps, options, threads)
            run(config, further, 2 * steps, options, threads)
            found = [difference(log(fresh), expected[:steps]), difference(log(further), expected[: 2 * steps])]
            worst = max(worst, *found)
            print(f"  {config or 'two threads':<16} {found[0]:14.1e} {found[1]:14.1e}", flush=True)
        for number, config in enumerate(chain, start=1):
            run(config, Path(folder) / "chain", 10 * number, options)
        found = [difference(log(Path(folder) / "chain"), expected[: 10 * len(chain)])]
        print(f"one run, 10 steps each under {', '.join(options.configs)}, one process: {found[0]:.1e}")
    return 0 if max(worst, found[0]) <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
