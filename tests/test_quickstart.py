"""launch/quickstart: how many threads it takes. The script as a whole is run by hand; it takes minutes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.workers import available_cores

SCRIPT = Path(__file__).parents[1] / "launch" / "quickstart"


@pytest.mark.parametrize(("told", "possible"), [(None, range(1, available_cores() + 1)), ("3", (3,))])
def test_it_takes_idle_cores_or_as_many_threads_as_told(told: str | None, possible: range | tuple[int]) -> None:
    lines = re.findall(r"^(?:busy=|threads=|export OMP_).*$", SCRIPT.read_text(), re.MULTILINE)
    assert len(lines) == 3
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as after launch/setup
    environment |= {"OMP_NUM_THREADS": told} if told else {}
    script = "\n".join(["set -euo pipefail", *lines, 'echo "$OMP_NUM_THREADS"'])
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in possible


def test_it_is_a_script() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
