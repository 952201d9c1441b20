"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them and lm-eval asks for them.

    curl -d '{"prompt": "Hello"}' localhost:8000/tokenize         # {"count", "max_model_len", "tokens"}

Here, unlike everywhere else, control tokens in a text are read as such: templates are applied by the
client and sent as text (lm-eval), and `eos_token` is looked up this way. `parse_special: false`
reads the text as a user's.
"""

import asyncio
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from herdling.serve import errors
from herdling.serve.dialects import bodies, documented, fields
from herdling.serve.openai_chat import read_message
from herdling.serve.service import Service

if TYPE_CHECKING:
    from herdling.inputs.tokenizer import Tokenizer

_TOKENIZE = {
    "prompt": "string",
    "messages": "array",
    "add_special_tokens": "boolean",
    "add_generation_prompt": "boolean",
    "parse_special": "boolean",
    "return_token_strs": "boolean",
}


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", openapi_extra=documented.body(_TOKENIZE))
    async def tokenize(request: Request) -> Response:
        body = await bodies.read(request)
        service.adapter(fields.get(body, "model", str))
        tok = service.need()[0].tokenizer
        if "messages" in body:
            ids = await _chat_ids(service, body)
        else:
            ids = await asyncio.to_thread(_text_ids, tok, body)
        strings = None
        if fields.get(body, "return_token_strs", bool):
            strings = [tok.decode([id], surrogates=False) for id in ids]
        count = {"count": len(ids), "max_model_len": service.context, "tokens": ids}
        return JSONResponse({**count, "token_strs": strings})

    @router.post("/detokenize", openapi_extra=documented.body({"tokens": "array"}, ["tokens"]))
    async def detokenize(request: Request) -> Response:
        body = await bodies.read(request)
        service.adapter(fields.get(body, "model", str))
        tok = service.need()[0].tokenizer
        given = fields.need(body, "tokens", list)
        ids = [fields.of(id, int, f"tokens[{i}]") for i, id in enumerate(given)]
        beyond = next((id for id in ids if not 0 <= id < len(tok)), None)
        if beyond is not None:
            raise errors.bad_request(
                f"token id {beyond} is outside the vocabulary, 0..{len(tok) - 1}", "tokens"
            )
        return JSONResponse({"prompt": tok.decode(ids, surrogates=False)})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return JSONResponse(info(service.need()[0].tokenizer, service.context))

    return router


def info(tok: "Tokenizer", context: int) -> dict[str, Any]:
    """What a saved model's `tokenizer_config.json` says, and the chat template."""
    from herdling.inputs import chat, special_tokens

    named = {
        "bos_token": special_tokens.BOS,
        "eos_token": special_tokens.END_OF_TEXT,
        "pad_token": special_tokens.PAD,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        **{k: tok.name(tok.special(v)) for k, v in named.items() if tok.has_special(v)},
        "clean_up_tokenization_spaces": False,
        "chat_template": chat.template(),
    }


def encode(tok: "Tokenizer", text: str) -> list[int]:
    """Ids of a text in which the names of control tokens stand for these."""
    specials = tok.specials
    longest_first = sorted(specials, key=len, reverse=True)
    ids: list[int] = []
    for i, part in enumerate(re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)):
        ids += [specials[part]] if i % 2 else tok.encode(part)
    return ids


def _text_ids(tok: "Tokenizer", body: Mapping[str, Any]) -> list[int]:
    text = fields.need(body, "prompt", str)
    start = [] if fields.get(body, "add_special_tokens", bool) is False else [tok.bos]
    plain = fields.get(body, "parse_special", bool) is False
    return start + (tok.encode(text) if plain else encode(tok, text))


async def _chat_ids(service: Service, body: Mapping[str, Any]) -> list[int]:
    given = fields.objects(fields.need(body, "messages", list), "messages")
    tools = fields.objects(fields.get(body, "tools", list) or [], "tools")
    prompt = await service.render([read_message(message) for message in given], tools)
    if fields.get(body, "add_generation_prompt", bool) is not False:
        return list(prompt.ids)
    lm = service.need()[0]
    opened = lm.render([]).ids  # begin_of_text and the header of a reply
    return list(prompt.ids[: len(prompt.ids) - len(opened) + 1])
