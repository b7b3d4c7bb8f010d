"""Dataclasses <-> JSON, strictly: what is read has the annotated types and no key more or less, or it is refused."""

import dataclasses
import functools
import hashlib
import json
import os
import stat
import sys
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.errors import UserError

MAX_JSON_BYTES = 2**28  # a manifest of a million windows has 9 MB


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
    """Reads a JSON object. Raises UserError when the file cannot be read, is a link, or holds something else."""
    try:
        content = _read_plain(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    return parse_json(content, str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object from its text. Raises UserError, naming `where` it comes from, when it is something else."""
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {_brief(value)}")
    return value


def _read_plain(path: Path) -> bytes:
    """The content of a plain file. A link could lead anywhere; a pipe or a device has no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_JSON_BYTES:
            raise ValueError(f"expected a plain file of at most {MAX_JSON_BYTES} bytes")
        return file.read(found.st_size)


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
    """JSON values as the annotated type `kind`: dataclass, tuple, dict, `X | None`, int, float, str or bool.

    Raises UserError naming the place when a type differs, a key is missing, or a key is unknown.
    """
    if kind is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        raise UserError(f"{where}: expected a finite number, got {_brief(value)}")
    if kind in (int, str, bool):
        if type(value) is kind:
            return value
        raise UserError(f"{where}: expected {kind.__name__}, got {_brief(value)}")
    origin, arguments = _parts(kind)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value, where)
    if origin is dict:
        require(isinstance(value, dict), f"{where}: expected a mapping, got {_brief(value)}")
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return _decode_dataclass(kind, value, where)


def _decode_tuple(members: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, got {_brief(value)}")
    if members == (int, Ellipsis) and set(map(type, value)) <= {int}:  # byte offsets: most of a manifest
        return tuple(value)
    kinds = (members[0],) * len(value) if members[-1] is Ellipsis else members
    if len(value) != len(kinds):
        raise UserError(f"{where}: expected {len(kinds)} entries, got {len(value)}")
    return tuple(
        decode(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _decode_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping, got {_brief(value)}")
    hints = _hints(kind)
    if hints.keys() != value.keys():
        missing, unknown = sorted(hints.keys() - value.keys()), sorted(value.keys() - hints.keys())
        raise UserError(f"{where}: missing keys {missing}, unknown keys {_brief(unknown)}")
    return kind(**{name: decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


@functools.cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _brief(value: object) -> str:
    """A value for a message; a damaged file may hold a very long one."""
    text = repr(value) if not isinstance(value, dict | list) or len(value) < 8 else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
