"""`/v1/embeddings`: texts as vectors, in OpenAI's shape.

The vectors are the mean of the model's last hidden states (`herdling.infer.embed`). They are computed
in the engine's thread, a piece of text between two steps, so that replies go on meanwhile. `dimensions`
keeps the first so many numbers and brings the vector back to length 1. Left out: pictures, adapters.
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve import errors
from herdling.serve.dialects import bodies, documented, fields
from herdling.serve.service import Service
from herdling.serve.stream import until_gone

if TYPE_CHECKING:
    from torch import Tensor

MOST_INPUTS = 2048
_BODY = {"model": "string", "input": {}, "encoding_format": "string", "dimensions": "integer"}


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/embeddings", openapi_extra=documented.body(_BODY, ["input"]))
    async def create(request: Request) -> Response:
        body = await bodies.read(request)
        return JSONResponse(await until_gone(request, answer(service, body)))

    return router


async def answer(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """The whole reply to a body. Raises ApiError."""
    model = fields.get(body, "model", str)
    refuse_adapter(service, model)
    as_text = fields.get(body, "encoding_format", str) or "float"
    if as_text not in ("float", "base64"):
        raise errors.bad_request(
            f"encoding_format is {fields.brief(as_text)}; use float or base64", "encoding_format"
        )
    texts = await asyncio.to_thread(read_input, service, body.get("input"))
    vectors = await embed(service, texts, fields.get(body, "dimensions", int))
    tokens = sum(len(ids) for ids in texts)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _written(vector, as_text)}
            for i, vector in enumerate(vectors)
        ],
        "model": model or service.settings.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def read_input(service: Service, given: Any) -> list[list[int]]:
    """A string, token ids, or a list of either, as texts of ids. Raises ApiError."""
    tok = service.need()[0].tokenizer
    is_list = isinstance(given, list)
    if isinstance(given, str) or (is_list and given and _is_id(given[0])):
        given, is_list = [given], True
    if not is_list or not given:
        raise errors.bad_request(
            "input must be a string, token ids, or a list of these that is not empty", "input"
        )
    if len(given) > MOST_INPUTS:
        raise errors.bad_request(f"{len(given)} inputs; at most {MOST_INPUTS} are allowed", "input")
    texts = []
    for i, text in enumerate(given):
        if not isinstance(text, str | list) or not text:
            raise errors.bad_request(
                f"input[{i}] must be a text or token ids, and not empty", "input"
            )
        if isinstance(text, str):
            ids = [tok.bos, *tok.encode(text)]
        else:
            ids = [fields.of(id, int, f"input[{i}][{j}]") for j, id in enumerate(text)]
        longest = min(service.context, service.limits.prompt_tokens or service.context)
        if len(ids) > longest:
            raise errors.bad_request(
                f"input[{i}] has {len(ids)} tokens; at most {longest} can be read: shorten it",
                "input",
                "context_length_exceeded",
            )
        texts.append(ids)
    return texts


async def embed(
    service: Service, texts: Sequence[Sequence[int]], dimensions: int | None = None
) -> "list[Tensor]":
    """The vector of each text, computed between the steps of the engine. Raises ApiError or Error."""
    from herdling.infer.embed import reading, shortened

    lm, worker = service.need()
    vectors = []
    for ids in texts:
        pieces = reading(lm.model, ids, lm.tokenizer.bos)
        vector = last = await worker.call(lambda pieces=pieces: next(pieces))
        while last is not None:
            vector = last
            last = await worker.call(lambda pieces=pieces: next(pieces, None))
        vectors.append(vector if dimensions is None else shortened(vector, dimensions))
    return vectors


def refuse_adapter(service: Service, model: str | None) -> None:
    """Raise ApiError for a model that is unknown (404) or an adapter (400)."""
    if service.adapter(model) is not None:
        raise errors.bad_request(
            f"{model!r} is an adapter; embeddings come from {service.settings.name!r} itself",
            "model",
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _written(vector: "Tensor", as_text: str) -> list[float] | str:
    """As numbers, or as little-endian float32 in base64, which the Python client asks for."""
    if as_text == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
