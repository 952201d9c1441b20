"""`POST /v1/chat/completions`, as OpenAI's clients expect it.

Beside OpenAI's fields: `top_k`, `min_p`, `typical_p`, `repetition_penalty`, `ignore_eos`,
`stop_token_ids`, `priority`, and `herdling: {"experts": true}` (see docs/serving.md). The roles
`developer` and `function` are read as `system` and `tool`. Left out: audio, files, stored replies,
`functions` (the form before tools).
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import Field

from herdling.serve.errors import bad_request
from herdling.serve.experts import by_token
from herdling.serve.protocol import Chat, Controls, Delta, Format, Reply, Token, ToolCall
from herdling.serve.replies import Replies, arguments
from herdling.serve.stream import EventStream, sse, until_gone

if TYPE_CHECKING:
    from herdling.serve.service import Service

_ROLES = {"developer": "system", "function": "tool"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_NEVER = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


class ChatBody(Controls):
    """A conversation, and how to answer it."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None


def routes(service: "Service") -> APIRouter:
    """The route, answering from `service`."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        """Answer a conversation."""
        replies = await service.chat(read(body))
        answer = _Answer(body, replies, body.model or service.settings.name)
        if body.stream:
            return EventStream(sse(answer.chunks()), request)
        return await until_gone(request, answer.whole())

    return router


# ---- from their words to ours


def read(body: ChatBody) -> Chat:
    """The neutral form of a body. Raises ApiError for what cannot be meant."""
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    wanted = (body.herdling is not None and body.herdling.experts) or False
    options = body.options(
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top_logprobs=body.top_logprobs or (5 if wanted else 0),
    )
    return Chat(
        [read_message(message) for message in body.messages],
        body.tools or (),
        read_tool_choice(body.tool_choice),
        body.parallel_tool_calls is not False,
        read_format(body.response_format),
        options,
        body.model,
    )


def read_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message in the roles and parts that `herdling.inputs.chat` knows; it checks the rest."""
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str):
        role = _ROLES.get(role, role)
    if isinstance(content, list):
        content = [_part(part) for part in content]
    return {**message, "role": role, "content": content}


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _TEXTS:
        return {"type": "text", "text": part.get(_TEXTS[kind])}
    return part


def read_tool_choice(choice: str | Mapping[str, Any] | None) -> Any:
    """`Chat.tool_choice` from OpenAI's; raises ApiError."""
    if choice is None:
        return "auto"
    if choice in ("none", "auto", "required"):
        return choice
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise bad_request(
            'tool_choice must be "none", "auto", "required" or '
            '{"type": "function", "function": {"name": ...}}',
            "tool_choice",
        )
    return {"name": name}


def read_format(given: Mapping[str, Any] | None) -> Format:
    """`Chat.format` from OpenAI's `response_format`; `regex` and `grammar` (Lark) are ours."""
    kind = "text" if given is None else given.get("type")
    if given is None or kind == "text":
        return Format()
    if kind == "json_object":
        # A schema beside it is how huggingface_hub (`value`) and llama.cpp (`schema`) send one.
        beside = next((name for name in ("schema", "value") if given.get(name) is not None), None)
        return _schema(given[beside], beside) if beside else Format("json")
    if kind == "json_schema":
        wrapper = given.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
        return _schema(schema, "json_schema.schema")
    for name, ours in (("regex", "regex"), ("grammar", "lark")):
        if kind == name and isinstance(given.get(name), str):
            return Format(ours, given[name])  # pyright: ignore[reportArgumentType]
    raise bad_request(
        "response_format.type must be text, json_object or json_schema "
        "(or regex, grammar with the text under the same name)",
        "response_format",
    )


def _schema(given: Any, field: str) -> Format:
    if not isinstance(given, Mapping | bool):
        raise bad_request(f"response_format.{field} must be a JSON schema", "response_format")
    return Format("json_schema", json.dumps(given, ensure_ascii=False))


# ---- from our words to theirs


def token_fields(token: Token, replies: Replies) -> dict[str, Any]:
    """A token as in `choices[].logprobs.content[]`."""
    return {
        **_scored(token.id, token.logprob, replies),
        "top_logprobs": [_scored(id, logprob, replies) for id, logprob in token.top],
    }


def _scored(id: int, logprob: float, replies: Replies) -> dict[str, Any]:
    tokenizer = replies.tokenizer
    text = tokenizer.decode([id], surrogates=False)
    return {
        "token": text,
        "logprob": finite(logprob),
        "bytes": list(tokenizer.to_bytes([id])),
    }


def finite(logprob: float) -> float:
    """A log-prob that JSON can hold."""
    return max(logprob, _NEVER)


