"""A body of Anthropic's Messages API as a `Chat`.

    messages_in.chat({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]})

Thinking blocks of earlier turns are passed over: the model writes none. `cache_control`, `metadata`
and `thinking` are read past. Refused with 400: tools that Anthropic runs itself, and documents other
than plain text. A last message of the assistant's stays where it is: see `begun`.
"""

from collections.abc import Mapping
from typing import Any

from herdling.serve import errors
from herdling.serve.dialects import fields
from herdling.serve.protocol import Chat, Format

Message = dict[str, Any]
_PASSED_OVER = ("thinking", "redacted_thinking")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat(body: Mapping[str, Any], counting: bool = False) -> Chat:
    """What is asked; when only `counting`, max_tokens may be absent. Raises ApiError."""
    limit = fields.limit(body, "max_tokens", 0)
    if limit is None and not counting:
        fields.need(body, "max_tokens", int)
    system = body.get("system")
    start = [{"role": "system", "content": _parts(system, "system")}] if system else []
    choice = fields.get(body, "tool_choice", dict) or {"type": "auto"}
    one = fields.get(choice, "disable_parallel_tool_use", bool, "tool_choice.")
    stops = fields.texts(body.get("stop_sequences") or [], "stop_sequences")
    return Chat(
        [*start, *messages(body)],
        _tools(body),
        _choice(choice),
        not one,
        _format(fields.get(body, "output_config", dict) or {}),
        fields.options(
            {**fields.copied(body, "temperature", "top_p", "top_k"), "stop": stops},
            max_tokens=limit,
        ),
        fields.get(body, "model", str),
    )


def messages(body: Mapping[str, Any]) -> list[Message]:
    """The conversation as chat messages: tool results become messages of their own."""
    found: list[Message] = []
    given = fields.objects(fields.need(body, "messages", list), "messages")
    if not given:
        raise errors.bad_request("messages is empty; it needs at least one message", "messages")
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        role = fields.need(message, "role", str, where + ".")
        if role not in ("user", "assistant", "system"):
            raise errors.bad_request(
                f"{where}.role is {fields.brief(role)}; use user or assistant", where
            )
        found += _message(role, message.get("content"), f"{where}.content")
    return found


def begun(chat: Chat) -> tuple[list[Mapping[str, Any]], str]:
    """The conversation up to the reply, and the words that a last message begins the reply with.

    Raises ApiError where those could be mistaken for a call, or leave one without its result.
    """
    given = list(chat.messages)
    if given[-1]["role"] != "assistant":
        return given, ""
    if chat.tools:
        raise errors.bad_request(
            "the last message is the assistant's, and there are tools; end with a user message "
            "(tool_result blocks answer calls), or send no tools",
            "messages",
        )
    content = given.pop()["content"]
    return given, content if isinstance(content, str) else "".join(
        p.get("text", "") for p in content
    )


def _message(role: str, content: Any, where: str) -> list[Message]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results: list[Message] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for j, block in enumerate(fields.objects(fields.of(content, list, where), where)):
        at, kind = f"{where}[{j}]", block.get("type")
        if kind == "tool_result":
            text = _parts(block.get("content") or "", f"{at}.content")
            results.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
            )
        elif kind == "tool_use":
            function = {
                "name": fields.need(block, "name", str, at + "."),
                "arguments": fields.need(block, "input", dict, at + "."),
            }
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind not in _PASSED_OVER:
            parts.append(_part(block, at))
    if role == "assistant":
        message: Message = {"role": role, "content": parts}
        return [{**message, "tool_calls": calls} if calls else message]
    # Results answer the calls of the turn before, so they stand before what the user adds.
    return results + ([{"role": role, "content": parts}] if parts or not results else [])


def _parts(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    blocks = fields.objects(fields.of(content, list, where), where)
    return [_part(block, f"{where}[{j}]") for j, block in enumerate(blocks)]


def _part(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": fields.need(block, "text", str, where + ".")}
    source = fields.get(block, "source", dict, where + ".") or {}
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": _image(source, where + ".source")}}
    if kind == "document" and source.get("type") == "text":
        return {"type": "text", "text": fields.need(source, "data", str, where + ".source.")}
    raise errors.bad_request(
        f"{where}.type is {fields.brief(kind)}, which is not supported here; use text or image",
        where,
    )


def _image(source: Mapping[str, Any], where: str) -> str:
    """A data URI of a base64 source; the URL of the other kind."""
    if source.get("type") == "url":
        return fields.need(source, "url", str, where + ".")
    if source.get("type") != "base64":
        raise errors.bad_request(f"{where}.type must be base64 or url", where + ".type")
    media = fields.need(source, "media_type", str, where + ".")
    return f"data:{media};base64,{fields.need(source, 'data', str, where + '.')}"


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = []
    for i, tool in enumerate(fields.objects(fields.get(body, "tools", list) or [], "tools")):
        where = f"tools[{i}]."
        if tool.get("type", "custom") != "custom":
            raise errors.bad_request(
                f"{where}type is {fields.brief(tool['type'])}; this server runs no tools itself, so give "
                "name, description and input_schema",
                where + "type",
            )
        function = {
            "name": fields.need(tool, "name", str, where),
            **fields.copied(tool, "description"),
            "parameters": fields.need(tool, "input_schema", dict, where),
        }
        tools.append(function)
    return tools


def _choice(choice: Mapping[str, Any]) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"name": fields.need(choice, "name", str, "tool_choice.")}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise errors.bad_request(
            "tool_choice.type must be auto, any, tool or none", "tool_choice.type"
        )
    return _CHOICES[kind]


def _format(config: Mapping[str, Any]) -> Format:
    wanted = fields.get(config, "format", dict, "output_config.") or {}
    if wanted.get("type") != "json_schema":
        return Format()
    return fields.schema_format(wanted.get("schema"), "output_config.format.schema")
