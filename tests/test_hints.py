"""Messages that name an option name one that exists, in each command that can print them."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeAlias

import fm.cli  # noqa: F401  declares the commands
from data_pipeline import cli as pipeline
from fm.parser import COMMANDS

ROOT = Path(__file__).parents[1]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
COMMAND = re.compile(r"\b((?:fm|data-pipeline) [a-z-]+|accelerate launch)\b")
Name: TypeAlias = tuple[str, str]  # module, and a name in it
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
# The code below these makes the text of another command, or of a program that is no command of ours.
OTHERS = {
    ("data_pipeline.cli", "main"): "`import --shards` runs `shard`",
    ("data_pipeline.importer.suggest", "with_import_command"): "the `import` command to type",
    ("fm.distributed", "launch"): "torchrun",
    ("fm.distributed", "make_accelerator"): "accelerate",
    ("fm.distributed", "_connect_restarted"): "accelerate",
    ("fm.lab.sweep", "Runner"): "the commands of a trial",
    ("fm.training.runlog", "_commit_of"): "git",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    module_name(path): ast.parse(path.read_text())
    for package in ("fm", "data_pipeline")
    for path in (ROOT / package).rglob("*.py")
}


def imported(node: ast.AST) -> dict[str, Name]:
    """What a module or a function imports from the product, by the name that it has there."""
    statements = (one for one in ast.walk(node) if isinstance(one, ast.ImportFrom) and one.module in TREES)
    return {alias.asname or alias.name: (one.module or "", alias.name) for one in statements for alias in one.names}


def defined(module: str) -> Iterator[tuple[str, ast.stmt]]:
    for statement in TREES[module].body:
        if isinstance(statement, DEFINITIONS):
            yield statement.name, statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names = (one for one in ast.walk(statement) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
            yield from ((one.id, statement) for one in names)


NODES = {(module, name): node for module in TREES for name, node in defined(module)}
IMPORTS = {module: imported(tree) for module, tree in TREES.items()}


@cache
def used(name: Name) -> frozenset[Name]:
    """The definitions that a function, class or constant of the product names."""
    module, node = name[0], NODES[name]
    known = {own: (module, own) for own, _ in defined(module)} | IMPORTS[module] | imported(node)
    return frozenset(
        known[one.id] for one in ast.walk(node) if isinstance(one, ast.Name) and known.get(one.id) in NODES
    )


def reached(start: Name) -> set[Name]:
    found: set[Name] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found and name not in OTHERS:
            found.add(name)
            waiting += used(name)
    return found


def texts(node: ast.stmt) -> list[str]:
    """The strings of a definition: formatted ones with {} for values, no docstrings, no options of command lines."""
    docs = {id(one.body[0].value) for one in ast.walk(node) if isinstance(one, DEFINITIONS) and is_text(one.body[0])}
    formatted = [one for one in ast.walk(node) if isinstance(one, ast.JoinedStr)]
    docs |= {id(part) for one in formatted for part in one.values}
    constants = (one for one in ast.walk(node) if isinstance(one, ast.Constant) and id(one) not in docs)
    whole = ["".join(p.value if isinstance(p, ast.Constant) else "{}" for p in one.values) for one in formatted]
    return [*whole, *(one.value for one in constants if isinstance(one.value, str) and not OPTION.fullmatch(one.value))]


def is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


# The command that alone prints a hint, though others reach the definition that holds it.
PRINTED_BY = {
    ("data_pipeline.registry", "user_folders"): "those that were given --registry",
    ("data_pipeline.shards.build", "choose_windows"): "data-pipeline shard",
    ("data_pipeline.shards.build", "finished_manifest"): "data-pipeline shard",
    ("data_pipeline.shards.tar", "Encoder"): "data-pipeline shard",
    ("data_pipeline.well.match", "check_share"): "data-pipeline register and import",
    ("data_pipeline.well.register", "_checked_name"): "data-pipeline register and import",
    ("data_pipeline.well.register", "check_name"): "data-pipeline register and import",
    ("data_pipeline.well.stats", "SKIP_NONFINITE"): "data-pipeline shard",
    ("data_pipeline.well.survey", "_namespaced"): "data-pipeline register and import",
    ("data_pipeline.workers", "_run_in_workers"): "those that start several workers",
    ("fm.evaluation.report", "_commands"): "a report's page, after the command's name",
    ("fm.evaluation.report", "_reproduction"): "a report's page, after the command's name",
    ("fm.evaluation.trained", "TrainedModel"): "fm evaluate",
    ("fm.share.extend", "_check_extendable"): "fm extend",
    ("fm.share.extend", "_find_folders"): "fm extend",
    ("fm.share.extend", "choose_rows"): "fm extend",
    ("fm.training.guard", "slow_steps_warning"): "fm train",
}


def commands() -> dict[str, tuple[set[str], Name]]:
    """The options of each command, and the function that it calls."""
    found = {}
    for name, parser in COMMANDS.items():
        function = parser.get_default("command")
        options = {option for action in parser._actions for option in action.option_strings}
        found[f"fm {name}"] = (options, (function.__module__, function.__name__))
    for name, _, function, *arguments in pipeline.COMMANDS:
        found[f"data-pipeline {name}"] = ({option for option, _ in arguments}, (pipeline.__name__, function.__name__))
    return found


def test_hints_name_options_of_the_command_that_prints_them() -> None:
    known = commands()
    reaching: dict[Name, list[str]] = {}
    for command, (_, function) in known.items():
        for name in reached(function):
            reaching.setdefault(name, []).append(command)
    wrong, counted, needed = [], 0, set()
    for name, users in reaching.items():
        for text in texts(NODES[name]):
            for option in OPTION.finditer(text):
                counted += 1
                before = COMMAND.findall(text[: option.start()])
                printing = before[-1:] or users  # the text says of which command the option is, or else of its own
                lacking = [one for one in printing if one in known and option[0] not in known[one][0]]
                if name in PRINTED_BY and lacking != users:
                    needed.update({name} if lacking else ())
                elif lacking:
                    wrong.append(f"{'.'.join(name)}: {', '.join(lacking)} has no {option[0]}: {text}")
    assert not wrong, "\n".join(wrong)
    assert counted > 150
    assert needed == set(PRINTED_BY)
