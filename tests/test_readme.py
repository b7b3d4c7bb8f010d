"""The documents name no path, command or link that does not exist."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.cli import main as data_pipeline
from fm.cli import main as fm

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
FILES = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("recipes/tutorials/*.md")]
DOCUMENTS = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def tree_paths() -> list[Path]:
    """Return the paths in the README's file tree. Each line is a name, indented by its depth, and a comment."""
    block = re.search(r"^## Files\n+```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert block is not None
    paths: list[Path] = []
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, comment = line.split(maxsplit=1)
        assert comment
        folders = [*folders[:depth], name]
        paths.append(ROOT.joinpath(*folders))
    return paths


def test_paths_in_the_tree_exist() -> None:
    paths = tree_paths()
    assert paths
    assert not [str(path.relative_to(ROOT)) for path in paths if not path.exists()]


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
