"""Measure whether training together dilutes: a joint model and one with adapters beside models of one dataset each.

    python tests/benchmarks/dilution.py OUT [--shards SHARDS] [--steps 1300] [--seeds 0 1 2] [--rank 8] [--jobs 2]

Runs of recipes/paper_mini.yaml, for each seed S:

    joint_S          all datasets of the shards, `--steps` steps
    adapters_S       the same with model.adapter_rank=RANK
    windows_S_NAME   one dataset, as many steps as it is expected to have in joint_S: equal windows
    flops_S_NAME     one dataset, as many steps as take the FLOPs expected of joint_S: equal compute

The warm-up of each is in the recipe's proportion to its steps, and each is validated five times, so that equal windows
and equal compute are both reached near the end of a schedule. Lengths are the same for all seeds. A run is one process
of one thread, and `--jobs` run at a time. Complete runs are skipped and others continue, so the same command goes on
after an interruption. Then `fm transfer` prints the joint models beside the single ones, and the models with adapters
beside them, and writes OUT/transfer_joint and OUT/transfer_adapters. Each flops_S_NAME takes as long as joint_S.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fm.config import load_recipe
from fm.lab.transfer import transfer
from fm.lab.workload import read_workload
from fm.training.flops import forward_flops

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "paper_mini.yaml"
VALIDATIONS = 5


def single_steps(shards: str, steps: int) -> dict[str, tuple[int, int]]:
    """Return, by dataset, the steps that see its windows of a joint run, and the steps that take its FLOPs."""
    recipe = load_recipe(RECIPE, [f"data.shards={shards}", f"train.steps={steps}"])
    workload = read_workload(recipe, require_shards=True)
    model, shares = workload.model(), workload.schedule().shares
    flops = {name: forward_flops(model, name, dataset.grid) for name, dataset in workload.datasets.items()}
    mean = sum(shares[name] * flops[name] for name in flops)  # of a window
    return {name: (math.ceil(shares[name] * steps), math.ceil(steps * mean / flops[name])) for name in flops}


def command(folder: Path, shards: str, steps: int, seed: int, settings: list[str]) -> list[str]:
    """Return the command of a run."""
    mini = load_recipe(RECIPE).train
    every = [f"validation.every={max(1, steps // VALIDATIONS)}", "validation.rollouts=0", "validation.windows=16"]
    length = [f"train.steps={steps}", f"train.warmup_steps={steps * mini.warmup_steps // mini.steps}"]
    where = [f"run.dir={folder}", f"run.name={folder.name}", f"run.seed={seed}", f"data.shards={shards}"]
    quiet = ["tracking.progress=false", "sampling.max_passes=null", "train.precision=float32"]
    return [sys.executable, "-m", "fm", "train", str(RECIPE), *where, *length, *every, *quiet, *settings]


def is_complete(folder: Path, steps: int) -> bool:
    """Return whether the run has validated its last step, which it does after it has saved it."""
    events = folder / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    return any(line.get("kind") == "validation" and line["step"] == steps for line in lines)


def run(folder: Path, shards: str, steps: int, seed: int, settings: list[str]) -> None:
    """Run or continue a training unless it is complete. SystemExit, with its output, if it fails."""
    if is_complete(folder, steps):
        return
    print(f"{folder.name}: {steps} steps", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command(folder, shards, steps, seed, settings)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder.name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def main() -> None:
    """Take the command line; train; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--shards", default="data/mini/shards")
    parser.add_argument("--steps", type=int, default=1300, help="of the joint runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    shards, out = str(Path(options.shards).resolve()), options.out
    joint: list[tuple[Path, int, int, list[str]]] = []
    adapted: list[tuple[Path, int, int, list[str]]] = []
    single: list[tuple[Path, int, int, list[str]]] = []
    lengths = single_steps(shards, options.steps)
    for seed in options.seeds:
        joint.append((out / f"joint_{seed}", options.steps, seed, []))
        adapted.append((out / f"adapters_{seed}", options.steps, seed, [f"model.adapter_rank={options.rank}"]))
        for name, both in lengths.items():
            for kind, steps in zip(("windows", "flops"), both, strict=True):
                single.append((out / f"{kind}_{seed}_{name}", steps, seed, [f"data.datasets=[{name}]"]))
    with ThreadPoolExecutor(options.jobs) as pool:
        started = [pool.submit(run, folder, shards, *rest) for folder, *rest in [*joint, *adapted, *single]]
        for one in started:
            one.result()
    for title, together in (("joint", joint), ("adapters", adapted)):
        first, *others = (folder for folder, *_ in [*together, *single])
        print(f"\n{title}\n\n{transfer(first, others, out / f'transfer_{title}')}", flush=True)


if __name__ == "__main__":
    main()
