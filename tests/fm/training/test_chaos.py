"""Whole runs killed at random moments; tests/benchmarks/kill_training.py does the same more often."""

import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import ROOT


@pytest.mark.parametrize(("kills", "world_sizes"), [(2, "1,2"), (1, "2")])
def test_killed_runs_end_as_the_undisturbed_run(
    tiny_shards: Path, tmp_path: Path, kills: int, world_sizes: str
) -> None:
    script = ROOT / "tests" / "benchmarks" / "kill_training.py"
    options = ["--kills", str(kills), "--world-sizes", world_sizes, "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), str(tiny_shards), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
    if world_sizes == "2":
        assert "parameters bit-identical: yes" in done.stdout
