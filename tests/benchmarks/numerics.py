"""Compare the first losses of the quickstart between precisions and compilers.

python tests/benchmarks/numerics.py SHARDS [--variants control blocks step bf16] [--reference RUN] [key=value ...]

The reference is eager float32 of this code, or with --reference the log.jsonl of a run, perhaps of other code. Training
is chaotic, so differences by rounding grow. The control shows how much: its learning rate differs by one part in ten
million. Tolerances limit the largest relative difference of a loss up to a step, and the difference of the mean over
all steps. After 30 steps the losses of bf16 are too far from the reference, so only their mean is compared. The exit
code is 1 if a tolerance is exceeded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fm.config import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FLOAT32 = ["train.precision=float32", "train.compile=eager"]
STEPS = 100
MEAN = "mean of all"
ROUNDING = {10: 1e-6, 30: 1e-4, STEPS: 5e-2, MEAN: 1e-2}  # up to a step: largest relative difference of a loss
BF16 = {10: 1e-3, 30: 1e-2, STEPS: float("inf"), MEAN: 2e-2}
VARIANTS = {
    "control": ([*FLOAT32, f"train.learning_rate={load_recipe(RECIPE).train.learning_rate * (1 + 1e-7)}"], ROUNDING),
    "eager": (FLOAT32, ROUNDING),  # beside --reference
    "blocks": (["train.precision=float32", "train.compile=blocks"], ROUNDING),
    "step": (["train.precision=float32", "train.compile=step"], ROUNDING),
    "graphs": (["train.precision=float32", "train.compile=graphs"], ROUNDING),  # on a GPU
    "bf16": (["train.precision=bf16", "train.compile=eager"], BF16),
    "bf16_blocks": (["train.precision=bf16", "train.compile=blocks"], BF16),
}


def trained(shards: str, settings: list[str]) -> list[float]:
    """Return the losses of the quickstart's first steps."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"run.dir={folder}/run", f"run.stop_at={STEPS}", f"data.shards={shards}", "validation.every=0"]
        command = [sys.executable, "-m", "fm", "train", str(RECIPE), *own, "tracking.progress=false", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return losses(Path(folder) / "run")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines[:STEPS]]


def differences(found: list[float], expected: list[float]) -> dict[int | str, float]:
    """Return relative differences: the largest of a loss up to each step, and that of the means."""
    each = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return {**{end: max(each[:end]) for end in (10, 30, STEPS)}, MEAN: abs(sum(found) / sum(expected) - 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for all runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["control", "blocks", "step", "bf16"])
    parser.add_argument("--reference", type=Path, metavar="RUN", help="a run of the quickstart")
    options = parser.parse_args()
    if options.reference:
        expected = losses(options.reference)
    else:
        expected = trained(options.shards, [*FLOAT32, *options.settings])
    print("| variant | to step 10 | to step 30 | to step 100 | mean of all |\n|:--|--:|--:|--:|--:|")
    passed = True
    for name in options.variants:
        changes, allowed = VARIANTS[name]
        found = differences(trained(options.shards, [*changes, *options.settings]), expected)
        fits = {what: found[what] <= allowed[what] for what in allowed}  # false for NaN
        cells = [f"{found[what]:.1e} {'<=' if fits[what] else 'MORE THAN'} {allowed[what]:.0e}" for what in allowed]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        passed &= all(fits.values())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
