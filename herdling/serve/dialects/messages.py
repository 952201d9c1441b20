"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API.

    ANTHROPIC_BASE_URL=http://localhost:8000 ANTHROPIC_API_KEY=any claude

`system`, text and picture blocks, tools with their calls and results, stop sequences, streams. A last
message of the assistant's is the beginning of the reply, which goes on from there (without tools).
Left out: thinking, citations, prompt caching on demand (prefixes are reused anyway), files, batches.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve import errors
from herdling.serve.dialects import bodies, documented, fields, messages_in, messages_out
from herdling.serve.dialects.framing import named
from herdling.serve.dialects.messages_out import Event, Writer
from herdling.serve.protocol import Chat
from herdling.serve.replies import Replies
from herdling.serve.service import CHAT_DEFAULTS, Service
from herdling.serve.stream import EventStream, until_gone

if TYPE_CHECKING:
    from herdling.infer.request import Completion
    from herdling.infer.request import Request as EngineRequest
    from herdling.inputs.chat import Rendered
    from herdling.inputs.tokenizer import Tokenizer

_BODY = {
    "model": "string",
    "messages": "array",
    "max_tokens": "integer",
    "system": {},
    "stop_sequences": "array",
    "stream": "boolean",
    "tools": "array",
    "tool_choice": "object",
}
_REQUIRED = ["messages", "max_tokens"]


def routes(service: Service) -> APIRouter:
    """The endpoints; errors on their paths take Anthropic's shape."""
    errors.register("/v1/messages", messages_out.shape)
    said = documented.failures({"type": {"const": "error"}, "error": "object"})
    router = APIRouter(tags=["Anthropic messages"], responses=said)

    @router.post(
        "/v1/messages", openapi_extra=documented.body(_BODY, _REQUIRED, "text/event-stream")
    )
    async def create(request: Request) -> Response:
        body = await bodies.read(request)
        chat = messages_in.chat(body)
        if fields.get(body, "stream", bool):
            writer, replies = await _begin(service, chat)
            events = _events(writer, replies)
            return EventStream(named(events, messages_out.shape, ping=True), request)

        async def whole() -> dict[str, Any]:
            writer, replies = await _begin(service, chat)
            async for _ in _events(writer, replies):
                pass
            return writer.message

        return JSONResponse(await until_gone(request, whole()))

    @router.post("/v1/messages/count_tokens", openapi_extra=documented.body(_BODY, ["messages"]))
    async def count_tokens(request: Request) -> Response:
        chat = messages_in.chat(await bodies.read(request), counting=True)
        service.adapter(chat.model)
        prompt = await _prompt(service, chat)
        return JSONResponse({"input_tokens": len(prompt.ids)})

    return router


async def _begin(service: Service, chat: Chat) -> tuple[Writer, Replies]:
    """Put the call into the engine. Raises ApiError."""
    if messages_in.begun(chat)[1]:
        prompt = await _prompt(service, chat)
        replies = await service.complete(
            [prompt], chat.options, chat.model, chat.format, CHAT_DEFAULTS, [chat.messages]
        )
    else:
        replies = await service.chat(chat)
    model = chat.model or service.settings.name
    prompt_tokens = replies.usage.prompt_tokens
    return Writer(id=f"msg_{uuid.uuid4().hex}", model=model, prompt_tokens=prompt_tokens), replies


async def _prompt(service: Service, chat: Chat) -> "Rendered":
    """The ids of a conversation, and of the words that begin the reply."""
    messages, text = messages_in.begun(chat)
    prompt = await service.render(messages, [] if chat.tool_choice == "none" else chat.tools)
    more = await asyncio.to_thread(service.need()[0].tokenizer.encode, text)
    return replace(prompt, ids=prompt.ids + more, loss_mask=prompt.loss_mask + [True] * len(more))


async def _events(writer: Writer, replies: Replies) -> AsyncIterator[Event]:
    found: str | None = None
    async with replies:
        for event in writer.begin():
            yield event
        async for delta in replies:
            if delta.completion is not None:
                request = replies.tickets.requests[delta.choice]
                found = stop_sequence(delta.completion, request, replies.tokenizer)
            for event in writer.take(delta):
                yield event
        for event in writer.end(replies.usage, found):
            yield event


def stop_sequence(
    completion: "Completion", request: "EngineRequest", tok: "Tokenizer"
) -> str | None:
    """The stop string that ended a reply, if one did: its tokens are there, its text is not."""
    ids, stops = completion.ids, request.stop
    if completion.finish_reason != "stop" or not stops or not ids or ids[-1] in request.stop_ids:
        return None
    rest = tok.decode(ids, surrogates=False)[len(completion.text) :]
    return next((stop for stop in stops if rest.startswith(stop)), None)
