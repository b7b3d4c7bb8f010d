"""Measure how much a newcomer must open and read: python tests/benchmarks/legibility.py [FOLDER] [--tests]

FOLDER is a checkout of this project (default: this one), so that two commits can be compared. `--tests` also runs its
launch/test and prints the time. Lines are all lines of the files, blank lines and docstrings included.
"""

import argparse
import ast
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

PACKAGES = ("fm", "data_pipeline")
DOCUMENTS = ("README.md", "[!.]*/README.md", "recipes/tutorials/*.md")
STARTS = "fm.recipe"
TAKES_A_STEP = re.compile(r"super\(\)\.step\(|_engine\.step\(")  # the calls that end in AdamW's step, or DeepSpeed's


def measure(root: Path) -> dict[str, str]:
    """Return the measures of a checkout, by name."""
    files = modules(root)
    text = {name: file.read_text() for name, file in files.items()}
    lines = {name: len(content.splitlines()) for name, content in text.items()}
    imports = import_graph(text)
    importers = defaultdict(set)
    for name, imported in imports.items():
        for other in imported:
            importers[other].add(name)
    single = [name for name in files if len(importers[name]) == 1]
    from_recipe = reachable(imports, STARTS)
    ends = {name for name in from_recipe if TAKES_A_STEP.search(text[name])}
    on_the_way = {name for name in from_recipe if reachable(imports, name) & ends}
    functions = [
        node.end_lineno - node.lineno + 1
        for content in text.values()
        for node in ast.walk(ast.parse(content))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    words = sum(len(file.read_text().split()) for pattern in DOCUMENTS for file in root.glob(pattern))
    code = [number for name, number in lines.items() if files[name].name != "__init__.py"]
    return {
        "product lines / files": f"{sum(lines.values()):,} / {len(code)}",
        "median lines of a file / of a function": f"{median(code):.0f} / {median(functions):.0f}",
        "files over 400 lines / under 60": f"{sum(n > 400 for n in code)} / {sum(n < 60 for n in code)}",
        "files with one importer (lines)": f"{len(single)} ({sum(lines[name] for name in single):,})",
        f"files on import paths from {STARTS} to the optimizer step (lines)": (
            f"{len(on_the_way)} ({sum(lines[name] for name in on_the_way):,})"
        ),
        f"fm files that {STARTS} imports, directly or not (lines)": (
            f"{sum(name.startswith('fm') for name in from_recipe)} "
            f"({sum(lines[name] for name in from_recipe if name.startswith('fm')):,})"
        ),
        "README.md lines": str(len((root / "README.md").read_text().splitlines())),
        "words of README.md and the guides": f"{words:,}",
        "import contracts": str((root / "pyproject.toml").read_text().count("[[tool.importlinter.contracts]]")),
    }


def modules(root: Path) -> dict[str, Path]:
    """Return the product's modules: dotted name -> file."""
    found = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def import_graph(text: dict[str, str]) -> dict[str, set[str]]:
    """Return the product modules that each module imports, anywhere in it."""
    graph: dict[str, set[str]] = {}
    for name, content in text.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom) and node.module in text:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    graph[name].add(submodule if submodule in text else node.module)
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return what `start` imports, directly or not, with itself."""
    seen: set[str] = set()
    stack = [start]
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack += graph[name]
    return seen


def main() -> None:
    """Print the measures as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[2])
    parser.add_argument("--tests", action="store_true", help="run launch/test as well and print its time")
    options = parser.parse_args()
    found = measure(options.folder)
    if options.tests:
        started = time.perf_counter()
        code = subprocess.run(["bash", "launch/test"], cwd=options.folder, check=False).returncode
        found["launch/test"] = f"{(time.perf_counter() - started) / 60:.1f} minutes, exit code {code}"
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
