"""`/api/...`: Ollama's API, with replies as lines of JSON unless `stream` is false.

    OLLAMA_HOST=http://localhost:8000 python -c "import ollama; print(ollama.list())"

`/api/chat`, `/api/generate`, `/api/embed` (and the older `/api/embeddings`), and what clients ask
about models. The model is always loaded, so `keep_alive` has no effect, and a call without messages
or prompt is answered at once. Left out: pulling, creating and deleting models, `suffix`, `template`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve import errors
from herdling.serve.dialects import (
    bodies,
    documented,
    embeddings,
    fields,
    ollama_in,
    ollama_models,
    ollama_out,
)
from herdling.serve.dialects.ollama_out import Writer
from herdling.serve.protocol import Chat, Token
from herdling.serve.replies import Replies
from herdling.serve.service import CHAT_DEFAULTS, COMPLETION_DEFAULTS, Service
from herdling.serve.stream import EventStream, ndjson, until_gone

Body = Mapping[str, Any]
Object = dict[str, Any]
_NDJSON = "application/x-ndjson"
_COMMON = {"model": "string", "stream": "boolean", "options": "object", "format": {}}
_CHAT = {**_COMMON, "messages": "array", "tools": "array"}
_GENERATE = {**_COMMON, "prompt": "string", "system": "string", "images": "array", "raw": "boolean"}
_EMBED = {"model": "string", "input": {}, "truncate": "boolean", "dimensions": "integer"}
_EMBED_ONE = {"model": "string", "prompt": "string"}


def routes(service: Service) -> APIRouter:
    """The endpoints; errors on their paths take Ollama's shape."""
    errors.register("/api/", ollama_out.shape)
    router = APIRouter(tags=["Ollama"], responses=documented.failures({"error": "string"}))
    ollama_models.add_routes(router, service)

    @router.post("/api/chat", openapi_extra=documented.body(_CHAT, ["model"], _NDJSON))
    async def chat(request: Request) -> Response:
        body = await bodies.read(request)
        asked = ollama_in.chat(body)
        writer = _writer(service, body, ollama_out.chat_field)
        if not asked.messages:
            return _loaded(service, body, writer)
        return await _answer(request, body, writer, lambda: service.chat(asked))

    @router.post("/api/generate", openapi_extra=documented.body(_GENERATE, ["model"], _NDJSON))
    async def generate(request: Request) -> Response:
        body = await bodies.read(request)
        _refuse(body)
        writer = _writer(service, body, ollama_out.generate_field)
        if not fields.get(body, "prompt", str):
            return _loaded(service, body, writer)
        return await _answer(request, body, writer, lambda: _complete(service, body))

    @router.post("/api/embed", openapi_extra=documented.body(_EMBED, ["model", "input"]))
    async def embed(request: Request) -> Response:
        body = await bodies.read(request)
        vectors = _embed(service, body, fields.texts(body.get("input"), "input"))
        return JSONResponse(await until_gone(request, vectors))

    @router.post("/api/embeddings", openapi_extra=documented.body(_EMBED_ONE, ["model", "prompt"]))
    async def embed_one(request: Request) -> Response:
        body = await bodies.read(request)
        vectors = _embed(service, body, [fields.need(body, "prompt", str)])
        return JSONResponse({"embedding": (await until_gone(request, vectors))["embeddings"][0]})

    return router


async def _answer(
    request: Request, body: Body, writer: Writer, ask: Callable[[], Awaitable[Replies]]
) -> Response:
    if fields.get(body, "stream", bool) is not False:
        lines = ndjson(_objects(writer, await ask()), request.url.path)
        return EventStream(lines, request, _NDJSON)

    async def whole() -> Object:
        async with await ask() as replies:
            reply = (await replies.collect())[0]
        tokens = _content(reply.tokens, replies)
        return writer.end(reply, replies, reply.text, reply.calls, tokens)

    return JSONResponse(await until_gone(request, whole()))


