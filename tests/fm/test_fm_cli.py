"""The command line as a whole: start-up, help, mistakes."""

import errno
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable

import pytest

from data_pipeline.cli import main as pipeline_main
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
    assert len(listed) == 16
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: fm plan [-h] [options] RECIPE [section.key=value ...]" in text
    assert "at most (default: 60)" in text


def test_a_mistake_is_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert capsys.readouterr().err == "error: compare: expected runs, or --published alone\n"


@pytest.mark.parametrize("main", [main, pipeline_main])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "run/log.jsonl"), 2, "error: run/log.jsonl: Permission"),
        (
            OSError(errno.EROFS, "Read-only file system", b"run"),
            2,
            "error: run: Read-only file system; change its perm",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the output: cannot be written, the disk or the"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: Input/output error; look for the cause in the system"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_of_the_system_is_one_message_of_every_command(
    main: Callable[[], int],
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The parser is the first that runs in each command."""

    def parse(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    assert main() == code
    printed = capsys.readouterr().err.strip()
    assert printed.startswith(message)
    assert bool(printed) == bool(message)


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("> /dev/full", 2, "error: the output: cannot be written, the disk or the quota is full"),
        ("2> /dev/full > /dev/full", 2, ""),
        (">&-", 0, ""),
        ("| true", 1, ""),
    ],
)
def test_an_output_that_cannot_be_written_leaves_one_message(redirection: str, code: int, message: str) -> None:
    program = (
        "import sys; from data_pipeline.errors import run_command; sys.exit(run_command(lambda: print('x' * 10**6)))"
    )
    shell = f'{sys.executable} -c "{program}" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (code, int(bool(message)))
    assert done.stderr.startswith(message)
