"""Replies in the words of OpenAI's Responses API: one object, and the events by which it grows.

    writer = Writer(request_body, id="resp_1", model="m", created=0)
    events = writer.begin() + writer.take(delta) + ... + writer.end(usage)
    writer.response                     # what a call without `stream` returns

An item is a message or a function call; a message has one part, of type output_text. Every event has
the next `sequence_number`.
"""

import json
import time
import uuid
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from herdling.serve.errors import ApiError
from herdling.serve.openai_chat import finite
from herdling.serve.protocol import Delta, FinishReason, Token, ToolCall, Usage

if TYPE_CHECKING:
    from herdling.inputs.tokenizer import Tokenizer

Event = dict[str, Any]
_SHORT = {"length": "max_output_tokens", "content_filter": "content_filter"}
# What is told back as it was sent, with what the API takes for granted.
_ECHOED = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
    "user": None,
}


class Writer:
    """One response. Feed it the deltas of its only choice."""

    def __init__(
        self,
        body: Mapping[str, Any],
        *,
        id: str,
        model: str,
        created: int,
        temperature: float | None = None,
        top_p: float | None = None,
        tokenizer: "Tokenizer | None" = None,
        silent: Collection[int] = (),
    ) -> None:
        """`tokenizer`: where log-probs are asked for; they are not told of `silent` tokens, which
        end a reply."""
        echoed = {k: v if body.get(k) is None else body[k] for k, v in _ECHOED.items()}
        self.response: dict[str, Any] = {
            "id": id,
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "reasoning": {"effort": None, "summary": None},
            "store": body.get("store") is not False,
            "temperature": temperature,
            "top_p": top_p,
            "usage": None,
            **echoed,
        }
        self._tokenizer, self._silent = tokenizer, silent
        self._number = -1
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self._told = 0  # of these, those that went out with a piece of text
        self._message: dict[str, Any] | None = None
        self._finish: FinishReason = "stop"

    def begin(self) -> list[Event]:
        """The events before any output."""
        return [self._state("response.created"), self._state("response.in_progress")]

    def take(self, delta: Delta) -> list[Event]:
        """The events that a delta gives rise to."""
        events: list[Event] = []
        if self._tokenizer is not None:
            self._tokens += [token for token in delta.tokens if token.id not in self._silent]
        if delta.text:
            events += [*self._open(), self._piece(delta.text)]
        if delta.call is not None:
            events += self._close("completed") + self._call(delta.call)
        if delta.finish is not None:
            self._finish = delta.finish
        return events

    def end(self, usage: Usage) -> list[Event]:
        """The events after the last delta; `response` is whole from then on."""
        reason = _SHORT.get(self._finish)
        status = "incomplete" if reason else "completed"
        events = [] if self.response["output"] else self._open()
        events += self._close(status)
        self.response["status"] = status
        if reason:
            self.response["incomplete_details"] = {"reason": reason}
        else:
            self.response["completed_at"] = int(time.time())
        self.response["usage"] = usage_of(usage)
        return [*events, self._state(f"response.{status}")]

    def fail(self, error: ApiError) -> Event:
        """The last event of a stream that broke."""
        codes = {429: "rate_limit_exceeded", 400: "invalid_prompt"}
        code = codes.get(error.status, "server_error")
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": error.message}
        return self._state("response.failed")

    # ---- the message

    def _open(self) -> list[Event]:
        if self._message is not None:
            return []
        self._message = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._text = []
        item = dict(self._message)
        self.response["output"].append(self._message)
        return [
            self._event("response.output_item.added", output_index=self._place, item=item),
            self._part("response.content_part.added", part=_part("", [])),
        ]

    def _piece(self, text: str) -> Event:
        self._text.append(text)
        logprobs = [self._logprob(token) for token in self._tokens[self._told :]]
        self._told = len(self._tokens)
        return self._part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _close(self, status: str) -> list[Event]:
        if self._message is None:
            return []
        text = "".join(self._text)
        logprobs = [self._logprob(token) for token in self._tokens]
        part = _part(text, [self._logprob(token, whole=True) for token in self._tokens])
        done = self._part("response.output_text.done", text=text, logprobs=logprobs)
        part_done = self._part("response.content_part.done", part=part)
        self._message |= {"status": status, "content": [part]}
        item = self._event(
            "response.output_item.done", output_index=self._place, item=dict(self._message)
        )
        self._message, self._tokens, self._told = None, [], 0
        return [done, part_done, item]

    def _logprob(self, token: Token, whole: bool = False) -> dict[str, Any]:
        """A token's log-prob; in a part that is `whole` with its bytes."""
        top = [self._scored(id, logprob, whole) for id, logprob in token.top]
        return {**self._scored(token.id, token.logprob, whole), "top_logprobs": top}

    def _scored(self, id: int, logprob: float, whole: bool) -> dict[str, Any]:
        assert self._tokenizer is not None
        raw = self._tokenizer.to_bytes([id])
        extra = {"bytes": list(raw)} if whole else {}
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), **extra}

    # ---- a call

    def _call(self, call: ToolCall) -> list[Event]:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": arguments,
        }
        self.response["output"].append(item)
        at = {"item_id": item["id"], "output_index": self._place}
        begun = {**item, "status": "in_progress", "arguments": ""}
        name = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=self._place, item=begun),
            self._event(f"{name}.delta", **at, delta=arguments),
            self._event(f"{name}.done", **at, name=call.name, arguments=arguments),
            self._event("response.output_item.done", output_index=self._place, item=item),
        ]

    # ---- events

    @property
    def _place(self) -> int:
        return len(self.response["output"]) - 1

    def _part(self, type: str, **more: Any) -> Event:
        assert self._message is not None
        at = {"item_id": self._message["id"], "output_index": self._place, "content_index": 0}
        return self._event(type, **at, **more)

    def _state(self, type: str) -> Event:
        output = [dict(item) for item in self.response["output"]]
        return self._event(type, response={**self.response, "output": output})

    def _event(self, type: str, **more: Any) -> Event:
        self._number += 1
        return {"type": type, "sequence_number": self._number, **more}


def usage_of(usage: Usage) -> dict[str, Any]:
    """The `usage` of a response."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def message_of(response: Mapping[str, Any]) -> dict[str, Any]:
    """A response's output as a message, for the conversation to go on from."""
    items = response["output"]
    texts = [item["content"][0]["text"] for item in items if item["type"] == "message"]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    calls = [item for item in items if item["type"] == "function_call"]
    if calls:
        message["tool_calls"] = [
            {
                "id": call["call_id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls
        ]
    return message


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