async def _objects(writer: Writer, replies: Replies) -> AsyncIterator[Object]:
    """Each piece of text and each call as an object, and the counts."""
    waiting: list[Token] = []
    async with replies:
        async for delta in replies:
            waiting += _content(delta.tokens, replies)
            if delta.text or delta.call is not None:
                calls = [] if delta.call is None else [delta.call]
                yield writer.piece(delta.text, calls, waiting)
                waiting = []
            if delta.finish is not None:
                yield writer.end(delta, replies, tokens=waiting)


def _content(tokens: Sequence[Token], replies: Replies) -> list[Token]:
    """Without the token that ends the reply."""
    ends = replies.tickets.requests[0].stop_ids
    return [token for token in tokens if token.id not in ends]


def _writer(service: Service, body: Body, field: ollama_out.Field) -> Writer:
    lm, _ = service.need()
    told = fields.get(body, "logprobs", bool)
    name = fields.get(body, "model", str) or service.settings.name
    return Writer(name, field, lm.tokenizer if told else None)


def _loaded(service: Service, body: Body, writer: Writer) -> Response:
    """To a call that only wants the model in memory (or out of it): it is, and stays."""
    service.adapter(ollama_in.model_name(body))
    reason = "unload" if body.get("keep_alive") == 0 else "load"
    return JSONResponse({**writer.piece(""), "done": True, "done_reason": reason})


# ---- /api/generate


def _refuse(body: Body) -> None:
    for name in ("suffix", "template"):
        if fields.get(body, name, str):
            raise errors.bad_request(f"{name} is not supported; send messages to /api/chat", name)
    if fields.get(body, "raw", bool) and (body.get("images") or body.get("system")):
        raise errors.bad_request("raw is text alone; it goes with no images and no system", "raw")


async def _complete(service: Service, body: Body) -> Replies:
    """A raw prompt is continued; any other is a conversation, which `context` begins."""
    lm, _ = service.need()
    chat = ollama_in.generate(body)
    if fields.get(body, "raw", bool):
        prompt = fields.need(body, "prompt", str)
        ids = [lm.tokenizer.bos, *await asyncio.to_thread(lm.tokenizer.encode, prompt)]
        defaults = replace(COMPLETION_DEFAULTS, max_tokens=service.limits.default_max_tokens)
        return await service.complete([ids], chat.options, chat.model, chat.format, defaults)
    given = fields.get(body, "context", list) or []
    if not given:
        return await service.chat(chat)
    earlier = [fields.of(id, int, f"context[{i}]") for i, id in enumerate(given)]
    return await _go_on(service, chat, earlier)


async def _go_on(service: Service, chat: Chat, earlier: list[int]) -> Replies:
    lm, _ = service.need()
    if lm.tokenizer.patch in earlier:
        raise errors.bad_request("context holds a picture; send messages to /api/chat", "context")
    prompt = await service.render(chat.messages)
    ids = earlier + prompt.ids[1:]  # which begins with begin_of_text, as the context does
    longer = replace(prompt, ids=ids, loss_mask=[False] * len(ids))
    defaults = replace(CHAT_DEFAULTS, max_tokens=service.limits.default_max_tokens)
    return await service.complete([longer], chat.options, chat.model, chat.format, defaults)


# ---- embeddings


async def _embed(service: Service, body: Body, given: list[str]) -> Object:
    """Texts beyond the model's context are cut to it, unless `truncate` is false."""
    began = time.monotonic_ns()
    lm, _ = service.need()
    embeddings.refuse_adapter(service, ollama_in.model_name(body))
    longest = service.context if fields.get(body, "truncate", bool) is not False else None

    def read() -> list[list[int]]:
        texts = [[lm.tokenizer.bos, *lm.tokenizer.encode(text)][:longest] for text in given]
        return embeddings.read_input(service, texts)

    texts = await asyncio.to_thread(read) if given else []
    vectors = await embeddings.embed(service, texts, fields.get(body, "dimensions", int))
    return {
        "model": body.get("model"),
        "embeddings": [vector.tolist() for vector in vectors],
        "total_duration": time.monotonic_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": sum(map(len, texts)),
    }
