"""Fields of a JSON body, read with their type, or refused by name.

    fields.get(body, "max_tokens", int)              # None where absent or null
    fields.need(part, "text", str, "content[0].")    # 400 `content[0].text is missing`
    fields.options({"temperature": 0.5}, max_tokens=9)

Unknown fields are left alone: clients send what newer servers know.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from herdling.serve import errors
from herdling.serve.protocol import Body, Controls, Format, Options

T = TypeVar("T")
B = TypeVar("B", bound=Body)
_WORDS = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def get(body: Mapping[str, Any], name: str, kind: type[T], where: str = "") -> T | None:
    """The field, None where it is absent or null. Raises ApiError 400 for another type."""
    value = body.get(name)
    return None if value is None else of(value, kind, where + name)


def need(body: Mapping[str, Any], name: str, kind: type[T], where: str = "") -> T:
    """The same for a field that must be there."""
    value = get(body, name, kind, where)
    if value is None:
        raise errors.bad_request(
            f"{where}{name} is missing; it must be {_WORDS[kind]}", where + name
        )
    return value


def of(value: Any, kind: type[T], name: str) -> T:
    """`value` itself if it is of that JSON type; integers are numbers, booleans are not."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value  # pyright: ignore[reportReturnType]  # as JSON has it
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise errors.bad_request(f"{name} is {brief(value)}; it must be {_WORDS[kind]}", name)
    return value


def objects(values: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """A list whose items must be objects."""
    return [of(value, dict, f"{name}[{i}]") for i, value in enumerate(values)]


def texts(value: Any, name: str) -> list[str]:
    """A string, or a list of them."""
    if isinstance(value, str):
        return [value]
    return [of(item, str, f"{name}[{i}]") for i, item in enumerate(of(value, list, name))]


def brief(value: Any) -> str:
    """A value for an error's one line: short, and without what it holds if it is long."""
    if isinstance(value, Mapping | list):
        return "an object" if isinstance(value, Mapping) else "a list"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def copied(body: Mapping[str, Any], *names: str, **renamed: str) -> dict[str, Any]:
    """The fields that are there and not null, as they are; `renamed` as new_name="old_name"."""
    wanted = {**{name: name for name in names}, **renamed}
    return {new: body[old] for new, old in wanted.items() if body.get(old) is not None}


def options(settings: Mapping[str, Any], **more: Any) -> Options:
    """Sampling settings by OpenAI's names as `Options`, ranges checked; `more` goes in as it is."""
    return validated(Controls, settings).options(**more)


def validated(kind: type[B], body: Mapping[str, Any]) -> B:
    """A body as a pydantic model. Raises ApiError 400 for the first field that does not fit."""
    try:
        return kind.model_validate(dict(body))
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        shown = brief(first.get("input"))
        raise errors.bad_request(f"{name} is {shown}: {first['msg'].lower()}", name) from None


def limit(body: Mapping[str, Any], name: str, least: int = 1) -> int | None:
    """A count of new tokens."""
    value = get(body, name, int)
    if value is not None and value < least:
        raise errors.bad_request(f"{name} is {value}; it must be at least {least}", name)
    return value


def top_logprobs(body: Mapping[str, Any], name: str = "top_logprobs", most: int = 20) -> int:
    """How many alternatives to a token are asked for."""
    value = get(body, name, int) or 0
    if not 0 <= value <= most:
        raise errors.bad_request(f"{name} is {value}; it must be 0 to {most}", name)
    return value


def schema_format(schema: Any, name: str) -> Format:
    """The format of a reply that a JSON schema describes."""
    if isinstance(schema, bool):
        return Format("json_schema", json.dumps(schema))
    return Format("json_schema", json.dumps(of(schema, dict, name), ensure_ascii=False))
