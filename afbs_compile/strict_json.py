"""Does this JSON value have exactly the fields and types of this dataclass?

Decodes frozen dataclasses of str, bool, int, float, unions of them with None, `tuple[X, ...]`,
`dict[str, X]` and other dataclasses. Nothing is converted but a whole number where a float is
asked for; a missing or unknown field, a wrong type, NaN and infinity are errors that name their
place.
"""

import dataclasses
import json
import math
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

SHOWN = 60  # characters of an offending value that a message shows


class MismatchError(ValueError):
    """A value is not what the dataclass needs; the message says where."""


def mismatch(place: str, came: Any, needed: str) -> MismatchError:
    """The error for `came` at `place` where `needed` was needed."""
    shown = repr(came)
    shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
    return MismatchError(f"{place or 'the document'} is {shown}; needed: {needed}")


def loads(text: str) -> Any:
    """JSON without NaN, infinity or a name given twice.

    Raises:
        ValueError: The text is no such JSON.
    """
    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_constant(name: str) -> None:
    """Raise for NaN, Infinity and -Infinity, which are not JSON."""
    raise ValueError(f"it holds {name}, which is not JSON")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict, or ValueError if a name comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it gives the same name twice in one object")
    return found


def dumps(value: Any) -> str:
    """A dataclass as JSON with sorted keys, indented by one, ending in a newline."""
    return json.dumps(plain(value), sort_keys=True, indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists, recursively."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def decode(kind: type[T], value: Any, place: str = "") -> T:
    """`value` (of `loads`) as an instance of the dataclass `kind`.

    Raises:
        MismatchError: A field is missing, unknown, of a wrong type, or refused by the dataclass.
    """
    if not isinstance(value, dict):
        raise mismatch(place, value, "an object")
    hints = get_type_hints(kind)
    if missing := sorted(hints.keys() - value.keys()):
        raise MismatchError(f"{under(place, missing[0])} is missing")
    if unknown := sorted(value.keys() - hints.keys()):
        raise MismatchError(f"{under(place, unknown[0])} is no known field")
    fields = {name: read(hint, value[name], under(place, name)) for name, hint in hints.items()}
    try:
        return kind(**fields)
    except MismatchError:
        raise
    except ValueError as error:
        raise MismatchError(under(place, str(error))) from error


def read(hint: Any, value: Any, place: str) -> Any:
    """`value` as the annotation `hint` says, or MismatchError."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if fits(kind, value):
            return build(kind, value, place)
    raise mismatch(place, value, " or ".join(map(describe, kinds)))


def fits(kind: Any, value: Any) -> bool:
    """Whether the outermost JSON type of `value` is that of `kind`."""
    if get_origin(kind) is tuple:
        return isinstance(value, list)
    if get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def build(kind: Any, value: Any, place: str) -> Any:
    """A `value` that fits, as `kind`, its members decoded."""
    if get_origin(kind) is tuple:
        member = get_args(kind)[0]
        return tuple(read(member, item, f"{place}[{i}]") for i, item in enumerate(value))
    if get_origin(kind) is dict:
        member = get_args(kind)[1]
        return {name: read(member, item, under(place, name)) for name, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return decode(kind, value, place)
    return float(value) if kind is float else value


def describe(kind: Any) -> str:
    """The JSON name of a type, for messages."""
    if get_origin(kind) is tuple:
        return "a list"
    if get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "an object"
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
    return "null" if kind is NoneType else names[kind]


def under(place: str, name: str) -> str:
    """The place of a field inside `place`."""
    return f"{place}.{name}" if place else name
