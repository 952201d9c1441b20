"""Replies in the words of Ollama's API: objects that each carry what is new, the last one the counts.

writer = Writer("m", field=chat_field)
objects = [writer.piece(delta.text) for delta in deltas] + [writer.end(delta, replies)]
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from herdling.serve.errors import ApiError
from herdling.serve.openai_chat import finite
from herdling.serve.protocol import Delta, Reply, Token, ToolCall
from herdling.serve.replies import Replies

if TYPE_CHECKING:
    from herdling.inputs.tokenizer import Tokenizer

Field = Callable[[str, Sequence[ToolCall]], dict[str, Any]]


def chat_field(text: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
    """What /api/chat calls the content: a message. Arguments are objects, not text."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "function": {"index": i, "name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(calls)
        ]
    return {"message": message}


def generate_field(text: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
    """What /api/generate calls the content."""
    return {"response": text}


class Writer:
    """One reply, to a call that came in when the writer was made."""

    def __init__(self, model: str, field: Field, tokenizer: "Tokenizer | None" = None) -> None:
        """`tokenizer`: where log-probs are asked for."""
        self._model, self._field, self._tokenizer = model, field, tokenizer
        self._began = time.monotonic_ns()

    def piece(
        self, text: str, calls: Sequence[ToolCall] = (), tokens: Sequence[Token] = ()
    ) -> dict[str, Any]:
        """An object of the stream before the last."""
        return {**self._head(), **self._field(text, calls), "done": False, **self._logprobs(tokens)}

    def end(
        self,
        ended: "Delta | Reply",
        replies: Replies,
        text: str = "",
        calls: Sequence[ToolCall] = (),
        tokens: Sequence[Token] = (),
    ) -> dict[str, Any]:
        """The last object; without streaming the only one, with everything in it. Durations in ns."""
        completion, usage = ended.completion, replies.usage
        timings = completion.timings if completion else None
        total = time.monotonic_ns() - self._began
        context = {}
        request = replies.tickets.requests[0]
        if self._field is generate_field and completion and request.tiles is None:
            context = {"context": [*request.ids, *completion.ids]}
        return {
            **self._head(),
            **self._field(text, calls),
            "done": True,
            "done_reason": "stop" if ended.finish == "tool_calls" else ended.finish or "stop",
            **self._logprobs(tokens),
            **context,
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": round(timings.prefill * 1e9) if timings else 0,
            "eval_count": usage.completion_tokens,
            "eval_duration": round(timings.decode * 1e9) if timings else total,
        }

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": now()}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if self._tokenizer is None or not tokens:
            return {}
        told = []
        for token in tokens:
            top = [self._scored(id, logprob) for id, logprob in token.top]
            told.append({**self._scored(token.id, token.logprob), "top_logprobs": top})
        return {"logprobs": told}

    def _scored(self, id: int, logprob: float) -> dict[str, Any]:
        assert self._tokenizer is not None
        raw = self._tokenizer.to_bytes([id])
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def shape(error: ApiError) -> dict[str, Any]:
    """An error's body, and the last line of a stream that broke."""
    return {"error": error.message}
