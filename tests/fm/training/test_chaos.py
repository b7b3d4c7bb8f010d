"""Whole runs killed at random moments; tests/benchmarks/kill_training.py does the same more often."""

import subprocess
import sys
from pathlib import Path

from whole_runs import ROOT


def test_a_run_of_two_processes_that_is_killed_ends_as_the_undisturbed_run(tiny_shards: Path, tmp_path: Path) -> None:
    script = ROOT / "tests" / "benchmarks" / "kill_training.py"
    options = ["--kills", "1", "--seed", "4", "--world-sizes", "2", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), str(tiny_shards), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills in" in done.stdout
    assert "2 processes, all, in a save" in done.stdout
    assert "parameters bit-identical: yes" in done.stdout
