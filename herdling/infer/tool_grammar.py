"""Forced tool calls as a grammar: `tool_choice` required, or one function by name.

    grammar = tool_grammar(tools, "required", "pythonic")
    chat.parse(reply)["tool_calls"]                    # arguments valid for the tool's parameters

In the json dialect a call is `{"type": "function", "name": ..., "parameters": {...}}`. In the pythonic
one it is `[name(arg="value", flag=True)]`: arguments in the order of `properties`, each value in JSON's
spelling (which the parser takes), apart from top-level True, False and None. A tool whose parameters
are not a plain list of properties (they use `anyOf`, `allOf`, a `$ref`, patterns, or names that need
quotes) is called in the json dialect even there; the parser reads both. Parameters are narrowed:
objects that list their properties take no others, and numbers have at most 18 digits before the point.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from herdling.errors import InputError
from herdling.infer.grammar import JSON_STYLE, Grammar
from herdling.infer.schema_gate import enforceable
from herdling.inputs import pythonic
from herdling.inputs.tool_calls import check_dialect

_PLAIN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any],
    dialect: str = "pythonic",
    parallel: bool = False,
) -> Grammar:
    """What the reply must match so that it is a call.

    Args:
        tools: OpenAI's wrapping or bare functions, as `chat.render` takes them.
        choice: "required", a function's name, or `{"type": "function", "function": {"name": ...}}`.
        parallel: several calls may follow one another.

    Raises InputError for an unknown choice, for tools without a usable name, and for parameters that
    cannot be enforced; ConfigError for an unknown dialect.
    """
    check_dialect(dialect)
    functions = _chosen(_functions(tools), choice)
    python: list[str] = []
    objects: list[str] = []
    rules: list[str] = []
    for i, (name, parameters) in enumerate(functions.items()):
        if dialect == "pythonic" and _is_plain(parameters):
            python.append(f"call{i}")
            rules += _python_rules(i, name, parameters)
        else:
            objects.append(f"call{i}")
            head = '{"type": "function", "name": ' + json.dumps(name) + ', "parameters": '
            rules.append(f'call{i}: {json.dumps(head)} arguments{i} "}}"')
            rules.append(f"arguments{i}: {_json(parameters)}")
    return Grammar("lark", "\n".join([*_start(python, objects, parallel), *rules]))


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> parameters, checked and narrowed."""
    found: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not pythonic.NAME.fullmatch(name):
            raise InputError(f"tools[{i}] has no usable name; give {{'name': 'letters_or_digits'}}")
        if name in found:
            raise InputError(f"tools[{i}] is named {name!r}, as another tool is; rename one")
        given = function.get("parameters") or {"type": "object", "properties": {}}
        where = f"tools[{i}].parameters"
        if not isinstance(given, Mapping):
            raise InputError(f"{where} is {type(given).__name__}; give a JSON schema")
        if given.get("type", "object") != "object":
            raise InputError(f"{where} has type {given['type']!r}; arguments are an object")
        given = {"type": "object", **given}
        if not given.keys() & {
            "properties",
            "$ref",
            "anyOf",
            "oneOf",
            "allOf",
            "patternProperties",
        }:
            given.setdefault("additionalProperties", True)
        found[name] = enforceable(given, strict=True, where=where)
    return found


def _chosen(
    functions: dict[str, dict[str, Any]], choice: str | Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name", "") if isinstance(function, Mapping) else ""
        required = False
    else:
        required = choice == "required" and "required" not in functions
    if not functions:
        raise InputError("tool_choice asks for a call, but there are no tools")
    if required:
        return functions
    if not isinstance(choice, str) or choice not in functions:
        known = ", ".join(functions)
        raise InputError(f"tool_choice names {choice!r}; use required, or one of {known}")
    return {choice: functions[choice]}


def _start(python: list[str], objects: list[str], parallel: bool) -> Iterator[str]:
    starts = [name for name, calls in (("list", python), ("objects", objects)) if calls]
    yield "start: " + " | ".join(starts)
    if python:
        yield 'list: "[" python ' + ('(", " python)* "]"' if parallel else '"]"')
        yield "python: " + " | ".join(python)
    if objects:
        yield "objects: object" + (' ("; " object)*' if parallel else "")
        yield "object: " + " | ".join(objects)


def _is_plain(parameters: dict[str, Any]) -> bool:
    """Whether every argument can stand as `name=value`, with its schema by itself."""
    names, required = parameters.get("properties", {}), parameters.get("required", [])
    references = [ref for ref in _references(parameters) if not ref.startswith(_DEFINITIONS)]
    bare = all(pythonic.write("f", {name: 1}) == f"f({name}=1)" for name in names)
    closed = parameters.get("additionalProperties") is False and set(required) <= names.keys()
    return parameters.keys() <= _PLAIN and bare and closed and not references


_DEFINITIONS = ("#/$defs/", "#/definitions/")


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)


def _python_rules(i: int, name: str, parameters: dict[str, Any]) -> Iterator[str]:
    """Rules of `name(a=1, b=2)`: first{j} stands before argument j when none came, rest{j} after some."""
    required = set(parameters.get("required", []))
    definitions = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    properties = parameters.get("properties", {})
    yield f'call{i}: {json.dumps(name + "(")} first{i}_0 ")"'
    for j, (key, schema) in enumerate(properties.items()):
        skips = key not in required
        for state, comma in (("first", ""), ("rest", '", " ')):
            skip = f" | {state}{i}_{j + 1}" if skips else ""
            yield f"{state}{i}_{j}: {comma}argument{i}_{j} rest{i}_{j + 1}{skip}"
        yield f"argument{i}_{j}: {json.dumps(key + '=')} {_python_value(schema, definitions)}"
    yield f'first{i}_{len(properties)}: ""'
    if properties:
        yield f'rest{i}_{len(properties)}: ""'


def _python_value(schema: Any, definitions: dict[str, Any]) -> str:
    if schema == {"type": "boolean"}:
        return '("True" | "False")'
    kinds = schema.get("type") if isinstance(schema, dict) else None
    if isinstance(kinds, list) and "null" in kinds and not schema.keys() & {"enum", "const"}:
        kinds = [kind for kind in kinds if kind != "null"]
        other = {**schema, "type": kinds[0] if len(kinds) == 1 else kinds}
        return f'("None" | {_python_value(other, definitions)})' if kinds else '"None"'
    return _json({**definitions, **schema} if isinstance(schema, dict) else schema)


def _json(schema: Any) -> str:
    whole = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    return "%json " + json.dumps({"x-guidance": dict(JSON_STYLE), **whole})
