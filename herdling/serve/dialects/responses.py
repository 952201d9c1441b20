"""`/v1/responses`: OpenAI's Responses API.

    POST   /v1/responses          a reply, whole or as a stream of named events
    GET    /v1/responses/{id}     a stored one
    DELETE /v1/responses/{id}

As with OpenAI, a response is stored unless `store` is false, so that `previous_response_id` goes on
with its conversation: see `memory` for how long. Left out: hosted tools, `background`, and streams
that are taken up again.
"""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve.dialects import bodies, documented, fields, responses_in
from herdling.serve.dialects.framing import named
from herdling.serve.dialects.memory import Memory
from herdling.serve.dialects.responses_out import Event, Writer, message_of
from herdling.serve.protocol import Chat
from herdling.serve.replies import Replies
from herdling.serve.service import CHAT_DEFAULTS, Service
from herdling.serve.stream import EventStream, until_gone

_BODY = {
    "model": "string",
    "input": {},
    "instructions": "string",
    "max_output_tokens": "integer",
    "previous_response_id": "string",
    "store": "boolean",
    "stream": "boolean",
    "text": "object",
    "tools": "array",
    "tool_choice": {},
}
_LOGPROBS = "message.output_text.logprobs"


def routes(service: Service) -> APIRouter:
    """The endpoints, with a memory of their own."""
    router, memory = APIRouter(tags=["OpenAI responses"]), Memory()

    @router.post(
        "/v1/responses", openapi_extra=documented.body(_BODY, ["input"], "text/event-stream")
    )
    async def create(request: Request) -> Response:
        return await respond(service, memory, request, await bodies.read(request))

    @router.get("/v1/responses/{id}")
    async def retrieve(id: str) -> Response:
        return JSONResponse(memory.find(id)[0])

    @router.delete("/v1/responses/{id}")
    async def delete(id: str) -> Response:
        memory.find(id)
        memory.forget(id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    return router


async def respond(
    service: Service, memory: Memory, request: Request, body: dict[str, Any]
) -> Response:
    """The answer to a body. Raises ApiError."""
    before = fields.get(body, "previous_response_id", str)
    earlier = memory.find(before)[1] if before else []
    chat = responses_in.chat(body, earlier)
    stream = fields.get(body, "stream", bool)
    store = fields.get(body, "store", bool) is not False

    def keep(response: dict[str, Any]) -> None:
        start = 1 if body.get("instructions") else 0  # which are not carried over
        if store:
            memory.keep(response, [*chat.messages[start:], message_of(response)])

    async def whole() -> dict[str, Any]:
        writer, replies = _writer(service, body, chat), await service.chat(chat)
        async for _ in _events(writer, replies):
            pass
        keep(writer.response)
        return writer.response

    if not stream:
        return JSONResponse(await until_gone(request, whole()))
    writer, replies = _writer(service, body, chat), await service.chat(chat)

    async def events() -> AsyncIterator[Event]:
        async for event in _events(writer, replies):
            if event["type"] in ("response.completed", "response.incomplete"):
                keep(writer.response)
            yield event

    return EventStream(named(events(), writer.fail), request)


async def _events(writer: Writer, replies: Replies) -> AsyncIterator[Event]:
    async with replies:
        for event in writer.begin():
            yield event
        async for delta in replies:
            for event in writer.take(delta):
                yield event
        for event in writer.end(replies.usage):
            yield event


def _writer(service: Service, body: dict[str, Any], chat: Chat) -> Writer:
    lm, _ = service.need()
    options = chat.options
    told = options.top_logprobs > 0 or _LOGPROBS in (fields.get(body, "include", list) or [])
    tok = lm.tokenizer
    return Writer(
        body,
        id=f"resp_{uuid.uuid4().hex}",
        model=chat.model or service.settings.name,
        created=int(time.time()),
        temperature=CHAT_DEFAULTS.temperature
        if options.temperature is None
        else options.temperature,
        top_p=CHAT_DEFAULTS.top_p if options.top_p is None else options.top_p,
        tokenizer=tok if told else None,
        silent=frozenset(tok.stop_ids),
    )
