"""A body of OpenAI's Responses API as a `Chat`.

    responses_in.chat({"model": "m", "input": "Hello"})

Reasoning items of earlier turns are passed over: the model writes none. Refused with 400: hosted
tools (web search and the like), files, `background`, `conversation` and stored `prompt`s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from herdling.serve import errors
from herdling.serve.dialects import fields
from herdling.serve.protocol import Chat, Format

Message = dict[str, Any]
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_SETTINGS = ("temperature", "top_p", "seed", "top_k", "min_p", "stop", "repetition_penalty")
_UNSUPPORTED = ("conversation", "prompt")


def chat(body: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]] = ()) -> Chat:
    """What is asked; `earlier` are the messages of a stored conversation. Raises ApiError."""
    for name in _UNSUPPORTED:
        if body.get(name) is not None:
            raise errors.bad_request(f"{name} is not supported; send the whole input", name)
    if fields.get(body, "background", bool):
        raise errors.bad_request("background is not supported; use stream instead", "background")
    instructions = fields.get(body, "instructions", str)
    system = [{"role": "system", "content": instructions}] if instructions else []
    tools, choice = _tools(body)
    parallel = fields.get(body, "parallel_tool_calls", bool)
    return Chat(
        [*system, *earlier, *messages(body)],
        tools,
        choice,
        parallel is not False,
        _format(fields.get(body, "text", dict) or {}),
        fields.options(
            fields.copied(body, *_SETTINGS),
            max_tokens=fields.limit(body, "max_output_tokens"),
            top_logprobs=fields.top_logprobs(body),
        ),
        fields.get(body, "model", str),
    )


def messages(body: Mapping[str, Any]) -> list[Message]:
    """The input as chat messages. Calls that follow each other become one assistant message."""
    given = body.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if given is None:
        raise errors.bad_request(
            "input is missing; it must be a string or a list of items", "input"
        )
    found: list[Message] = []
    for i, item in enumerate(fields.objects(fields.of(given, list, "input"), "input")):
        _add(found, item, f"input[{i}]")
    if not found:
        raise errors.bad_request("input holds no message; it needs at least one", "input")
    return found


def _add(found: list[Message], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = fields.need(item, "role", str, where + ".")
        if role not in _ROLES:
            known = ", ".join(_ROLES)
            raise errors.bad_request(f"{where}.role is {fields.brief(role)}; use {known}", where)
        content = _content(item.get("content"), f"{where}.content")
        found.append({"role": _ROLES[role], "content": content})
    elif kind == "function_call":
        function = {
            "name": fields.need(item, "name", str, where + "."),
            "arguments": fields.need(item, "arguments", str, where + "."),
        }
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": None})
        found[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = _content(item.get("output"), f"{where}.output")
        found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "item_reference":
        raise errors.bad_request(
            f"{where} refers to a stored item; send the item itself, or previous_response_id", where
        )
    elif kind != "reasoning":
        raise errors.bad_request(
            f"{where}.type is {fields.brief(kind)}, which is not supported", where
        )


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = []
    for j, part in enumerate(fields.objects(fields.of(content, list, where), where)):
        at, kind = f"{where}[{j}]", part.get("type")
        if isinstance(kind, str) and kind in _TEXT_PARTS:
            parts.append(
                {"type": "text", "text": fields.need(part, _TEXT_PARTS[kind], str, at + ".")}
            )
        elif kind == "input_image":
            url = fields.need(part, "image_url", str, at + ".")
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            raise errors.bad_request(
                f"{at}.type is {fields.brief(kind)}; use input_text or input_image", at
            )
    return parts


def _tools(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Tools and tool_choice in the terms of `Chat`."""
    tools = []
    for i, tool in enumerate(fields.objects(fields.get(body, "tools", list) or [], "tools")):
        if tool.get("type") != "function":
            raise errors.bad_request(
                f"tools[{i}].type is {fields.brief(tool.get('type'))}; this server has no tools of its "
                "own, so use function",
                f"tools[{i}].type",
            )
        tools.append(fields.copied(tool, "name", "description", "parameters"))
    choice = body.get("tool_choice")
    if choice is None:
        return tools, "auto"
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = fields.objects(
            fields.need(choice, "tools", list, "tool_choice."), "tool_choice.tools"
        )
        names = [tool.get("name") for tool in allowed]
        tools = [tool for tool in tools if tool.get("name") in names]
        choice = choice.get("mode", "auto")
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return tools, {"name": fields.need(choice, "name", str, "tool_choice.")}
    if choice not in ("none", "auto", "required"):
        raise errors.bad_request(
            f"tool_choice is {fields.brief(choice)}; use none, auto, required or a function",
            "tool_choice",
        )
    return tools, choice


def _format(text: Mapping[str, Any]) -> Format:
    wanted = fields.get(text, "format", dict, "text.") or {"type": "text"}
    kind = wanted.get("type")
    if kind == "json_schema":
        return fields.schema_format(wanted.get("schema"), "text.format.schema")
    if kind not in ("text", "json_object"):
        raise errors.bad_request(
            f"text.format.type is {fields.brief(kind)}; use text, json_object or json_schema",
            "text.format.type",
        )
    return Format("text" if kind == "text" else "json")
