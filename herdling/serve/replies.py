"""The replies to one call, as deltas while they grow or as a whole.

async with await service.chat(chat) as replies:
    async for delta in replies: ...             # or: for reply in await replies.collect()
    replies.usage
"""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING

from herdling.serve.errors import of
from herdling.serve.logs import note
from herdling.serve.protocol import Delta, FinishReason, Reply, Token, ToolCall, Usage
from herdling.serve.tool_stream import CallSplitter

if TYPE_CHECKING:
    from collections.abc import Callable

    from herdling.infer.request import Alternatives, Completion, Event
    from herdling.inputs.tokenizer import Tokenizer
    from herdling.serve.guarding import Refusal, Watching
    from herdling.serve.worker import Tickets


class Replies:
    """n choices, or the choices of several prompts: choice p * n + i is choice i of prompt p."""

    def __init__(
        self,
        tickets: "Tickets | Refusal",
        tokenizer: "Tokenizer",
        *,
        calls: bool = False,
        most_calls: int = 128,
        n: int = 1,
        ended: "Callable[[Completion], None] | None" = None,
        watching: "Watching | None" = None,
        refused: bool = False,
    ) -> None:
        """`calls`: look for tool calls in the text; of each reply the first `most_calls` count.

        `watching` judges the replies before they go out; `refused`: the tickets are a `Refusal`.
        """
        self.tickets, self.tokenizer = tickets, tokenizer
        count = len(tickets.requests)
        self._splitters = [CallSplitter() for _ in range(count)] if calls else []
        self._most_calls = most_calls
        self.usage = Usage(prompt_tokens=sum(len(r.ids) for r in tickets.requests[::n]))
        self._n, self._ended = n, ended
        self._watching, self._refused = watching, refused
        self.completions = 0
        """Choices that have ended."""

    async def __aenter__(self) -> "Replies":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.tickets.close()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Raises ApiError when a request fails; leaving early cancels what is unfinished."""
        deltas = self._grow()
        if self._watching is not None:
            deltas = self._watching.over(deltas, self)
        try:
            async with aclosing(deltas):  # pyright: ignore[reportArgumentType]
                async for delta in deltas:
                    yield delta
        finally:
            self.tickets.close()

    async def _grow(self) -> AsyncIterator[Delta]:
        async for choice, event in self.tickets:
            if event.error is not None:
                raise of(event.error)
            for delta in self._deltas(choice, event):
                yield delta

    async def collect(self) -> list[Reply]:
        """Every choice, in order, once all have ended."""
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[Token]] = {}
        calls: dict[int, list[ToolCall]] = {}
        done: dict[int, Reply] = {}
        async for delta in self:
            choice = delta.choice
            texts.setdefault(choice, []).append(delta.text)
            tokens.setdefault(choice, []).extend(delta.tokens)
            if delta.call is not None:
                calls.setdefault(choice, []).append(delta.call)
            if delta.finish is not None and delta.completion is not None:
                done[choice] = Reply(
                    choice,
                    "".join(texts[choice]),
                    calls.get(choice, []),
                    tokens[choice],
                    delta.finish,
                    delta.completion,
                )
        return [done[choice] for choice in sorted(done)]

    def _deltas(self, choice: int, event: "Event") -> list[Delta]:
        tokens = []
        if event.token is not None:
            self.usage.completion_tokens += 1
            experts = None if event.experts is None else event.experts.tolist()
            tokens = [self.token(event.token, event.logprob, event.top, experts)]
        text = self._splitters[choice].push(event.text) if self._splitters else event.text
        out = [Delta(choice, text, tokens)]
        completion = event.completion
        if completion is None:
            return out
        self.completions += 1
        self._note(choice, completion)
        if choice % self._n == 0:
            self.usage.cached_tokens += completion.cached_tokens
        # What was cut by the clock or at shutdown is as short as what ran out of tokens.
        finish: FinishReason = "stop" if completion.finish_reason == "stop" else "length"
        if self._refused:
            finish = "content_filter"
        if self._splitters:
            rest, found = self._splitters[choice].end()
            if rest:
                out.append(Delta(choice, rest))
            for index, (name, arguments) in enumerate(found[: self._most_calls]):
                call = ToolCall(index, f"call_{uuid.uuid4().hex[:24]}", name, arguments)
                out.append(Delta(choice, call=call))
            if found and finish == "stop":
                finish = "tool_calls"
        return [*out, Delta(choice, finish=finish, completion=completion)]

    def _note(self, choice: int, completion: "Completion") -> None:
        """Count the end of a choice, and put it on the call's log line."""
        if self._ended is not None:
            self._ended(completion)
        note(new_tokens=len(completion.ids), finish=completion.finish_reason)
        if choice % self._n == 0:
            note(prompt_tokens=completion.prompt_tokens, cached_tokens=completion.cached_tokens)
        if completion.timings is not None:
            note(**asdict(completion.timings))

    def token(
        self,
        id: int,
        logprob: float,
        top: "Alternatives",
        previous_experts: list[list[int]] | None = None,
    ) -> Token:
        """A token with its text."""
        text = self.tokenizer.decode([id], surrogates=False)
        return Token(id, text, logprob, top, previous_experts)


def arguments(call: ToolCall) -> str:
    """A call's arguments as JSON text, which OpenAI's APIs want."""
    return json.dumps(call.arguments, ensure_ascii=False)
