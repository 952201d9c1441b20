"""Conversations as others write them, made into OpenAI's form.

    {"messages": [{"role": "user", "content": "Hi"}, ...], "tools": [...]}               OpenAI
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", ...}]}          ShareGPT, LLaVA
    {"instruction": "Add these.", "input": "1 2", "output": "3"}                          Alpaca
    {"prompt": "Hi", "completion": "Good day."}                                           completion
    {"question": "1 + 2?", "answer": 3, "grader": "number"}                               a task's item

Whatever else a record has is left alone. What is missing or of a wrong type is a DataError that says so;
the caller knows file and line.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from herdling.errors import DataError

_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
_IMAGE = "<image>"
ASKED = "asked"
"""Field of a normal record: how many of its messages are the question of a task's item."""


def normal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with `messages` where it was a conversation in another form; raises DataError."""
    for name, read in _FORMS.items():
        if name in record:
            return read(record)
    return dict(record)


def asked(record: Mapping[str, Any]) -> list[Any]:
    """The messages of a task's item up to the model's turn: from `question` (images first) or `messages`."""
    if ("question" in record) == ("messages" in record):
        raise DataError("has to have either 'question' or 'messages'")
    system = (
        [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    )
    if "messages" in record:
        return [*system, *_list(record, "messages")]
    text, images = _text(record, "question"), _list(record, "images")
    parts = [{"type": "image", "image": image} for image in images]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return [*system, {"role": "user", "content": content}]


def reply(record: Mapping[str, Any]) -> str:
    """What a task's item has to train on: its `reply`, or its answer as text; raises DataError for none."""
    if record.get("reply") is not None:
        return _text(record, "reply")
    answer, grader = record.get("answer"), record.get("grader", "exact")
    if grader == "json" and "answer" in record:
        return json.dumps(answer, ensure_ascii=False)
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if grader == "regex" or isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"the grader {grader} knows no reply to train on; remedy: add a 'reply'")
    return str(answer)


def _item(record: Mapping[str, Any]) -> dict[str, Any]:
    messages = asked(record)
    said = {"role": "assistant", "content": reply(record)}
    return {**_rest(record), "messages": [*messages, said], ASKED: len(messages)}


def _openai(record: Mapping[str, Any]) -> dict[str, Any]:
    return _item(record) if "answer" in record or "grader" in record else dict(record)


def _sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    images = [*_list(record, "images"), *([record["image"]] if record.get("image") else [])]
    messages: list[dict[str, Any]] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record, "system")})
    for i, turn in enumerate(_list(record, "conversations")):
        where = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where} is {type(turn).__name__}; it must be an object")
        said, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise DataError(f"{where} is from {said!r}; use one of {', '.join(_ROLES)}")
        if not isinstance(value, str):
            raise DataError(f"{where} has no value, the text of the turn")
        if role == "call":
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": _calls(value, where)}
            )
        else:
            messages.append({"role": role, "content": _illustrated(value, images, where)})
    if images:
        raise DataError(f"has {len(images)} images more than {_IMAGE} marks in its turns")
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    return {**_rest(record), "messages": messages, **({"tools": tools} if tools else {})}


def _alpaca(record: Mapping[str, Any]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record, "system")})
    for i, turn in enumerate(_list(record, "history")):
        if (
            not isinstance(turn, Sequence)
            or len(turn) != 2
            or not all(isinstance(t, str) for t in turn)
        ):
            raise DataError(f"history[{i}] must be a pair of texts, said and replied")
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    said = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    messages.append({"role": "user", "content": "\n".join(part for part in said if part)})
    messages.append({"role": "assistant", "content": _text(record, "output")})
    return {**_rest(record), "messages": messages}


def _completion(record: Mapping[str, Any]) -> dict[str, Any]:
    messages: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        given = record.get(name)
        messages += (
            given if isinstance(given, list) else [{"role": role, "content": _text(record, name)}]
        )
    return {**_rest(record), "messages": messages}


_FORMS = {
    "question": _item,
    "messages": _openai,
    "conversations": _sharegpt,
    "instruction": _alpaca,
    "completion": _completion,
}


def _rest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every form shares."""
    return {name: record[name] for name in ("tools", "split") if record.get(name) is not None}


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"{name} is {type(value).__name__ if name in record else 'missing'}; it must be a text"
        )
    return value


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise DataError(f"{name} is {type(value).__name__}; it must be a list")
    return value or []


def _illustrated(value: str, images: list[Any], where: str) -> Any:
    """The text with the next of `images`, which are taken away, in place of each mark."""
    texts = value.split(_IMAGE)
    if len(texts) == 1:
        return value
    parts: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        if i:
            if not images:
                raise DataError(f"{where} has an {_IMAGE} mark for which there is no image")
            parts.append({"type": "image", "image": images.pop(0)})
        text = text.removeprefix("\n") if i else text
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    calls = _json(value, f"{where}: a call")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f'{where}: a call must be such as {{"name": "f", "arguments": {{}}}}')
    return [
        {"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", c.get("parameters", {}))}}
        for c in calls
    ]  # fmt: skip


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{what} is not JSON: {problem}") from None
