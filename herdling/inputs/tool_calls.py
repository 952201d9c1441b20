"""Tool calls as text, in the dialects that Llama 4 models write.

    pythonic   [weather(city="Oslo"), now()]                                     (the default)
    json       {"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}

`write` makes either. `read` takes both, Meta's `<function=weather>{"city": "Oslo"}</function>`, and
any of them in `<|python_start|>...<|python_end|>`, where text that is no call is code for the tool
`code_interpreter`. Sources: meta-llama/llama-models `llama4/prompt_format.md`,
`llama3/tool_utils.py`. Meta's JSON encoder puts several calls side by side with nothing between,
which nothing reads back; here "; " stands between them, as vLLM's JSON parser expects.
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from herdling.errors import ConfigError
from herdling.inputs import pythonic
from herdling.inputs.special_tokens import PYTHON_END, PYTHON_START

DIALECTS = ("pythonic", "json")
CODE_INTERPRETER = "code_interpreter"

Call = tuple[str, dict[str, Any]]

_FUNCTION_TAG = re.compile(r"\s*<function=([\w.:/-]+)>\s*")
_JSON_KEYS = r"\"(?:type|name|function|id|parameters|arguments)\"\s*:"
_CANDIDATE = re.compile(rf"{pythonic.START.pattern}|<function=|(?:\[\s*)?\{{\s*{_JSON_KEYS}")
_BETWEEN = re.compile(r"[\s;,]*")
_SUSPECT = re.compile(
    r"\[\s*[\w.:/-]+\s*\(\s*(?:\)|\"|'|\*\*|[^\s=,()\[\]{}\"'*]+\s*=)"
    r"|<function=|\"type\"\s*:\s*\"function\""
    r"|\"name\"\s*:[^:{}]*\"(?:parameters|arguments)\"\s*:"
    r"|\A\s*[\w.]+\(\s*\w+\s*=[^=]"
)
# A reply is read from at most this many places, so that hostile text costs linear time.
_MOST_STARTS = 64


@dataclass(frozen=True)
class Reading:
    """What a reply holds."""

    content: str
    calls: list[Call] = field(default_factory=list)
    suspect: bool = False
    """The content looks like a call that could not be read."""


def write(calls: list[Call], dialect: str) -> str:
    """The text of one or more calls. Raises ConfigError for an unknown dialect."""
    check_dialect(dialect)
    if dialect == "pythonic":
        return "[" + ", ".join(pythonic.write(*call) for call in calls) + "]"
    objects = [{"type": "function", "name": name, "parameters": args} for name, args in calls]
    return "; ".join(json.dumps(o, ensure_ascii=False) for o in objects)


def check_dialect(dialect: str) -> None:
    """Raise ConfigError unless `dialect` is one of DIALECTS."""
    if dialect not in DIALECTS:
        raise ConfigError(f"dialect is {dialect!r}; use {' or '.join(DIALECTS)}")


def read(text: str) -> Reading:
    """Split a reply into content and the calls at its end. Never raises, whatever the text."""
    before, tag, inside = text.partition(PYTHON_START)
    code, _, rest = inside.partition(PYTHON_END)
    bare = before + code + rest if tag else text
    content, calls = _find(bare)
    if calls:
        return Reading(content if content.strip() else "", calls)
    suspect = _SUSPECT.search(bare) is not None
    if tag and not suspect and code.strip() and not (before + rest).strip():
        return Reading("", [(CODE_INTERPRETER, {"code": code})])
    return Reading(text, suspect=suspect or bool(tag))


def _find(text: str) -> tuple[str, list[Call]]:
    """Content before, and calls from, the first place whence everything to the end is calls."""
    end = len(text.rstrip())
    for _, start in zip(range(_MOST_STARTS), _CANDIDATE.finditer(text, 0, end), strict=False):
        place = start.start()
        if start[0].startswith("<"):
            calls = _function_tags(text, place, end)
        elif pythonic.START.match(start[0]):
            found = pythonic.read(text, place)
            calls = found[0] if found and found[1] == end else None
        else:
            calls = _json_calls(text, place, end)
        if calls:
            return text[:place], calls
    return text, []


def _function_tags(text: str, place: int, end: int) -> list[Call] | None:
    calls = []
    while place < end:
        if not (tag := _FUNCTION_TAG.match(text, place)):
            return None
        try:
            arguments, place = _DECODER.raw_decode(text, tag.end())
        except (ValueError, RecursionError):
            return None
        place = _skip(text, place)
        if not isinstance(arguments, dict) or not text.startswith("</function>", place):
            return None
        calls.append((tag[1], arguments))
        place += len("</function>")
    return calls


def _json_calls(text: str, place: int, end: int) -> list[Call] | None:
    calls: list[Call] = []
    while place < end:
        try:
            value, place = _DECODER.raw_decode(text, place)
            calls += map(_json_call, value if isinstance(value, list) else [value])
        except (ValueError, RecursionError):
            return None
        place = _skip(text, place)
    return calls


def _skip(text: str, place: int) -> int:
    found = _BETWEEN.match(text, place)
    return found.end() if found else place


def _json_call(value: Any) -> Call:
    """Name and arguments of a call in JSON, Meta's or OpenAI's keys; ValueError for other JSON."""
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise ValueError("not a function object")
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name = inner.get("name")
    keys = [key for key in ("parameters", "arguments") if key in inner]
    if not isinstance(name, str) or not pythonic.NAME.fullmatch(name):
        raise ValueError("no function name")
    if not keys and "type" not in value:
        raise ValueError("an object with a name is no call without arguments")
    arguments = inner[keys[0]] if keys else {}
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    if not isinstance(arguments, dict | None):
        raise ValueError("arguments are not an object")
    return name, arguments or {}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


# Not strict: models write raw line ends within strings.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, parse_float=_finite)
