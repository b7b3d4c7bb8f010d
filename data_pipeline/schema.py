"""Plain values and YAML files, read strictly: a message names the file, the place, what was expected and what came.

A file is first read as plain values: mappings, lists, texts, numbers. Then pydantic makes a dataclass of them, with
exactly the annotated types (`validate`). A key that is missing or unknown is refused.

YAML tags, anchors and duplicate keys are refused, and sizes are limited. No file of ours needs them, and a hostile file
uses them to run code, to grow without bound, or to hold two values for one key.
"""

import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Hashable, Mapping
from importlib.resources.abc import Traversable
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema, to_jsonable_python

from data_pipeline.errors import UserError, brief
from data_pipeline.files import sha256

MAX_YAML_BYTES = 64 * 1024
MAX_TEXT = 2000  # characters of one value in YAML
MAX_DEPTH = 32  # of YAML
MAX_DIGITS = 40  # of an integer in YAML
MAX_COUNT = 2**40  # above every count, frame and grid size, and products of a few stay inside float range
MAX_NUMBER = 1e30
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")  # a name becomes a folder and a key, hence the narrow alphabet


def canonical(content: object) -> bytes:
    """Return JSON in one possible spelling, for digests and for files that must be equal byte for byte.

    Dataclasses become mappings and tuples become lists.
    """
    plain = to_jsonable_python(content)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def digest(content: object) -> str:
    """Return the SHA-256 of the canonical JSON, 64 hex digits."""
    return sha256(canonical(content))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with its digest under the key `digest`, so that `unsealed` finds any value that changed."""
    return {**content, "digest": digest(content)}


def unsealed(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return sealed content without its digest. UserError if the digest is missing or of other content."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    try:
        found = digest(rest)
    except (ValueError, RecursionError) as error:  # a number such as 1e999, or deep nesting
        raise UserError(f"{where}: damaged or altered: {error}") from error
    if found != content.get("digest"):
        raise UserError(f"{where}: damaged or altered: its content differs from the digest in it")
    return rest


def read_yaml(file: Traversable, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """Return the plain values in a file. UserError if it cannot be read or is not plain YAML."""
    return parse_yaml(read_text(file, max_bytes), str(file))


def read_text(file: Traversable, max_bytes: int = MAX_YAML_BYTES) -> bytes:
    """Return the content of a small file of text. UserError if it cannot be read or is too large."""
    try:
        if not file.is_file():
            raise UserError(f"{file}: expected a YAML file, found none.")
        with file.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}.") from error
    if len(raw) > max_bytes:
        raise UserError(f"{file}: expected at most {max_bytes} bytes, got more.")
    return raw


def parse_yaml(raw: bytes, where: str, aliases: bool = False, hint: str = "") -> Any:
    """Return the plain values in a text that comes from `where`. UserError, ending in `hint`, if it is not plain YAML.

    With `aliases`, a value may stand for several: the caller must not walk through all that they stand for.
    """
    try:
        # PyYAML raises ValueError and ArithmeticError for scalars that look right and are not. Nesting by the thousand
        # ends in RecursionError.
        text = raw.decode("utf-8")
        _check_events(text, aliases)
        value = yaml.load(text, _PlainLoader)
        if not aliases:
            _json_bytes(value)  # an escape may have made a character that is none
        return value
    except (yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: expected plain YAML in UTF-8, got something else: {reason}{hint}") from error


# libyaml's parser where PyYAML was built with it: it reads the cards ten times faster, and gives the same events.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_events(text: str, aliases: bool) -> None:
    """Refuse aliases, explicit tags, endless values and deep nesting, before anything is made of them."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        anchored = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None
        if anchored and not aliases:
            raise _refusal("anchors and aliases are not used", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _refusal("tags are not used", event.start_mark)
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_TEXT:
                raise _refusal(f"a value of more than {MAX_TEXT} characters", event.start_mark)
            if event.implicit[0] and len(event.value) > MAX_DIGITS and _INTEGER.match(event.value):
                raise _refusal(f"a number of more than {MAX_DIGITS} digits", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:  # libyaml's loader has no limit of its own
            raise _refusal(f"nested more than {MAX_DEPTH} deep", event.start_mark)


_YAML = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]{3})*)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?\Z"  # 0.5
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+\Z"  # 1e-3
    r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)


