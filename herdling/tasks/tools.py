"""Tools that a task gives the model: what each is called, takes and does, and answering its calls.

    calc = Tool("calc", ("x",), evaluate)
    calc.schema                                        # for `Item.tools`
    answer_calls([calc], messages)                     # the tool messages, for `Task.respond`

Schemas are kept short, since every conversation carries them: names and types of the arguments, which
are all texts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_CALLS = 8
"""Calls of one turn that are carried out."""
_LONGEST_ARGUMENT = 2000
_LONGEST_RESULT = 2000


@dataclass(frozen=True)
class Tool:
    """A function from texts to a text, which raises ValueError with what to say of a bad call."""

    name: str
    arguments: tuple[str, ...]
    function: Callable[..., str]
    description: str = ""

    @property
    def schema(self) -> dict[str, Any]:
        """As in OpenAI's `tools`."""
        about = {"description": self.description} if self.description else {}
        properties = {name: {"type": "string"} for name in self.arguments}
        parameters = {"properties": properties, "required": list(self.arguments)}
        if len(self.arguments) == 1:
            del parameters["required"]  # what else: eleven tokens saved in every conversation
        function = {"name": self.name, **about, "parameters": parameters}
        return {"type": "function", "function": function}

    def call(self, *values: str) -> list[dict[str, Any]]:
        """The reference turns of one call: the assistant's, and the result."""
        arguments = dict(zip(self.arguments, values, strict=True))
        made = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return [
            {"role": "assistant", "content": "", "tool_calls": [made]},
            {"role": "tool", "content": self.run(arguments)},
        ]

    def run(self, arguments: Any) -> str:
        """The result of a call, or what is wrong with it; never raises."""
        names = ", ".join(self.arguments)
        if not isinstance(arguments, Mapping) or set(arguments) != set(self.arguments):
            return f"error: {self.name} takes {names}"
        given = [arguments[name] for name in self.arguments]
        try:
            # A number that the model wrote without quotes is as good as its text.
            values = [value if isinstance(value, str) else json.dumps(value) for value in given]
        except (TypeError, ValueError, RecursionError):
            return f"error: {self.name} takes {names} as text"
        if any(len(value) > _LONGEST_ARGUMENT for value in values):
            return "error: the argument is too long"
        try:
            return self.function(*values)[:_LONGEST_RESULT]
        except ValueError as problem:
            return f"error: {problem}"


def answer_calls(
    tools: Sequence[Tool], messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A tool message for each call of the last message, in order; never raises."""
    known = {tool.name: tool for tool in tools}
    results = []
    for i, call in enumerate((messages[-1].get("tool_calls") or []) if messages else []):
        name, arguments = _read(call)
        if i >= _MOST_CALLS:
            said = f"error: at most {_MOST_CALLS} calls at once"
        elif name in known:
            said = known[name].run(arguments)
        else:
            said = f"error: there is no {name[:40]}, only {', '.join(known)}"
        reference = (
            {"tool_call_id": call["id"]} if isinstance(call, Mapping) and "id" in call else {}
        )
        results.append({"role": "tool", "content": said, **reference})
    return results


def _read(call: Any) -> tuple[str, Any]:
    """Name and arguments of a call in either of OpenAI's forms."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping):
        return "", None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    return str(function.get("name", "")), arguments
