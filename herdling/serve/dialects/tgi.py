"""`/generate`, `/generate_stream` and `/info`: the API of Text Generation Inference, which is archived.

    InferenceClient("http://localhost:8000").text_generation("def add(", max_new_tokens=20)

That client posts to `/`, where `stream` chooses between the two. A text is continued as it is. Errors
are `{"error", "error_type"}` with TGI's own statuses (422 for what cannot be taken). Left out:
`best_of` and `watermark`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve import errors, stream
from herdling.serve.dialects import bodies, documented, fields
from herdling.serve.openai_chat import finite
from herdling.serve.protocol import Delta, FinishReason, Format, Options, Reply, Token
from herdling.serve.replies import Replies
from herdling.serve.service import Service
from herdling.serve.stream import EventStream, until_gone

if TYPE_CHECKING:
    from herdling.infer.request import Completion

Body = Mapping[str, Any]
Object = dict[str, Any]
_SSE = "text/event-stream"
_DEFAULTS = Options(temperature=1.0, top_p=1.0, max_tokens=100)
_SAMPLED = ("temperature", "top_k", "top_p", "typical_p")
_SETTINGS = (*_SAMPLED, "repetition_penalty", "frequency_penalty", "seed")
# TGI's statuses and words: what is wrong with a request is 422 there, a failure while writing is 424.
_STATUSES = {400: 422, 404: 422, 413: 413, 500: 424, 503: 503}
_KINDS = {
    422: "validation",
    413: "validation",
    429: "overloaded",
    503: "overloaded",
    424: "generation",
}


def routes(service: Service) -> APIRouter:
    """The endpoints; errors on their paths take TGI's shape."""
    errors.register("/generate", shape)
    said = documented.failures({"error": "string", "error_type": "string"})
    router = APIRouter(tags=["Text Generation Inference"], responses=said)

    known = {"inputs": "string", "parameters": "object"}
    document = documented.body(known, ["inputs"])
    streamed = documented.body(known, ["inputs"], _SSE)

    @router.post("/generate", openapi_extra=document)
    async def generate(request: Request) -> Response:
        return await _told(request, lambda body: _whole(service, request, body))

    @router.post("/generate_stream", openapi_extra=streamed)
    async def generate_stream(request: Request) -> Response:
        return await _told(request, lambda body: _stream(service, request, body))

    @router.post("/", include_in_schema=False)  # the page is there too
    async def root(request: Request) -> Response:
        return await _told(request, lambda body: either(service, request, body))

    @router.get("/info")
    async def info() -> Response:
        return JSONResponse(describe(service))

    return router


def shape(error: errors.ApiError) -> Object:
    """An error's body."""
    status = _STATUSES.get(error.status, error.status)
    return {"error": error.message, "error_type": _KINDS.get(status, error.type)}


async def _told(request: Request, answer: Callable[[Body], Awaitable[Response]]) -> Response:
    """The answer, or an error with TGI's status."""
    try:
        return await answer(await bodies.read(request))
    except stream.Gone:
        raise
    except Exception as problem:
        error = stream.told(problem)
        status = _STATUSES.get(error.status, error.status)
        return JSONResponse(shape(error), status, error.headers)


async def either(service: Service, request: Request, body: Body) -> Response:
    """A stream if the body asks for one, else the reply, in a list. Raises ApiError."""
    if fields.get(body, "stream", bool):
        return await _stream(service, request, body)
    return await _whole(service, request, body, as_list=True)


async def _whole(service: Service, request: Request, body: Body, as_list: bool = False) -> Response:
    async def work() -> Object:
        async with await ask(service, body) as replies:
            reply = (await replies.collect())[0]
        return write(body, reply, replies)

    answer = await until_gone(request, work())
    return JSONResponse([answer] if as_list else answer)


async def _stream(service: Service, request: Request, body: Body) -> Response:
    if _parameters(body).get("decoder_input_details"):
        raise errors.bad_request("decoder_input_details does not go with a stream")
    return EventStream(_events(body, await ask(service, body)), request)


# ---- in


async def ask(service: Service, body: Body) -> Replies:
    """Put the call into the engine. Raises ApiError or Error."""
    lm, _ = service.need()
    text, parameters = fields.need(body, "inputs", str), _parameters(body)
    ids = [lm.tokenizer.bos, *await asyncio.to_thread(lm.tokenizer.encode, text)]
    keep = fields.limit(parameters, "truncate")
    model = fields.get(parameters, "adapter_id", str)
    return await service.complete(
        [ids if keep is None else ids[-keep:]],
        options(parameters),
        model,
        _format(fields.get(parameters, "grammar", dict)),
        _DEFAULTS,
    )


def options(parameters: Body) -> Options:
    """TGI's parameters as `Options`: without `do_sample` or anything to sample by, greedy."""
    if (fields.get(parameters, "best_of", int) or 1) != 1:
        raise errors.bad_request("best_of is not supported; leave it at 1", "best_of")
    if fields.get(parameters, "watermark", bool):
        raise errors.bad_request("watermark is not supported", "watermark")
    given = fields.copied(parameters, *_SETTINGS)
    stops = fields.texts(parameters.get("stop") or parameters.get("stop_sequences") or [], "stop")
    sampled = fields.get(parameters, "do_sample", bool) or any(name in given for name in _SAMPLED)
    start = {} if sampled else {"temperature": 0.0}
    return fields.options(
        {**start, **given, "stop": stops},
        max_tokens=fields.limit(parameters, "max_new_tokens"),
        top_logprobs=fields.top_logprobs(parameters, "top_n_tokens"),
        prompt_logprobs=0 if fields.get(parameters, "decoder_input_details", bool) else None,
    )