def call_fields(call: ToolCall) -> dict[str, Any]:
    """A call as in `message.tool_calls[]`."""
    function = {"name": call.name, "arguments": arguments(call)}
    return {"id": call.id, "type": "function", "function": function}


@dataclass
class _Choice:
    """Of one choice: whether it was begun, and tokens that wait for their text."""

    begun: bool = False
    tokens: list[Token] = field(default_factory=list)


class _Answer:
    """One answer, as a whole or in chunks."""

    def __init__(self, body: ChatBody, replies: Replies, model: str) -> None:
        self._body, self._replies = body, replies
        self._id, self._created, self._model = (
            f"chatcmpl-{uuid.uuid4().hex}",
            int(time.time()),
            model,
        )
        self._experts = bool(body.herdling and body.herdling.experts)
        self._choices: dict[int, _Choice] = {}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    async def whole(self) -> dict[str, Any]:
        async with self._replies as replies:
            choices = [self._message(reply) for reply in await replies.collect()]
        return {**self._frame("chat.completion", choices), "usage": self._replies.usage.plain()}

    def _message(self, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": reply.text or (None if reply.calls else ""),
            "refusal": None,
        }
        if reply.calls:
            message["tool_calls"] = [call_fields(call) for call in reply.calls]
        choice = {
            "index": reply.choice,
            "message": message,
            "logprobs": self._logprobs(reply.choice, reply.tokens),
            "finish_reason": reply.finish,
        }
        if self._experts:
            choice["herdling"] = by_token(
                self._replies.tickets.requests[reply.choice], reply.completion, self._replies
            )
        return choice

    def _logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """The token that ends a reply is no part of its content, nor of these."""
        if not self._body.logprobs:
            return None
        ends = self._replies.tickets.requests[choice].stop_ids
        content = [token_fields(t, self._replies) for t in tokens if t.id not in ends]
        return {"content": content, "refusal": None}

    # ---- streaming

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Every chunk but `[DONE]`: per choice a role, contents, calls, an end; then the usage."""
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        running = with_usage and bool(options and options.continuous_usage_stats)
        async with self._replies as replies:
            async for delta in replies:
                for choice in self._pieces(delta):
                    chunk = self._frame("chat.completion.chunk", [choice])
                    if with_usage:
                        chunk["usage"] = replies.usage.plain() if running else None
                    if "herdling" in choice:
                        chunk["herdling"] = choice.pop("herdling")
                    yield chunk
        if with_usage:
            usage = self._replies.usage.plain()
            yield {**self._frame("chat.completion.chunk", []), "usage": usage}

    def _pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """The choices of the chunks that a delta makes; none while text is held back."""
        choice = self._choices.setdefault(delta.choice, _Choice())
        choice.tokens += delta.tokens
        found = []
        if not choice.begun:
            choice.begun = True
            found.append(self._piece(delta, {"role": "assistant", "content": ""}))
        if delta.text or (self._experts and delta.tokens):
            found.append(self._piece(delta, {"content": delta.text}, choice))
        if delta.call is not None:
            fields = call_fields(delta.call)
            text = fields["function"].pop("arguments")
            fields["function"]["arguments"] = ""
            index = delta.call.index
            found.append(self._piece(delta, {"tool_calls": [{"index": index, **fields}]}))
            rest = {"index": index, "function": {"arguments": text}}
            found.append(self._piece(delta, {"tool_calls": [rest]}))
        if delta.finish is not None:
            found.append(self._piece(delta, {}, choice))
        return found

    def _piece(
        self, delta: Delta, fields: dict[str, Any], choice: _Choice | None = None
    ) -> dict[str, Any]:
        """One choice of a chunk; `choice` gives it the tokens that have waited."""
        tokens, logprobs = [], None
        if choice is not None:
            tokens, choice.tokens = choice.tokens, []
            logprobs = self._logprobs(delta.choice, tokens)
            if logprobs is not None and not logprobs["content"]:
                logprobs = None
        finish = delta.finish if not fields else None
        piece = {
            "index": delta.choice,
            "delta": fields,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if self._experts and finish is not None and delta.completion is not None:
            request = self._replies.tickets.requests[delta.choice]
            piece["herdling"] = by_token(request, delta.completion, self._replies)
        elif self._experts and tokens:
            token = tokens[-1]
            piece["herdling"] = {
                "token": token.id,
                "text": token.text,
                "logprob": finite(token.logprob),
                "top": [[id, finite(logprob)] for id, logprob in token.top],
                "experts": None,
                "previous_experts": token.previous_experts,
            }
        return piece
