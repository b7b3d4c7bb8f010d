"""By how much each way of computing changes the first losses of the quickstart: exit code 1 where it is too much.

python tests/benchmarks/numerics.py SHARDS [--steps 100] [--variants blocks step bf16] [--reference RUN] [key=value ...]

The reference is eager float32, of this code or, with --reference, what a run's log.jsonl says, of other code perhaps.
Training is chaotic: what differs by rounding grows, here from 1e-7 after 30 steps to 3e-3 after 100, so tolerances are
for 100 steps and no more.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FLOAT32 = ["train.precision=float32", "train.compile=eager"]
ROUNDING, BF16 = 1e-2, 1e-1  # largest relative difference of a loss
VARIANTS = {
    "eager": (FLOAT32, ROUNDING),  # beside --reference
    "blocks": (["train.precision=float32", "train.compile=blocks"], ROUNDING),
    "step": (["train.precision=float32", "train.compile=step"], ROUNDING),
    "graphs": (["train.precision=float32", "train.compile=graphs"], ROUNDING),  # on a GPU
    "bf16": (["train.precision=bf16", "train.compile=eager"], BF16),
    "bf16_blocks": (["train.precision=bf16", "train.compile=blocks"], BF16),
}


def trained(shards: str, steps: int, settings: list[str]) -> list[float]:
    """Losses of the quickstart's first steps."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"run.dir={folder}/run", f"run.stop_at={steps}", f"data.shards={shards}", "validation.every=0"]
        command = [sys.executable, "-m", "fm", "train", str(RECIPE), *own, "tracking.progress=false", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return losses(Path(folder) / "run", steps)


def losses(run: Path, steps: int) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines[:steps]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for all runs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["blocks", "step", "bf16"])
    parser.add_argument("--reference", type=Path, metavar="RUN", help="a run of the quickstart")
    options = parser.parse_args()
    steps, settings = options.steps, options.settings
    if options.reference:
        expected = losses(options.reference, steps)
    else:
        expected = trained(options.shards, steps, [*FLOAT32, *settings])
    print("| variant | step 1 | to step 10 | to step 30 | all | allowed |\n|:--|--:|--:|--:|--:|--:|")
    passed = True
    for name in options.variants:
        changes, allowed = VARIANTS[name]
        found = trained(options.shards, steps, [*changes, *settings])
        differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
        largest = [f"{max(differences[:number]):.1e}" for number in (1, 10, 30, steps)]
        print(f"| {name} | {' | '.join(largest)} | {allowed:.0e} |", flush=True)
        passed &= max(differences) <= allowed  # false for NaN
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
