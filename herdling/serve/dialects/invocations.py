"""`/ping` and `/invocations`: what SageMaker and MLflow call a model by.

    {"messages": [...]}             as /v1/chat/completions
    {"prompt": ...}                 as /v1/completions
    {"input": ...}                  texts as /v1/embeddings, items as /v1/responses
    {"inputs": "...", "parameters": {...}}      as TGI: [{"generated_text": ...}]
    {"inputs": ...}, {"instances": ...}, {"dataframe_split": ...}, {"dataframe_records": ...}, text/csv
                                    as MLflow: {"predictions": [a text a row]}, settings in `params`

The first four are answered as those APIs do, streams too. Errors hold OpenAI's `error` and MLflow's
`error_code` and `message` side by side; another content type is 415.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve import errors, openai_chat, openai_completions
from herdling.serve.dialects import bodies, documented, embeddings, fields, frames, responses, tgi
from herdling.serve.dialects.memory import Memory
from herdling.serve.openai_chat import ChatBody
from herdling.serve.openai_completions import CompletionBody
from herdling.serve.protocol import Chat, Controls
from herdling.serve.service import Service
from herdling.serve.stream import until_gone

Row = str | list[dict[str, Any]]
_CODES = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    429: "REQUEST_LIMIT_EXCEEDED",
    503: "TEMPORARILY_UNAVAILABLE",
}


def routes(service: Service) -> APIRouter:
    """The endpoints; errors of /invocations fit both kinds of client."""
    errors.register("/invocations", shape)
    fields_of_errors = {"error": "object", "error_code": "string", "message": "string"}
    router = APIRouter(
        tags=["SageMaker and MLflow"], responses=documented.failures(fields_of_errors)
    )
    chat = openai_chat.routes(service).routes[0].endpoint  # pyright: ignore[reportAttributeAccessIssue]
    complete = openai_completions.routes(service).routes[0].endpoint  # pyright: ignore
    memory = Memory()

    @router.get("/ping", response_class=Response)
    async def ping() -> Response:
        """200 without a body when calls are answered, else 503."""
        return Response(status_code=200 if service.state()[0] == "ok" else 503)

    @router.post("/invocations", openapi_extra=documented.body(_BODY, stream="text/event-stream"))
    async def invocations(request: Request) -> Any:
        """Answer whichever body this is."""
        raw = await request.body()
        if content_type(request.headers.get("content-type", "application/json")) == "text/csv":
            return await _predict(service, request, frames.from_csv(_decoded(raw)), {})
        body = bodies.parse(raw)
        if not isinstance(body, dict):
            raise errors.bad_request("the body must be a JSON object")
        if "messages" in body:
            return await chat(fields.validated(ChatBody, body), request)
        if "prompt" in body:
            return await complete(fields.validated(CompletionBody, body), request)
        if "input" in body:
            if _is_items(body["input"]):
                return await responses.respond(service, memory, request, body)
            return JSONResponse(await until_gone(request, embeddings.answer(service, body)))
        if isinstance(body.get("inputs"), str) and "parameters" in body:
            return await tgi.either(service, request, body)
        params = fields.get(body, "params", dict) or {}
        return await _predict(service, request, frames.rows(body), params)

    return router


_BODY: dict[str, Any] = {
    "messages": "array",
    "prompt": {},
    "input": {},
    "inputs": {},
    "instances": {},
    "dataframe_split": "object",
    "dataframe_records": "array",
    "params": "object",
    "parameters": "object",
    "stream": "boolean",
}


def shape(error: errors.ApiError) -> dict[str, Any]:
    """An error's body, for clients of OpenAI's APIs and of MLflow at once."""
    other = "BAD_REQUEST" if error.status < 500 else "INTERNAL_ERROR"
    code = _CODES.get(error.status, other)
    return {**errors.openai(error), "error_code": code, "message": error.message}


def content_type(header: str) -> str:
    """application/json or text/csv, in UTF-8. Raises ApiError 415 for all else."""
    kind, *parameters = (part.strip().lower() for part in header.split(";"))
    if kind not in ("application/json", "text/csv"):
        raise errors.ApiError(
            415, f"Content-Type is {kind[:80]!r}; use application/json or text/csv"
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if parameter and (name != "charset" or value.strip('"') not in ("utf-8", "utf8")):
            raise errors.ApiError(415, f"Content-Type has {parameter[:80]!r}; only UTF-8 is read")
    return kind


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise errors.bad_request(f"the body is not UTF-8: {problem}") from None


def _is_items(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


async def _predict(
    service: Service, request: Request, rows: Sequence[Any], params: Mapping[str, Any]
) -> Response:
    """A text for each row: texts are continued, conversations answered. All rows at once."""
    read = [frames.read(row, i) for i, row in enumerate(rows)]
    most = service.limits.choices
    if len(read) > most:
        raise errors.bad_request(f"{len(read)} rows; at most {most} are allowed")
    controls = fields.validated(Controls, params)
    limit = next((fields.limit(params, n) for n in _LIMITS if params.get(n) is not None), None)
    options = controls.options(max_tokens=limit)

    async def one(row: Row) -> str:
        if isinstance(row, str):
            tok = service.need()[0].tokenizer
            ids = [tok.bos, *await asyncio.to_thread(tok.encode, row)]
            replies = await service.complete([ids], options, controls.model)
        else:
            messages = [openai_chat.read_message(message) for message in row]
            replies = await service.chat(Chat(messages, options=options, model=controls.model))
        async with replies:
            return (await replies.collect())[0].text

    async def every() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(row)) for row in read]
        return [task.result() for task in tasks]

    return JSONResponse({"predictions": await until_gone(request, _first_error(every()))})


_LIMITS = ("max_tokens", "max_new_tokens", "max_completion_tokens")


async def _first_error(work: Any) -> Any:
    """What a group of tasks gives, or the first thing that went wrong in it."""
    try:
        return await work
    except* Exception as group:
        problem: BaseException = group
        while isinstance(problem, BaseExceptionGroup):
            problem = problem.exceptions[0]
        raise problem from None
