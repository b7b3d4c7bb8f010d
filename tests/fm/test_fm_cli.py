"""The command line as a whole: start-up, help, mistakes."""

import re
import subprocess
import sys

import pytest

from fm.cli import main
from fm.parser import COMMANDS

HEAVY = {"torch", "numpy", "rich", "yaml", "accelerate", "matplotlib", "tensorboard", "h5py"}


def test_help_loads_no_heavy_package_for_any_command() -> None:
    code = (
        "import contextlib, io, sys\nfrom fm.cli import main\nfrom fm.parser import COMMANDS\n"
        "for arguments in [[], *([name] for name in COMMANDS)]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([*arguments, '--help'])\n"
        f"print(sorted({HEAVY} & set(sys.modules)), len(COMMANDS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"[] {len(COMMANDS)}", done.stderr


def test_help_lists_the_commands_and_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = re.findall(r"^    ([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(COMMANDS)
    assert len(listed) == 15
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: fm plan [-h] [options] RECIPE [section.key=value ...]" in text
    assert "at most (default: 60)" in text


def test_a_mistake_is_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert capsys.readouterr().err == "error: compare: expected runs, or --published alone\n"
