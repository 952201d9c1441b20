"""Conversations as others write them, made into OpenAI's form.

    {"messages": [{"role": "user", "content": "Hi"}, ...], "tools": [...]}               OpenAI
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", ...}]}          ShareGPT, LLaVA
    {"instruction": "Add these.", "input": "1 2", "output": "3"}                          Alpaca
    {"prompt": "Hi", "completion": "Good day."}                                           completion
    {"question": "1 + 2?", "answer": 3, "grader": "number"}                               a task's item

`system` may stand beside any of them. A turn with `weight` 0 is read and not learnt. Whatever else a
record has is left alone. What is missing, of a wrong type, or would be lost is a DataError that says so;
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
    if record.get("image") is None:
        return dict(record)
    rest = {name: value for name, value in record.items() if name != "image"}
    return {**rest, "images": _images(record)}


def with_system(record: Mapping[str, Any], messages: list[Any]) -> list[Any]:
    """The messages after the record's own `system` text, where it has one and they do not repeat it."""
    if not record.get("system"):
        return messages
    said = {"role": "system", "content": _text(record, "system")}
    return messages if messages[:1] == [said] else [said, *messages]


def check_no_images(record: Mapping[str, Any], beside: str) -> None:
    """Raise DataError for images in a field of their own, where the form gives them no place."""
    for name in ("images", "image"):
        if record.get(name) not in (None, [], ""):
            raise DataError(
                f"has {name} beside {beside}, where their place is unknown; remedy: put "
                "{'type': 'image', 'image': 'cat.png'} parts into the content of a message"
            )


def asked(record: Mapping[str, Any]) -> list[Any]:
    """The messages of a task's item up to the model's turn: from `question` (images first) or `messages`."""
    if ("question" in record) == ("messages" in record):
        raise DataError("has to have either 'question' or 'messages'")
    if "messages" in record:
        check_no_images(record, "messages")
        return with_system(record, _list(record, "messages"))
    text = _text(record, "question")
    parts = [{"type": "image", "image": image} for image in _images(record)]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return with_system(record, [{"role": "user", "content": content}])


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
    if "answer" in record or "grader" in record:
        return _item(record)
    check_no_images(record, "messages")
    messages = record["messages"]
    if record.get("system") and isinstance(messages, list):
        messages = with_system(record, messages)
    return {**with_tools(record), "messages": messages}


def _sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    images = _images(record)
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(_list(record, "conversations")):
        where = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where} is {type(turn).__name__}; it must be an object")
        said, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise DataError(f"{where} is from {said!r}; use one of {', '.join(_ROLES)}")
        calls = turn.get("tool_calls")
        if value is None and calls:
            value = ""
        if not isinstance(value, str):
            raise DataError(f"{where} has no value, the text of the turn")
        if role == "call":
            message = {"role": "assistant", "content": "", "tool_calls": _calls(value, where)}
        else:
            message = {"role": role, "content": _illustrated(value, images, where)}
            message |= {"tool_calls": calls} if calls else {}
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    if images:
        raise DataError(f"has {len(images)} images more than {_IMAGE} marks in its turns")
    return {**_rest(record), "messages": with_system(record, messages)}


def _alpaca(record: Mapping[str, Any]) -> dict[str, Any]:
    check_no_images(record, "instruction")
    messages: list[dict[str, Any]] = []
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
    return {**_rest(record), "messages": with_system(record, messages)}


def _completion(record: Mapping[str, Any]) -> dict[str, Any]:
    check_no_images(record, "completion")
    messages: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        given = record.get(name)
        messages += (
            given if isinstance(given, list) else [{"role": role, "content": _text(record, name)}]
        )
    return {**_rest(record), "messages": with_system(record, messages)}


_FORMS = {
    "question": _item,
    "messages": _openai,
    "conversations": _sharegpt,
    "instruction": _alpaca,
    "completion": _completion,
}


def _rest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every form shares."""
    found = {name: record[name] for name in ("tools", "split") if record.get(name) is not None}
    return with_tools(found)


def with_tools(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its tools read where they are JSON text, as tables have to have them."""
    tools = record.get("tools")
    if not isinstance(tools, str):
        return dict(record)
    rest = {name: value for name, value in record.items() if name != "tools"}
    return {**rest, "tools": _json(tools, "tools")} if tools.strip() else rest


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


def _images(record: Mapping[str, Any]) -> list[Any]:
    """What stands in `images` and `image`."""
    return [*_list(record, "images"), *([record["image"]] if record.get("image") else [])]


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
