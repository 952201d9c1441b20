"""Llama Guard's way of asking: a conversation put as a question to a chat model, and its answer read.

    messages = question([{"role": "user", "content": "..."}])    # for the model's own chat format
    verdict = answer("unsafe\\nS1,S9")

The wording is what Llama Guard 3 and 4 were tuned on (llama.com, "Llama Guard 4: model card and prompt
formats"); only the categories given are asked for. The system message is the operator's own and is left out; what
tools returned is shown under their own name, which those models have not been tuned on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from herdling.errors import InputError
from herdling.guard.taxonomy import HAZARDS, UNREADABLE, Verdict

Message = Mapping[str, Any]
SPEAKERS = {"user": "User", "assistant": "Agent", "tool": "Tool", "ipython": "Tool"}
MOST_TOKENS = 32
"""Enough for `unsafe` and every category."""


def question(
    messages: Sequence[Message], categories: Mapping[str, str] = HAZARDS
) -> list[dict[str, Any]]:
    """The one user message that asks about the last of `messages`, pictures in their places.

    Raises InputError where there is nothing to judge.
    """
    shown = [message for message in messages if message.get("role") in SPEAKERS]
    if not shown:
        raise InputError("messages has nothing to judge: no user, assistant or tool message")
    who = SPEAKERS[shown[-1]["role"]]
    listed = "\n".join(f"{code}: {name}." for code, name in categories.items())
    parts: list[Any] = [
        f"Task: Check if there is unsafe content in '{who}' messages in conversations according to "
        "our safety policy with the below categories.\n\n"
        f"<BEGIN UNSAFE CONTENT CATEGORIES>\n{listed}\n<END UNSAFE CONTENT CATEGORIES>\n\n"
        "<BEGIN CONVERSATION>\n\n"
    ]
    for message in shown:
        parts += [f"{SPEAKERS[message['role']]}: ", *_said(message), "\n\n"]
    parts.append(
        "<END CONVERSATION>\n\n"
        f"Provide your safety assessment for ONLY THE LAST {who} message in the above conversation:\n"
        " - First line must read 'safe' or 'unsafe'.\n"
        " - If unsafe, a second line must include a comma-separated list of violated categories."
    )
    return [{"role": "user", "content": _joined(parts)}]


def _said(message: Message) -> list[Any]:
    """The texts and pictures of a message; calls as their JSON."""
    content = message.get("content")
    given = content if isinstance(content, list | tuple) else [content or ""]
    parts: list[Any] = []
    for part in given:
        if isinstance(part, str):
            parts.append(part.strip())
        elif isinstance(part, Mapping) and part.get("type") == "text":
            parts.append(str(part.get("text") or "").strip())
        elif isinstance(part, Mapping):
            parts.append(dict(part))
    calls = [called(call) for call in message.get("tool_calls") or ()]
    return [*parts, *calls]


def called(call: Any) -> str:
    """A tool call as text to be judged."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return f"{function.get('name')}({function.get('arguments')})"


def _joined(parts: Sequence[Any]) -> str | list[dict[str, Any]]:
    """One string, or a list of parts with neighbouring texts put together."""
    out: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str) and out and out[-1].get("type") == "text":
            out[-1]["text"] += part
        else:
            out.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return out[0]["text"] if len(out) == 1 else out


def text_of(message: Message) -> str:
    """What a message says, for judges that read text only."""
    return " ".join(part for part in _said(message) if isinstance(part, str) and part)


def answer(
    text: str, categories: Mapping[str, str] = HAZARDS, score: float | None = None, judge: str = ""
) -> Verdict:
    """The verdict that `text` spells; `unreadable` where it spells none.

    `score` is the judge's probability of `unsafe`. A category that was not asked for does not count,
    but `unsafe` without any that was is unreadable, never safe.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    first = lines[0].casefold() if lines else ""
    if first == "safe":
        return Verdict((), score or 0.0, judge)
    named = [name.strip().upper() for line in lines[1:2] for name in line.split(",")]
    found = tuple(name for name in dict.fromkeys(named) if name in categories)
    if first == "unsafe" and found:
        return Verdict(found, 1.0 if score is None else score, judge)
    return Verdict((UNREADABLE,), 1.0 if score is None else score, judge)
