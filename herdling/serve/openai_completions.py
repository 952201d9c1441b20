"""`POST /v1/completions`: text or token ids in, the continuation out, log-probs of both.

This is what lm-eval measures through (`prompt: [[ids], ...], echo, logprobs, max_tokens: 1`), so
with `logprobs` every sampled token is listed, the stop token too. A text prompt gets begin_of_text
before it unless `add_special_tokens` is false; token ids are taken as they are. Token texts that are no
characters by themselves are written `bytes:\\xe2\\x82`, as OpenAI does.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import Field

from herdling.serve.errors import bad_request
from herdling.serve.openai_chat import finite, read_format
from herdling.serve.protocol import Controls, Delta, Options, Reply
from herdling.serve.replies import Replies
from herdling.serve.stream import EventStream, sse, until_gone

if TYPE_CHECKING:
    from herdling.infer.request import Alternatives, PromptToken
    from herdling.inputs.tokenizer import Tokenizer
    from herdling.serve.service import Service


class CompletionBody(Controls):
    """Prompts, and how to go on from them."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None
    add_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids, and the text that `echo` repeats."""

    ids: list[int]
    text: str
    hidden: int
    """Leading ids that are no part of the text."""


def routes(service: "Service") -> APIRouter:
    """The route, answering from `service`."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["OpenAI"])
    async def completions(body: CompletionBody, request: Request) -> Any:
        """Continue texts."""
        lm, _ = service.need()
        check(body)
        prompts = await asyncio.to_thread(read_prompts, body, lm.tokenizer)
        options = read_options(body)
        ids = [prompt.ids for prompt in prompts]
        format = read_format(body.response_format)
        replies = await service.complete(ids, options, body.model, format)
        answer = _Answer(body, prompts, options.n, replies, body.model or service.settings.name)
        if body.stream:
            return EventStream(sse(answer.chunks()), request)
        return await until_gone(request, answer.whole())

    return router


def check(body: CompletionBody) -> None:
    """Raise ApiError 400 for fields that do not go together or are not offered."""
    if body.suffix:
        raise bad_request("suffix is not supported: the model writes only forwards", "suffix")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise bad_request("best_of must be at least n", "best_of")
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise bad_request(
            "best_of beyond n cannot be streamed: the best is known at the end", "best_of"
        )
    if body.stream and body.echo and body.logprobs is not None:
        raise bad_request("echo with logprobs cannot be streamed", "echo")
    if body.prompt == []:
        raise bad_request("prompt is an empty list", "prompt")


def read_options(body: CompletionBody) -> Options:
    """`best_of` replies are made where it is given, and the best n of them kept."""
    count = body.best_of or body.n or 1
    wanted = body.model_copy(update={"n": count})
    echoed = body.logprobs if body.echo else None
    return wanted.options(
        max_tokens=body.max_tokens, top_logprobs=body.logprobs or 0, prompt_logprobs=echoed
    )


def read_prompts(body: CompletionBody, tokenizer: "Tokenizer") -> list[Prompt]:
    """The prompts one by one, whichever of the four forms they came in."""
    given = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]  # pyright: ignore[reportAssignmentType]
    found = []
    for prompt in given:
        if isinstance(prompt, str):
            start = [] if body.add_special_tokens is False else [tokenizer.bos]
            found.append(Prompt([*start, *tokenizer.encode(prompt)], prompt, len(start)))
        else:
            ids = list(prompt)  # pyright: ignore[reportArgumentType]
            found.append(Prompt(ids, tokenizer.decode(ids, surrogates=False), 0))
    for i, prompt in enumerate(found):
        if not prompt.ids:
            raise bad_request(f"prompt {i} has no tokens", "prompt")
        if not 0 <= min(prompt.ids) <= max(prompt.ids) < len(tokenizer):
            raise bad_request(
                f"prompt {i} has a token id outside the vocabulary, 0 to {len(tokenizer) - 1}",
                "prompt",
            )
    return found


