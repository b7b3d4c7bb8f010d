"""The README files say what is there: every file of the packages, and no path, command or link that does not exist."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.cli import main as data_pipeline
from fm.cli import main as fm

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
FILES = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("recipes/tutorials/*.md")]
DOCUMENTS = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def test_every_file_has_its_line() -> None:
    named_together = ("miniwell", "commands")  # modules of one kind, a system or a command each
    files = [file for package in ("data_pipeline", "fm") for file in (ROOT / package).rglob("*.py")]
    files = [file for file in files if file.parent.name not in named_together]
    missing = [file.name for file in files if file.name != "__init__.py" and f"{file.name}`" not in TEXT]
    assert not missing


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [file for package in ("data_pipeline", "fm") for file in (ROOT / package).rglob("__init__.py")]
    assert set(listed) == {".".join(file.parent.relative_to(ROOT).parts) for file in files}


def test_paths_in_commands_exist() -> None:
    paths = re.findall(r"(?:\./)?((?:recipes|launch|\.assets|data_pipeline/cards)/[\w./-]+\w)", TEXT)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists() and "<" not in path]


@DOCUMENTS
def test_links_lead_somewhere(file: Path) -> None:
    text = file.read_text()
    for path, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if path.startswith("https://"):
            continue
        target = file.parent / path if path else file
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings]


@DOCUMENTS
@pytest.mark.parametrize(("program", "main"), [("fm", fm), ("data-pipeline", data_pipeline)])
def test_commands_are_commands(program: str, main: Callable[[list[str]], int], file: Path) -> None:
    text = file.read_text()
    named = {*re.findall(rf"^{program} ([\w-]+)", text, re.MULTILINE), *re.findall(rf"`{program} ([\w-]+)", text)}
    assert named or file != ROOT / "README.md"
    for command in sorted(named):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
