"""Dataclasses <-> JSON, strictly: what is read has the annotated types and no key more or less, or it is refused.

Small YAML files written by people: read as plain data, every complaint with file, key path, value and a way out.

Only mappings, lists and scalars are read. Tags, anchors and duplicate keys are refused: a card needs none of them, and
they are how a hostile file runs code, grows without bound or says two things at once.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import reprlib
import stat
import sys
import types
import typing
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from data_pipeline.files import UserError, sha256

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
    return sha256(canonical(content))


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


MAX_FILE_BYTES = 64 * 1024
MAX_TEXT = 2000  # characters of one value
MAX_COUNT = 2**40  # no count, frame or grid size in a card comes near; keeps products of a few inside float range
MAX_NUMBER = 1e30
MAX_DEPTH = 32
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def nearest(name: object, valid: Collection[str]) -> str:
    """A sentence with the valid name closest to `name`, or the valid names where none is close."""
    close = difflib.get_close_matches(str(name)[:80], valid, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Valid: {', '.join(sorted(valid)) or 'none'}."


@dataclass(frozen=True)
class Node:
    """A value of a YAML file with its place in it; the methods return checked values or raise UserError."""

    value: Any
    file: str
    path: str = ""

    def fail(self, expected: str, hint: str = "") -> NoReturn:
        where = f"{self.file}: {self.path}" if self.path else self.file
        raise UserError(f"{where}: expected {expected}, got {reprlib.repr(self.value)}. {hint}".rstrip())

    def child(self, key: object, value: Any) -> "Node":
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if self.path else str(key)
        return Node(value, self.file, self.path + step)

    def record(self, required: Collection[str], optional: Collection[str] = ()) -> dict[str, "Node"]:
        """The mapping's entries; every required key there, and no key that is neither required nor optional."""
        entries = self.entries()
        valid = [*required, *optional]
        for key, node in entries.items():
            if key not in valid:
                raise UserError(f"{node.file}: {node.path}: unknown key {key!r}. {nearest(key, valid)}")
        missing = [key for key in required if key not in entries]
        if missing:
            self.fail(f"the keys {', '.join(required)}", f"Missing: {', '.join(missing)}.")
        return entries

    def entries(self) -> dict[str, "Node"]:
        """The entries of a mapping whose keys are one-line texts, in the file's order."""
        if not isinstance(self.value, dict):
            self.fail("a mapping (key: value)")
        for key in self.value:
            Node(key, self.file, self.path).text(limit=64, what="a text as key")
        return {key: self.child(key, value) for key, value in self.value.items()}

    def elements(self, length: int | None = None) -> list["Node"]:
        if not isinstance(self.value, list) or (length is not None and len(self.value) != length):
            self.fail("a list" if length is None else f"a list of {length}")
        return [self.child(index, value) for index, value in enumerate(self.value)]

    def text(self, limit: int = MAX_TEXT, what: str = "one line of text") -> str:
        if not isinstance(self.value, str) or not self.value or len(self.value) > limit or not self.value.isprintable():
            self.fail(what, f"At most {limit} printable characters.")
        return self.value

    def name(self) -> str:
        """A name of a dataset, field or channel; names become folders and keys, hence the narrow alphabet."""
        if not isinstance(self.value, str) or not NAME.fullmatch(self.value):
            self.fail("a name", "Up to 64 letters, digits and underscores, a letter first.")
        return self.value

    def choice(self, valid: Collection[str], what: str) -> str:
        if not isinstance(self.value, str) or self.value not in valid:
            self.fail(what, nearest(self.value, valid))
        return self.value

    def count(self, minimum: int = 1) -> int:
        if type(self.value) is not int or not minimum <= self.value <= MAX_COUNT:
            self.fail(f"a whole number of at least {minimum}")
        return self.value

    def number(self) -> float:
        """A positive finite number."""
        if self._is_number() and self.value > 0:
            return float(self.value)
        self.fail("a number above 0", self._number_hint())

    def real(self) -> float:
        """A finite number of either sign."""
        if self._is_number():
            return float(self.value)
        self.fail("a number", self._number_hint())

    def _is_number(self) -> bool:
        # Both bounds also refuse nan, and integers too large for a float.
        return type(self.value) in (int, float) and -MAX_NUMBER <= self.value <= MAX_NUMBER

    def _number_hint(self) -> str:
        return "YAML reads 1e-3 as text; write 1.0e-3." if isinstance(self.value, str) else ""


def load(file: Traversable) -> Node:
    """The content of one file; UserError if it cannot be read or is not plain YAML."""
    try:
        if not file.is_file():
            raise UserError(f"{file}: expected a YAML file, found none.")
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}.") from error
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"{file}: expected at most {MAX_FILE_BYTES} bytes, got more; a card is a page of text.")
    try:
        # PyYAML's constructors raise ValueError and ArithmeticError for scalars that look right and are not, such as
        # the date 2020-99-99 or an integer of ten thousand digits; nesting by the thousand ends in RecursionError.
        text = raw.decode("utf-8")
        _check_events(text)
        return Node(yaml.load(text, _PlainLoader), str(file))
    except (yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: expected plain YAML in UTF-8, got something else: {reason}") from error


# libyaml's parser where PyYAML was built with it: it reads the cards ten times faster, and gives the same events.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_events(text: str) -> None:
    """Refuses aliases, explicit tags, endless values and deep nesting, before anything is made of them."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal("anchors and aliases are not used", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _refusal("tags are not used", event.start_mark)
        if len(getattr(event, "value", "")) > MAX_TEXT:
            raise _refusal(f"a value of more than {MAX_TEXT} characters", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:  # libyaml's loader has no limit of its own
            raise _refusal(f"nested more than {MAX_DEPTH} deep", event.start_mark)


class _PlainLoader(_SafeLoader):
    """SafeLoader that also refuses duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refusal(f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _refusal(message: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)
