"""Compare the seconds of a step that `fm plan` measures with those of real training, in turns, as machines vary.

python tests/benchmarks/plan_against_run.py SHARDS [--rounds 3] [--steps 200] [--probe-seconds 20]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from launched import paces

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def planned(shards: str, seconds: float, folder: Path) -> float:
    """Return the seconds of a step by the plan."""
    file = folder / "plan.json"
    options = ["--probe-seconds", str(seconds), "--json", str(file)]
    run([sys.executable, "-m", "fm", "plan", str(RECIPE), f"data.shards={shards}", *options])
    return float(json.loads(file.read_text())["mixture"]["seconds"])


def measured(shards: str, steps: int, folder: Path) -> float:
    """Return the seconds of a step of training: the median over paces of ten steps, without the first."""
    settings = [f"run.dir={folder}", f"data.shards={shards}", f"train.steps={steps}", "validation.every=0"]
    run([sys.executable, "-m", "fm", "train", str(RECIPE), *settings, "tracking.progress=false"])
    return median(paces(folder))


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--probe-seconds", type=float, default=20)
    options = parser.parse_args()
    print("| round | planned, ms/step | measured, ms/step | planned / measured |\n|:--|--:|--:|--:|")
    pairs = []
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            plan = planned(options.shards, options.probe_seconds, Path(folder))
            pairs.append((plan, measured(options.shards, options.steps, Path(folder) / "run")))
        print(row(str(number), *pairs[-1]), flush=True)
    print(row("median", *(median(values) for values in zip(*pairs, strict=True))))


def row(name: str, plan: float, real: float) -> str:
    return f"| {name} | {1e3 * plan:.0f} | {1e3 * real:.0f} | {plan / real:.2f} |"


if __name__ == "__main__":
    main()
