"""Reads a recipe (YAML, dotted overrides, every check there is, with messages that name the key), and writes one."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import UserError
from fm.settings import Recipe

FIRST_LINE = 'launch: 0; from fm.recipe import run; run(__file__); r"""'
LAST_LINE = '# """'


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply dotted overrides and check everything.

    Raises UserError with the key's path, the value and the nearest valid name.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping with the sections {', '.join(_keys(Recipe))}, got {document!r}")
    document.pop("launch", None)
    for override in overrides:
        _apply_override(document, override)
    return resolve(document, str(path))


def resolve(document: dict[str, Any], where: str) -> Recipe:
    """A checked Recipe from nested dicts; `where` names their source in error messages."""
    _reject_unknown(document, Recipe, "", where)
    try:
        return TypeAdapter(Recipe).validate_python(document)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors(include_url=False)]
        raise UserError(f"{where}: " + "\n".join(lines)) from error


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts of plain JSON types."""
    return TypeAdapter(Recipe).dump_python(recipe, mode="json")


def changed_settings(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: old -> new" for the settings in which two resolved recipes differ."""
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as text that is again a runnable recipe (see fm/recipe.py)."""
    body = yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, default_flow_style=None, width=100)
    return f"{FIRST_LINE}\n{body}{LAST_LINE}\n"


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key or key.startswith("-"):
        raise UserError(f"override {override!r}: expected section.key=value, such as train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *sections, last = key.split(".")
    node = document
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
    node[last] = value


def _keys(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _section_types(cls: Any) -> dict[str, Any]:
    """Key -> dataclass for the keys of a dataclass that are sections (or optional sections)."""
    hints = typing.get_type_hints(cls).items()
    options = {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints}
    return {name: option for name in options for option in options[name] if dataclasses.is_dataclass(option)}


def _reject_unknown(mapping: Any, cls: Any, prefix: str, where: str) -> None:
    if not isinstance(mapping, dict):
        return  # the type check explains it
    sections = _section_types(cls)
    for key, value in mapping.items():
        if key not in _keys(cls):
            near = difflib.get_close_matches(str(key), _keys(cls), n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid here: {', '.join(_keys(cls))}"
            raise UserError(f"{where}: unknown key {prefix}{key} (value {value!r}); {hint}")
        if key in sections:
            _reject_unknown(value, sections[key], f"{prefix}{key}.", where)


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{key} is missing"
    value = error["input"]
    shown = f" (got {value!r})" if not isinstance(value, dict) else ""
    near = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        options = [part.strip(" '") for part in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        matches = difflib.get_close_matches(value, options, n=1)
        near = f"; did you mean {matches[0]}?" if matches else ""
    return f"{key}: {message}{shown}{near}".removeprefix(": ")  # checks of the whole recipe have no key
