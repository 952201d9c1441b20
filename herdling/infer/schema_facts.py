"""What one JSON schema says by itself: its types and constants, whether its values make sense.

Also the narrowings that make it safe: bounds for numbers, and calendar rules that the grammar
engine's formats lack. Left out: everything that needs the rest of the document (`schema_gate`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

LARGEST = 10**18 - 1
"""Integers (in tool arguments, all numbers) that have no bounds get these: beyond, readers lose
digits or refuse."""

_LEAP_DAYS = (
    "^(?:[0-9]{4}-(?:0[13-9]|1[0-2])|[0-9]{4}-02-(?:[01][0-9]|2[0-8])"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_SOME_YEAR = "^[0-9]*[1-9][0-9]*-"
_NO_LEAP_SECOND = "^[^:]*:[^:]*:[0-5]"
CALENDAR = {
    "date": (_LEAP_DAYS, _SOME_YEAR),
    "date-time": (_LEAP_DAYS, _SOME_YEAR, _NO_LEAP_SECOND),
    "time": (_NO_LEAP_SECOND,),
}
"""Patterns that a string of the format must match besides: llguidance writes 29 February in any
year, the year 0000, and a 60th second in any minute."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_types(value: Any) -> bool:
    return (
        value in TYPES
        if isinstance(value, str)
        else _is_names(value) and 0 < len({*value} & {*TYPES}) == len({*value})
    )


SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_types, f"one or more of {', '.join(TYPES)}"),
    "required": (_is_names, "a list of names"),
    "enum": (lambda value: isinstance(value, list) and len(value) > 0, "a list, and not empty"),
    **{key: (lambda value: isinstance(value, str), "a string") for key in ("pattern", "format")},
    **{f"m{x}{y}": (_is_count, "0, 1, 2, ...") for x in ("in", "ax") for y in
       ("Properties", "Items", "Length")},
    **{key: (_is_number, "a number") for key in
       ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")},
}  # fmt: skip


def stands_alone(root: Any) -> bool:
    """Whether no schema is joined with another, so that closing one cannot contradict the other."""
    if isinstance(root, list):
        return all(map(stands_alone, root))
    if not isinstance(root, dict):
        return True
    joined = "allOf" in root or ("$ref" in root and root.keys() & {"properties", "required"})
    return not joined and all(map(stands_alone, root.values()))


def number(text: str) -> int | float:
    """1.0 as 1, which JSON schema takes for the same."""
    value = float(text)
    return int(value) if abs(value) < 2**53 and value.is_integer() else value


def bound(node: dict[str, Any]) -> None:
    """Give numbers the bounds that they lack."""
    if node.keys() & {"enum", "const", "multipleOf"}:
        return
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    if low is None and (high is None or high > -LARGEST):
        node["minimum"] = -LARGEST
    if high is None and (low is None or low < LARGEST):
        node["maximum"] = LARGEST


def any_json(itself: str) -> dict[str, Any]:
    """Any JSON with bounds on its numbers; `itself` is the reference to it."""
    inner = {"$ref": itself}
    number = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
    return {
        "anyOf": [
            {"type": ["string", "boolean", "null"]},
            number,
            {"type": "array", "items": inner},
            {"type": "object", "additionalProperties": inner},
        ]
    }


def types_of(node: Mapping[str, Any]) -> list[str]:
    kinds = node.get("type", list(TYPES))
    return [kinds] if isinstance(kinds, str) else kinds


def constants(node: Mapping[str, Any]) -> set[str] | None:
    """The only values, as JSON, if the schema lists them."""
    values = [node["const"]] if "const" in node else node.get("enum")
    return {json.dumps(v, sort_keys=True) for v in values} if isinstance(values, list) else None


def kinds(node: Mapping[str, Any]) -> set[str]:
    """Its types, by the constants where it lists them; `number` comes with `integer`."""
    values = constants(node)
    found = {*types_of(node)} if values is None else {_KINDS[type(json.loads(v))] for v in values}
    return found | {"integer"} if "number" in found else found


_KINDS = {
    **{dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"},
    **{int: "integer", float: "number"},
}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def writable(value: Any) -> bool:
    r"""Whether its strings need no \u escape, which stays forbidden: "\u0061" would be a second
    spelling of the key "a"."""
    return not any(
        (c < " " and c not in "\n\r\t\b\f") or c == "\x7f" or "\ud800" <= c <= "\udfff"
        for text in _strings(value)
        for c in text
    )


def escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
