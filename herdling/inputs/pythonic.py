r"""Calls written as Python: `[weather(city="Oslo", days=2), now()]`.

Llama 4's documented form (meta-llama/llama-models, `models/llama4/prompt_format.md`). Values are
read through `ast` and never evaluated. Wider than Python where models and tool schemas are: names
may hold `-`, `.`, `:`, `/` or be keywords (`from=`), `true`, `false` and `null` count, a string
may hold a raw line end or an escape that Python does not know, such as "\d". A key that cannot be
written bare goes into `**{"a key": 1}`.
"""

import ast
import json
import math
import re
from typing import Any

NAME = re.compile(r"[\w.:/-]+")
START = re.compile(r"\[\s*[\w.:/-]+\s*\(")
_HEAD = re.compile(r"\s*([\w.:/-]+)\s*\(\s*")
_AFTER = re.compile(r"\s*(,?\s*\]|,)")
_BARE = re.compile(r"[^\s=,()\[\]{}\"'*]+")
_KEY = re.compile(rf"({_BARE.pattern})\s*=\s*")
_SPACE = re.compile(r"\s*")
_TOKEN = re.compile(
    r"""
      (?P<raw>\b[rR])? (?P<string>
          \"{3} (?: [^"\\] | \\. | \"(?!\"\") )*+ \"{3}
        | '{3}  (?: [^'\\] | \\. | '(?!'') )*+ '{3}
        | \" (?: [^"\\] | \\. )*+ \"
        | '  (?: [^'\\] | \\. )*+ ' )
    | (?P<open> [\[({] ) | (?P<close> [\])}] ) | (?P<comma> , )
    | \w+ | [\s.:+-]
    """,
    re.DOTALL | re.VERBOSE,
)
_IN_STRING = re.compile("\\\\(.)|[\\n\\r\\0\ud800-\udfff]", re.DOTALL)
_ESCAPES = set("\\'\"abfnrtvxuUN01234567\n")
_WORDS = {"true": True, "false": False, "null": None}
_DEEPEST = 64


def write(name: str, arguments: dict[str, Any]) -> str:
    """One call, without the brackets of the list."""
    parts = []
    for key, value in arguments.items():
        bare = _BARE.fullmatch(key)
        parts.append(f"{key}={literal(value)}" if bare else f"**{literal({key: value})}")
    return f"{name}({', '.join(parts)})"


def literal(value: Any) -> str:
    """A JSON value as a Python literal; strings and numbers are spelled as in JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def read(text: str, start: int) -> tuple[list[tuple[str, dict[str, Any]]], int] | None:
    """The list of calls whose `[` is at `start`, and where it ends; None if it is not one."""
    calls, place = [], start + 1
    try:
        while True:
            if not (head := _HEAD.match(text, place)):
                return None
            arguments, place = _arguments(text, head.end())
            calls.append((head[1], arguments))
            if not (after := _AFTER.match(text, place)):
                return None
            place = after.end()
            if after[1] != ",":
                return calls, place
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _arguments(text: str, place: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while not text.startswith(")", place):
        if text.startswith("**", place):
            more, place = _value(text, place + 2)
            if not isinstance(more, dict):
                raise ValueError("** takes a dict")
        elif key := _KEY.match(text, place):
            value, place = _value(text, key.end())
            more = {key[1]: value}
        else:
            raise ValueError("arguments are keyword=value")
        if found.keys() & more.keys():
            raise ValueError("an argument is given twice")
        found |= more
        if text.startswith(",", place):
            place = _end_of_space(text, place + 1)
    return found, place + 1


def _end_of_space(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    return space.end() if space else place


def _value(text: str, place: int) -> tuple[Any, int]:
    """The value at `place`, and where the `,` or `)` after it stands."""
    parts: list[str] = []
    depth = 0
    while token := _TOKEN.match(text, place):
        if depth == 0 and (token["comma"] or token["close"] == ")"):
            return _plain(ast.parse("".join(parts).strip(), mode="eval").body), place
        depth += bool(token["open"]) - bool(token["close"])
        if not 0 <= depth <= _DEEPEST:
            raise ValueError("brackets do not match or nest too deeply")
        parts.append(_python_string(token[0]) if token["string"] and not token["raw"] else token[0])
        place = token.end()
    raise ValueError("the value does not end")


def _python_string(quoted: str) -> str:
    """Escape what Python's parser refuses or warns of within a string literal."""

    def fix(found: re.Match[str]) -> str:
        if found[1] is None:
            return f"\\u{ord(found[0]):04x}"
        return found[0] if found[1] in _ESCAPES else "\\" + found[0]

    return _IN_STRING.sub(fix, quoted)


def _plain(node: ast.expr) -> Any:
    """The JSON value that an expression denotes; ValueError for any other expression."""
    match node:
        case ast.Constant(value=None | bool() | str() | int() as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant() as operand):
            value = _plain(operand)
            if type(value) in (int, float):
                return -value if isinstance(sign, ast.USub) else value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_plain(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [None if key is None else _plain(key) for key in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_plain, values), strict=True))
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
    raise ValueError("not a JSON value")
