"""launch/quickstart: how many processes it starts. The script as a whole is run by hand; it takes minutes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.workers import available_cores

SCRIPT = Path(__file__).parents[1] / "launch" / "quickstart"


@pytest.mark.parametrize(("told", "expected"), [(None, max(n for n in (1, 2, 4) if n <= available_cores())), ("3", 3)])
def test_it_starts_a_process_for_each_core_or_as_many_as_told(told: str | None, expected: int) -> None:
    counting = re.search(r"^count=.*?^processes=.*?$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert counting is not None
    environment = {name: value for name, value in os.environ.items() if name != "PROCESSES"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as after launch/setup
    environment |= {"PROCESSES": told} if told else {}
    script = "\n".join(["set -euo pipefail", counting[0], 'echo "$processes"'])
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == expected


def test_it_is_a_script() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