class _PlainLoader(_SafeLoader):
    """SafeLoader that also refuses duplicate keys, and keys that are no texts (JSON has only these).

    Numbers follow YAML 1.2: 1e-3 is a number. 1_000_000 is one, too. Dates are texts, and so are 010 and 1:30, which
    YAML 1.1 reads as the numbers 8 and 90.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {
        first: [one for one in known if one[0] not in (f"{_YAML}int", f"{_YAML}float", f"{_YAML}timestamp")]
        for first, known in _SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag != f"{_YAML}str":
                raise _refusal(f"expected a text as key, got {key.value[:64]}; put it in quotes", key.start_mark)
            if key.value in seen:
                raise _refusal(f"key {key.value[:64]!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_PlainLoader.add_implicit_resolver(f"{_YAML}int", _INTEGER, list("-+0123456789"))
_PlainLoader.add_implicit_resolver(f"{_YAML}float", _FLOAT, list("-+.0123456789"))


def _refusal(message: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)


class Strict:
    """Base of dataclasses that `validate` makes: no unknown keys, and no number that is not finite."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


class Mismatch(ValueError):
    """Raised by checks inside `validate`: what was expected at the value, or below it at the keys `at`.

    `validate` adds the file, the place and what came.
    """

    def __init__(self, expected: str, hint: str = "", at: tuple[str | int, ...] = ()) -> None:
        super().__init__(f"expected {expected}")
        self.expected, self.hint, self.at = expected, hint, at


def checked(test: Callable[[Any], object], expected: str, hint: str | Callable[[Any], str] = "") -> BeforeValidator:
    """Return the note for an Annotated text or number that must pass `test` as it lies in the file."""
    return BeforeValidator(_check(test, expected, hint))


def checked_list(test: Callable[[Any], object], expected: str, hint: str = "") -> AfterValidator:
    """Return the note for an Annotated tuple that must pass `test`, once its elements are checked."""
    return AfterValidator(_check(test, expected, hint))


