"""The tutorials run as they stand: their sh and python blocks, in order, in a copy of the project after a quickstart.

Only the sizes are others: the mini-Well is the tiny one, and training, finetuning included, ends after a few steps.
Commands of `fm` and python blocks are forked from a process that has imported torch.
"""

import os
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from forked import forked_program
from whole_runs import ROOT, fm

from fm.config import load_recipe
from fm.training.trainer import train

TUTORIALS = sorted((ROOT / "recipes" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "train.steps=8", "validation.every=4"]
SMALL += ["train.warmup_steps=2", "validation.windows=2", "checkpoint.every=3", "checkpoint.keep=3"]
SMALL += ["tracking.every=2", "tracking.progress=false", "tracking.pictures=0"]
STEPS = "train.steps=2 train.warmup_steps=1 validation.every=2 validation.windows=2 validation.rollouts=0"
PROGRAMS = {
    "fm": f'-IS "$(dirname "$0")/forked_fm.py" "$@" $([[ $1 != train && $1 != finetune ]] || echo {STEPS})',
    "data-pipeline": '-m data_pipeline "${@/#mini/tiny}"',
    "python": '"$@"',
    "python_block": '-IS "$(dirname "$0")/../blocks/forked_blocks.py" "$(cat)"',
}
PYTHON_BLOCK = "import sys\nsys.path.insert(0, '')\nexec(sys.argv[1])\n"  # as `python -` does with what it reads


@pytest.fixture(scope="module")
def quickstart(tiny_well: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `./launch/quickstart` leaves, with another size: a small run on the tiny mini-Well, evaluated."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("recipes", "launch"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data" / "mini").mkdir(parents=True)
    (folder / "data" / "mini" / "well").symlink_to(tiny_well)
    (folder / "data" / "mini" / "shards").symlink_to(tiny_shards)
    with chdir(folder):
        assert train(load_recipe(Path("recipes/quickstart.yaml"), SMALL)) == 0
        assert fm("evaluate", "runs/quickstart", "--windows", "4").returncode == 0
    return folder


def run(folder: Path, script: str) -> str:
    """A bash script in which the project's commands are this checkout's; its output. Fails where it does."""
    shims = folder / "bin"
    shims.mkdir(exist_ok=True)
    for name, call in PROGRAMS.items():
        (shims / name).write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" {call}\n')
        (shims / name).chmod(0o755)
    path = os.pathsep.join([str(shims), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    block = folder / "blocks" / "block.py"
    block.parent.mkdir(exist_ok=True)
    block.write_text(PYTHON_BLOCK)
    with forked_program(ROOT / "fm" / "__main__.py", shims), forked_program(block, block.parent):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, f"{script}\n--- printed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def as_script(text: str) -> str:
    """The blocks of a tutorial as one script, as one terminal would run them."""
    blocks = BLOCK.findall(text)
    assert blocks
    return "\n".join(code if kind == "sh" else f"python_block <<'END'\n{code}END" for kind, code in blocks)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda file: file.stem)
def test_a_tutorial_runs_as_it_stands(tutorial: Path, quickstart: Path) -> None:
    text = tutorial.read_text()
    printed = run(quickstart, as_script(text))
    for line in re.findall(r"^<!-- prints: (.*) -->$", text, re.MULTILINE):
        assert re.search(line, printed), f"{line!r} is not in:\n{printed}"


def test_the_readme_names_every_tutorial() -> None:
    readme = (ROOT / "README.md").read_text()
    assert TUTORIALS
    assert not [file.name for file in TUTORIALS if f"recipes/tutorials/{file.name}" not in readme]
