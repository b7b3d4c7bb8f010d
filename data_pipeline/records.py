"""Dataclasses <-> JSON, strictly: what is read has the annotated types and no key more or less, or it is refused."""

import dataclasses
import functools
import hashlib
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def canonical(content: object) -> bytes:
    """JSON with one possible spelling, for digests and for files that must be the same byte for byte."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def digest(content: object) -> str:
    """SHA-256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(content)).hexdigest()


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError when the file cannot be read or holds something else."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {_brief(content)}")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def encode(value: Any) -> Any:
    """A dataclass as JSON values, the inverse of `decode`."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """JSON values as the annotated type `kind`: dataclass, tuple, dict, `X | None`, int, float or str.

    Raises UserError naming the place when a type differs, a key is missing, or a key is unknown.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value, where)
    if origin is tuple:
        require(isinstance(value, list), f"{where}: expected a list, got {_brief(value)}")
        members = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        require(len(value) == len(members), f"{where}: expected {len(members)} entries, got {len(value)}")
        pairs = zip(members, value, strict=True)
        return tuple(decode(member, item, f"{where}[{index}]") for index, (member, item) in enumerate(pairs))
    if origin is dict:
        require(isinstance(value, dict), f"{where}: expected a mapping, got {_brief(value)}")
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        finite = type(value) in (int, float) and abs(value) <= sys.float_info.max
        require(finite, f"{where}: expected a finite number, got {_brief(value)}")
        return float(value)
    require(type(value) is kind, f"{where}: expected {kind.__name__}, got {_brief(value)}")
    return value


def _decode_dataclass(kind: type, value: Any, where: str) -> Any:
    require(isinstance(value, Mapping), f"{where}: expected a mapping, got {_brief(value)}")
    hints = _hints(kind)
    missing, unknown = sorted(hints.keys() - value.keys()), sorted(value.keys() - hints.keys())
    require(not missing and not unknown, f"{where}: missing keys {missing}, unknown keys {_brief(unknown)}")
    return kind(**{name: decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _brief(value: object) -> str:
    """A value for a message; a damaged file may hold a very long one."""
    text = repr(value) if not isinstance(value, dict | list) or len(value) < 8 else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