def _parameters(body: Body) -> Object:
    return fields.get(body, "parameters", dict) or {}


def _format(grammar: Body | None) -> Format:
    if grammar is None:
        return Format()
    kind, value = grammar.get("type"), grammar.get("value")
    if kind == "regex":
        return Format("regex", fields.of(value, str, "grammar.value"))
    if kind not in ("json", "json_schema"):
        raise errors.bad_request("grammar.type must be json, json_schema or regex", "grammar")
    if isinstance(value, str):
        value = bodies.parse(value.encode())
    elif kind == "json_schema" and isinstance(value, Mapping):
        value = value.get("schema", value)
    return fields.schema_format(value, "grammar.value")


# ---- out


def write(body: Body, reply: Reply, replies: Replies) -> Object:
    """A whole reply, with details where they are asked for."""
    parameters, completion = _parameters(body), reply.completion
    out: Object = {"generated_text": _text(body, reply.text)}
    if not (parameters.get("details") or parameters.get("decoder_input_details")):
        return out
    request = replies.tickets.requests[0]
    prefill = []
    for id, scored in zip(request.ids, completion.prompt or (), strict=False):
        logprob = None if scored is None else finite(scored.logprob)
        text = replies.tokenizer.decode([id], surrogates=False)
        prefill.append({"id": id, "text": text, "logprob": logprob})
    out["details"] = {
        **_ending(completion, replies, reply.finish),
        "prefill": prefill,
        "tokens": [_token(token, replies) for token in reply.tokens],
    }
    if parameters.get("top_n_tokens"):
        out["details"]["top_tokens"] = [_top(token, replies) for token in reply.tokens]
    return out


async def _events(body: Body, replies: Replies) -> AsyncIterator[str]:
    """One event a token. Each waits for the next, since the last one carries the whole text."""
    held: Object | None = None
    index, texts = 0, []
    try:
        async with replies:
            async for delta in replies:
                texts.append(delta.text)
                for event in _tokens(body, delta, replies):
                    if held is not None:
                        yield stream.event(held)
                    index += 1
                    held = {"index": index, **event, "generated_text": None, "details": None}
                if delta.completion is not None:
                    held = held or {"index": 0, "token": _nothing(replies)}
                    held["generated_text"] = _text(body, "".join(texts))
                    length = len(replies.tickets.requests[0].ids)
                    held["details"] = {
                        **_ending(delta.completion, replies, delta.finish),
                        "input_length": length,
                    }
        if held is not None:
            yield stream.event(held)
    except Exception as problem:
        yield stream.event(shape(stream.told(problem)))


def _tokens(body: Body, delta: Delta, replies: Replies) -> list[Object]:
    """The events of a delta. Its text goes with the last: what is certain, not each token's bytes."""
    events = []
    for token in delta.tokens:
        event: Object = {"token": {**_token(token, replies), "text": ""}}
        if _parameters(body).get("top_n_tokens"):
            event["top_tokens"] = _top(token, replies)
        events.append(event)
    if events:
        events[-1]["token"]["text"] = delta.text
    return events


def _text(body: Body, reply: str) -> str:
    return (body["inputs"] if _parameters(body).get("return_full_text") else "") + reply


def _token(token: Token, replies: Replies) -> Object:
    special = token.id in replies.tokenizer.specials.values()
    logprob = finite(token.logprob)
    return {"id": token.id, "text": token.text, "logprob": logprob, "special": special}


def _nothing(replies: Replies) -> Object:
    """The token of a reply that has none, cut before its first."""
    return {"id": replies.tokenizer.eot, "text": "", "logprob": 0.0, "special": True}


def _top(token: Token, replies: Replies) -> list[Object]:
    return [_token(replies.token(id, logprob, []), replies) for id, logprob in token.top]


def _ending(completion: "Completion", replies: Replies, finish: FinishReason | None) -> Object:
    request = replies.tickets.requests[0]
    reason = "length"
    if completion.finish_reason == "stop":
        ended = completion.ids and completion.ids[-1] in request.stop_ids
        reason = "eos_token" if ended else "stop_sequence"
    if finish == "content_filter":
        reason = finish
    return {
        "finish_reason": reason,
        "generated_tokens": len(completion.ids),
        "seed": request.seed,
    }


def describe(service: Service) -> Object:
    """The reply of /info."""
    lm, _ = service.need()
    limits = service.limits
    return {
        "model_id": service.settings.name,
        "model_sha": None,
        "model_dtype": str(next(lm.model.parameters()).dtype),
        "model_device_type": lm.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": limits.queue,
        "max_best_of": 1,
        "max_stop_sequences": limits.stops,
        "max_input_tokens": min(service.context, limits.prompt_tokens or service.context) - 1,
        "max_total_tokens": service.context,
        "max_client_batch_size": 1,
        "validation_workers": 1,
        "router": "herdling",
        "version": version("herdling"),
        "sha": None,
        "docker_label": None,
    }
