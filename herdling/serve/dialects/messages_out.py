"""Replies in the words of Anthropic's Messages API: one message, and the events by which it grows.

    writer = Writer(id="msg_1", model="m", prompt_tokens=7)
    events = writer.begin() + writer.take(delta) + ... + writer.end(usage, stop_sequence=None)
    writer.message                      # what a call without `stream` returns

A block is text or a tool_use; each is opened, grows and is closed before the next.
"""

import json
from typing import Any

from herdling.serve.errors import ApiError
from herdling.serve.protocol import Delta, FinishReason, ToolCall, Usage

Event = dict[str, Any]
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
            "content_filter": "refusal"}  # fmt: skip
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class Writer:
    """One message. Feed it the deltas of its only choice."""

    def __init__(self, *, id: str, model: str, prompt_tokens: int) -> None:
        self.message: dict[str, Any] = {
            "id": id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens)),
        }
        self._text: list[str] | None = None
        self._finish: FinishReason = "stop"

    def begin(self) -> list[Event]:
        """The events before any content."""
        return [
            {"type": "message_start", "message": {**self.message, "content": []}},
            {"type": "ping"},
        ]

    def take(self, delta: Delta) -> list[Event]:
        """The events that a delta gives rise to."""
        events: list[Event] = []
        if delta.text:
            if self._text is None:
                self._text = []
                events.append(self._start({"type": "text", "text": ""}))
            self._text.append(delta.text)
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        if delta.call is not None:
            events += [*self._close(), *self._call(delta.call)]
        if delta.finish is not None:
            self._finish = delta.finish
        return events

    def end(self, usage: Usage, stop_sequence: str | None) -> list[Event]:
        """The events after the last delta; `message` is whole from then on."""
        events = self._close()
        reason = "stop_sequence" if stop_sequence is not None else _REASONS[self._finish]
        ending = {"stop_reason": reason, "stop_sequence": stop_sequence}
        self.message |= {**ending, "usage": _usage(usage)}
        delta = {"type": "message_delta", "delta": ending, "usage": _usage(usage)}
        return [*events, delta, {"type": "message_stop"}]

    def _call(self, call: ToolCall) -> list[Event]:
        block = {
            "type": "tool_use",
            "id": call.id.replace("call_", "toolu_", 1),
            "name": call.name,
            "input": call.arguments,
        }
        text = json.dumps(call.arguments, ensure_ascii=False)
        events = [
            self._start({**block, "input": {}}),
            self._delta({"type": "input_json_delta", "partial_json": text}),
            self._stop(),
        ]
        self.message["content"].append(block)
        return events

    def _close(self) -> list[Event]:
        if self._text is None:
            return []
        event = self._stop()
        self.message["content"].append({"type": "text", "text": "".join(self._text)})
        self._text = None
        return [event]

    @property
    def _place(self) -> int:
        return len(self.message["content"])

    def _start(self, block: dict[str, Any]) -> Event:
        return {"type": "content_block_start", "index": self._place, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._place, "delta": delta}

    def _stop(self) -> Event:
        return {"type": "content_block_stop", "index": self._place}


def shape(error: ApiError) -> dict[str, Any]:
    """An error's body."""
    other = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _TYPES.get(error.status, other)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts tokens that were cached apart from those that were read."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