class _Answer:
    """One answer, as a whole or in chunks. Choices are numbered prompt by prompt."""

    def __init__(
        self, body: CompletionBody, prompts: list[Prompt], made: int, replies: Replies, model: str
    ) -> None:
        self._body, self._prompts, self._made, self._replies = body, prompts, made, replies
        self._id, self._created, self._model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    async def whole(self) -> dict[str, Any]:
        async with self._replies as replies:
            made = await replies.collect()
        choices = []
        kept = self._body.n or 1
        for p, prompt in enumerate(self._prompts):
            own = made[p * self._made : (p + 1) * self._made]
            if self._made > kept:
                own = sorted(own, key=_mean_logprob, reverse=True)[:kept]
            for reply in own:
                choices.append(self._choice(len(choices), prompt, reply))
        return {**self._frame(choices), "usage": self._replies.usage.plain()}

    def _choice(self, index: int, prompt: Prompt, reply: Reply) -> dict[str, Any]:
        echo = prompt.text if self._body.echo else ""
        logprobs = None
        if self._body.logprobs is not None:
            table = _Table(self._replies.tokenizer)
            if self._body.echo:
                table.prompt(prompt, reply.completion.prompt or [])
            for token in reply.tokens:
                table.add(token.id, token.logprob, token.top)
            logprobs = table.plain()
        return {
            "index": index,
            "text": echo + reply.text,
            "logprobs": logprobs,
            "finish_reason": reply.finish,
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Every chunk but `[DONE]`; with `include_usage` the usage comes in one of its own."""
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        running = with_usage and bool(options and options.continuous_usage_stats)
        tables: dict[int, _Table] = {}
        async with self._replies as replies:
            if self._body.echo:
                for index in range(len(self._prompts) * self._made):
                    prompt = self._prompts[index // self._made]
                    yield self._chunk({"index": index, "text": prompt.text}, with_usage)
            async for delta in replies:
                table = tables.get(delta.choice)
                if table is None:
                    table = tables[delta.choice] = _Table(replies.tokenizer)
                    if self._body.echo:
                        table.offset = len(self._prompts[delta.choice // self._made].text)
                for token in delta.tokens:
                    table.add(token.id, token.logprob, token.top)
                if delta.text or delta.finish is not None:
                    yield self._chunk(self._piece(delta, table), with_usage, running)
        if with_usage:
            yield {**self._frame([]), "usage": self._replies.usage.plain()}

    def _piece(self, delta: Delta, table: "_Table") -> dict[str, Any]:
        logprobs = table.taken() if self._body.logprobs is not None else None
        finish = delta.finish
        return {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def _chunk(
        self, piece: dict[str, Any], with_usage: bool, running: bool = False
    ) -> dict[str, Any]:
        chunk = self._frame([{"logprobs": None, "finish_reason": None, **piece}])
        if with_usage:
            chunk["usage"] = self._replies.usage.plain() if running else None
        return chunk


def _mean_logprob(reply: Reply) -> float:
    """By which `best_of` judges."""
    scores = reply.completion.logprobs
    return sum(scores) / len(scores) if scores else -math.inf


class _Table:
    """`logprobs` of a choice: four lists of equal length."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        from herdling.inputs.tokenizer import StreamDecoder

        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer)
        self.offset = 0
        """Characters before the next token."""
        self._rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []

    def prompt(self, prompt: Prompt, scored: "Sequence[PromptToken | None]") -> None:
        """Add the prompt's tokens; nobody predicted the first."""
        for i, (id, token) in enumerate(zip(prompt.ids, scored, strict=True)):
            width = 0 if i < prompt.hidden else None
            if token is None:
                self._append(id, None, None, width)
            else:
                self.add(id, token.logprob, token.top, width)

    def add(self, id: int, logprob: float, top: "Alternatives", width: int | None = None) -> None:
        """Add a token; the alternatives always hold the token itself too."""
        best = {self._name(other): finite(score) for other, score in top}
        best.setdefault(self._name(id), finite(logprob))
        self._append(id, finite(logprob), best, width)

    def _append(
        self, id: int, logprob: float | None, top: dict[str, float] | None, width: int | None
    ) -> None:
        self._rows.append((self._name(id), logprob, top, self.offset))
        self.offset += len(self._decoder.push(id)) if width is None else width

    def _name(self, id: int) -> str:
        raw = self._tokenizer.to_bytes([id])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def taken(self) -> dict[str, Any]:
        """What was added since the last time."""
        plain = self.plain()
        self._rows = []
        return plain

    def plain(self) -> dict[str, Any]:
        columns = list(zip(*self._rows, strict=True)) or [(), (), (), ()]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: list(column) for name, column in zip(names, columns, strict=True)}
