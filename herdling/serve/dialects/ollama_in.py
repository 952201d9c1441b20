"""Bodies of Ollama's API as a `Chat`.

    ollama_in.chat({"model": "m", "messages": [...], "options": {"num_predict": 9}})

Options about loading a model (`num_ctx`, `num_gpu`, ...), `keep_alive` and `think` are read past.
"""

import json
from collections.abc import Mapping
from typing import Any

from herdling.serve import errors
from herdling.serve.dialects import fields
from herdling.serve.protocol import Chat, Format, Options

_ROLES = ("system", "user", "assistant", "tool")
_OPTIONS = (
    "temperature",
    "seed",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "stop",
)


def chat(body: Mapping[str, Any]) -> Chat:
    """What a body of /api/chat asks. Raises ApiError."""
    given = fields.objects(fields.get(body, "messages", list) or [], "messages")
    tools = fields.objects(fields.get(body, "tools", list) or [], "tools")
    return Chat(
        [_message(m, f"messages[{i}]") for i, m in enumerate(given)],
        tools,
        format=_format(body.get("format")),
        options=settings(body),
        model=model_name(body),
    )


def generate(body: Mapping[str, Any]) -> Chat:
    """What a body of /api/generate asks: system and prompt become messages."""
    system = fields.get(body, "system", str)
    user = {
        "role": "user",
        "content": fields.get(body, "prompt", str),
        "images": body.get("images"),
    }
    start = [{"role": "system", "content": system}] if system else []
    return Chat(
        [*start, _message(user, "prompt")],
        format=_format(body.get("format")),
        options=settings(body),
        model=model_name(body),
    )


def settings(body: Mapping[str, Any]) -> Options:
    """The options of either, in our names."""
    given = fields.get(body, "options", dict) or {}
    limit = fields.get(given, "num_predict", int, "options.")
    return fields.options(
        fields.copied(given, *_OPTIONS, repetition_penalty="repeat_penalty"),
        max_tokens=None if limit is None or limit < 0 else limit,  # below 0: as long as it likes
        top_logprobs=fields.top_logprobs(body),
    )


def model_name(body: Mapping[str, Any]) -> str:
    """The model, without the tag that Ollama adds to names without one."""
    name = fields.get(body, "model", str) or fields.get(body, "name", str)
    if not name:
        raise errors.bad_request("model is missing; it must be a string", "model")
    return name.removesuffix(":latest")


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = fields.need(message, "role", str, where + ".")
    if role not in _ROLES:
        raise errors.bad_request(
            f"{where}.role is {fields.brief(role)}; use {', '.join(_ROLES)}", where
        )
    text = fields.get(message, "content", str, where + ".") or ""
    out: dict[str, Any] = {"role": role, "content": text}
    pictures = fields.get(message, "images", list, where + ".") or []
    if pictures:
        shown = [fields.of(image, str, f"{where}.images[{j}]") for j, image in enumerate(pictures)]
        parts = [{"type": "image", "image": image} for image in shown]
        out["content"] = [*parts, {"type": "text", "text": text}]
    calls = fields.objects(fields.get(message, "tool_calls", list, where + ".") or [], where)
    if calls:
        out["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)
        ]
    return out


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = fields.need(call, "function", dict, where + ".")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = fields.need(function, "name", str, where + ".function.")
    return {
        "id": call.get("id"),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _format(wanted: Any) -> Format:
    if wanted in (None, ""):
        return Format()
    if wanted == "json":
        return Format("json")
    if isinstance(wanted, Mapping):
        return fields.schema_format(wanted, "format")
    raise errors.bad_request(f'format is {fields.brief(wanted)}; use "json" or a schema', "format")
