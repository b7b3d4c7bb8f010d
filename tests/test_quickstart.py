"""launch/quickstart runs its commands in order, on all idle cores or on as many threads as the user says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from data_pipeline.workers import available_cores

ROOT = Path(__file__).parents[1]
STEPS = [
    "data-pipeline simulate",
    "data-pipeline shard",
    "accelerate launch recipes/quickstart.yaml train.steps=20",
    "accelerate launch recipes/quickstart_finetune.yaml train.steps=20",
    "fm evaluate runs/quickstart",
    "fm evaluate runs/quickstart_finetune",
    "fm compare runs/quickstart runs/quickstart_finetune",
]


def test_its_commands_run_in_order_on_idle_cores_or_as_told(tmp_path: Path) -> None:
    """The script itself, in a folder whose environment is there already and whose programs say how they were called."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    write_program(tmp_path / "launch" / "setup", "true")
    for name in ("data-pipeline", "accelerate", "fm"):
        write_program(tmp_path / ".venv" / "bin" / name, f'echo "$OMP_NUM_THREADS {name} $*"')
    write_program(tmp_path / ".venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    for told, possible in ((None, range(1, available_cores() + 1)), ("3", (3,))):
        calls = [line for line in printed_by(tmp_path / "launch" / "quickstart", told) if line[0].isdigit()]
        assert len(calls) == len(STEPS)
        for call, step in zip(calls, STEPS, strict=True):
            threads, _, command = call.partition(" ")
            assert int(threads) in possible
            assert command.startswith(step)


def write_program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def printed_by(script: Path, threads: str | None) -> list[str]:
    """The lines that the script prints, where the user has set OMP_NUM_THREADS to `threads`, or not at all."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"OMP_NUM_THREADS": threads} if threads else {})
    done = subprocess.run([script, "train.steps=20"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]