def _check(test: Callable[[Any], object], expected: str, hint: str | Callable[[Any], str]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not test(value):
            raise Mismatch(expected, hint if isinstance(hint, str) else hint(value))
        return value

    return check


def choice(valid: Collection[str], what: str) -> BeforeValidator:
    """Return the note for an Annotated text that is one of `valid`; `what` names their kind in messages."""
    return checked(lambda value: isinstance(value, str) and value in valid, what, lambda value: nearest(value, valid))


def at_least(minimum: int) -> BeforeValidator:
    """Return the note for an Annotated whole number."""
    expected = f"a whole number of at least {minimum}"
    return checked(lambda value: type(value) is int and minimum <= value <= MAX_COUNT, expected)


def _is_line(value: Any, limit: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit and value.isprintable()


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    # Both bounds also refuse nan, and integers too large for a float.
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER


_TEXT_HINT = f"At most {MAX_TEXT} printable characters."
Line = Annotated[str, checked(lambda value: _is_line(value, MAX_TEXT), "one line of text", _TEXT_HINT)]
Key = Annotated[str, checked(lambda value: _is_line(value, 64), "a text as key", "At most 64 printable characters.")]
Name = Annotated[str, checked(_is_name, "a name", "Up to 64 letters, digits and underscores, a letter first.")]
Count = Annotated[int, at_least(1)]
Real = Annotated[float, checked(_is_number, "a number")]
Positive = Annotated[float, checked(lambda value: _is_number(value) and value > 0, "a number above 0")]


class Stored:
    """Note for an Annotated type: the file holds a value of type `kind`, which `convert` turns into the annotated."""

    def __init__(self, kind: Any, convert: Callable[[Any], Any]) -> None:
        self.kind, self.convert = kind, convert

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.convert, handler.generate_schema(self.kind))


def validate(kind: Any, value: Any, where: str, check: Callable[[Any], object] = lambda made: None) -> Any:
    """Return plain values as type `kind`: a dataclass, tuple, dict, `X | None`, int, float, str or bool.

    `check` gets what was made and may raise Mismatch or ValueError. UserError, naming the place in the file `where`,
    when a type differs, a key is missing or unknown, or a check fails.
    """
    try:
        # JSON's strict mode takes no text for a number, but a list for a tuple and a mapping for a dataclass.
        made = _adapter(kind).validate_json(_json_bytes(value), strict=True)
        check(made)
        return made
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key is also a missing one. The misspelt one has the better hint.
        first = next((one for one in errors if one["type"] == "unexpected_keyword_argument"), errors[0])
        message = _explain(kind, first)
    except ValueError as failure:
        message = _mismatch(failure, (), value)
    raise UserError(f"{where}: {message}".rstrip())


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    # A dataclass brings its own settings.
    return TypeAdapter(kind, config=None if hasattr(kind, "__pydantic_config__") else Strict.__pydantic_config__)


def _json_bytes(value: Any) -> bytes:
    # A date that YAML read becomes text again; pydantic then refuses it with the right place.
    return json.dumps(value, ensure_ascii=False, default=str).encode()


def _explain(kind: Any, error: Mapping[str, Any]) -> str:
    """Return a message in our words for one of pydantic's errors."""
    place, what, value = error["loc"], error["type"], error["input"]
    if what == "unexpected_keyword_argument":
        names = typing.get_type_hints(_kind_at(kind, place[:-1]))
        return f"{_path(place)}unknown key {place[-1]!r}. {nearest(place[-1], names)}"
    if place and place[-1] == "[key]":  # pydantic's mark for the key of a mapping
        place = place[:-1]
    if what == "missing" and isinstance(place[-1], str):
        return f"{_path(place[:-1])}missing key {place[-1]!r}"
    if what == "missing":  # of a list
        place = place[:-1]
    if what == "value_error":
        return _mismatch(error["ctx"]["error"], place, value)
    return f"{_path(place)}expected {_expected(kind, place, error)}, got {brief(value)}"


def _mismatch(failure: ValueError, place: tuple[str | int, ...], value: Any) -> str:
    if not isinstance(failure, Mismatch):
        return f"{_path(place)}{failure}"
    for key in failure.at:
        value = value[key]
    return f"{_path(place + failure.at)}expected {failure.expected}, got {brief(value)}. {failure.hint}"


def _expected(kind: Any, place: tuple[str | int, ...], error: Mapping[str, Any]) -> str:
    what = error["type"]
    if what in ("dict_type", "dataclass_type", "model_type"):
        return "a mapping (key: value)"
    if what in ("tuple_type", "too_long", "missing"):
        members = typing.get_args(_kind_at(kind, place))
        return "a list" if Ellipsis in members else f"a list of {len(members)}"
    return error["msg"].removeprefix("Input should be ")


def _kind_at(kind: Any, place: tuple[str | int, ...]) -> Any:
    """Return the type of the value at `place` in the file."""
    kind = _bare(kind)
    for key in place:
        members = typing.get_args(kind)
        if typing.get_origin(kind) is tuple:
            kind = members[0] if Ellipsis in members else members[int(key)]
        else:
            kind = members[1] if members else typing.get_type_hints(kind, include_extras=True)[str(key)]
        kind = _bare(kind)
    return kind


def _bare(kind: Any) -> Any:
    """Return the type without notes and without `| None`."""
    while True:
        origin, members = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            kind = next((note.kind for note in members[1:] if isinstance(note, Stored)), members[0])
        elif origin in (types.UnionType, typing.Union):
            kind = members[0]
        else:
            return kind


def _path(place: tuple[str | int, ...]) -> str:
    """Return `state.t1.velocity[1]: `, or nothing for the whole file."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if step.isprintable() else ascii(step)
            text += f".{name[:64]}" if text else name[:64]
    return f"{text}: " if text else ""


def nearest(name: object, valid: Collection[str]) -> str:
    """Return a sentence with the valid name closest to `name`, or with all valid names where none is close."""
    close = difflib.get_close_matches(str(name)[:80], valid, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Valid: {', '.join(sorted(valid)) or 'none'}."
