"""The README says what is there: every file of the packages, and no path, command or tag that does not exist."""

import re
from pathlib import Path

import pytest

from data_pipeline.__main__ import main as data_pipeline
from fm.__main__ import main as fm

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_every_file_has_its_line() -> None:
    named_together = ("miniwell", "commands")  # modules of one kind, a system or a command each
    files = [file for package in ("data_pipeline", "fm") for file in (ROOT / package).rglob("*.py")]
    files = [file for file in files if file.parent.name not in named_together]
    missing = [file.name for file in files if file.name != "__init__.py" and f"{file.name}`" not in TEXT]
    assert not missing


def test_paths_in_commands_and_links_exist() -> None:
    paths = re.findall(r"(?:\./)?((?:recipes|launch|\.assets|data_pipeline/cards)/[\w./-]+\w)", TEXT)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists() and "<" not in path]


@pytest.mark.parametrize("program", ["fm", "data-pipeline"])
def test_commands_are_commands(program: str) -> None:
    named = set(re.findall(rf"^{program} ([\w-]+)", TEXT, flags=re.MULTILINE)) | set(
        re.findall(rf"`{program} ([\w-]+)", TEXT)
    )
    assert named
    for command in sorted(named):
        with pytest.raises(SystemExit) as stopped:
            (fm if program == "fm" else data_pipeline)([command, "--help"])
        assert stopped.value.code == 0
