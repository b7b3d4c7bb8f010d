"""Small YAML files written by people: read as plain data, every complaint with file, key path, value and a way out.

Only mappings, lists and scalars are read. Tags, anchors and duplicate keys are refused: a card needs none of them, and
they are how a hostile file runs code, grows without bound or says two things at once.
"""

import difflib
import re
import reprlib
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, NoReturn

import yaml

from data_pipeline.errors import UserError

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
