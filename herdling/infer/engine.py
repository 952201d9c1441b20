"""The engine that chat, evaluation and rollouts share: requests in, tokens and text out.

    for event in Engine(model, tokenizer).stream([Request(ids, max_tokens=64)]):
        print(event.text, end="")

Requests of similar length run together in batches of bounded size; every reply is what its request
alone would give. Left out: a new request joining a running batch, and reuse of shared prefixes.
"""

import math
from collections.abc import Generator, Iterator, Sequence

from herdling.errors import Error
from herdling.infer.request import Completion, Event, FinishReason, Request, check
from herdling.infer.runner import Batch
from herdling.infer.sampler import Sampler, choose
from herdling.infer.stopping import StoppingText
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.llama import LanguageModel


class Engine:
    """Generates with one model. It holds no state between calls."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 64,
        max_columns: int = 2**16,
        prefill_tokens: int = 4096,
    ) -> None:
        """
        Args:
            max_rows: most requests in a batch.
            max_columns: most positions in the cache of a batch, all rows together; a single
                request may need more.
            prefill_tokens: tokens that one call of the model reads of the prompts.
        """
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_columns = max_rows, max_columns
        self.prefill_tokens = prefill_tokens

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """The replies, in the order of the requests."""
        done: dict[int, Completion] = {}
        for event in self.stream(requests):
            if event.completion is not None:
                done[event.index] = event.completion
        return [done[i] for i in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Generator[Event, None, None]:
        """One event a sampled token. Closing the iterator cancels what is left.

        Raises InputError before anything runs if any request cannot be taken, and Error when the
        model's logits are not finite.
        """
        for i, request in enumerate(requests):
            try:
                check(request, self.model.config)
            except Error as problem:
                if len(requests) == 1:
                    raise
                raise type(problem)(f"prompts[{i}]: {problem}") from None
        return self._stream(requests)

    def _stream(self, requests: Sequence[Request]) -> Generator[Event, None, None]:
        for group in self._groups(requests):
            rows = [_Row(i, requests[i], self._room(requests[i]), self.tokenizer) for i in group]
            batch = Batch(self.model, [row.request for row in rows], self.prefill_tokens)
            logits = batch.prefill()
            while True:
                active = [i for i, row in enumerate(rows) if row.completion is None]
                chosen = logits if len(active) == len(rows) else logits[active]
                tokens, logprobs = choose(chosen, [rows[i].sampler for i in active])
                for i, token, logprob in zip(active, tokens, logprobs, strict=True):
                    yield rows[i].take(token, logprob)
                if all(row.completion is not None for row in rows):
                    break
                logits = batch.step([row.ids[-1] for row in rows])

    def _room(self, request: Request) -> int:
        """New tokens that the request may have."""
        longest = self.model.config.text.max_position_embeddings
        return min(request.max_tokens, longest - len(request.ids))

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indices that run together: neighbours in length, so that little padding is needed."""
        group: list[int] = []
        widest = 0
        for i in sorted(range(len(requests)), key=lambda i: len(requests[i].ids)):
            wide = max(widest, len(requests[i].ids) + self._room(requests[i]))
            full = len(group) == self.max_rows or wide * (len(group) + 1) > self.max_columns
            if group and full:
                yield group
                group, wide = [], len(requests[i].ids) + self._room(requests[i])
            group.append(i)
            widest = wide
        if group:
            yield group


class _Row:
    """A request under way."""

    def __init__(self, index: int, request: Request, room: int, tokenizer: Tokenizer) -> None:
        self.index, self.request, self.room = index, request, room
        self.sampler = Sampler(request.sampling, request.seed)
        self.sampler.see(request.ids)
        self.ids: list[int] = []
        self.completion: Completion | None = None
        self._logprobs: list[float] = []
        self._text = StoppingText(tokenizer, request.stop)
        self._pieces: list[str] = []

    def take(self, token: int, logprob: float) -> Event:
        """Add a sampled token and say what it brought."""
        if not math.isfinite(logprob):
            raise Error(
                f"the model's logits are not finite after {len(self.ids)} new tokens; check its "
                "weights, or load it with dtype float32"
            )
        self.ids.append(token)
        self._logprobs.append(logprob)
        reason: FinishReason | None = None
        text = ""
        if token in self.request.stop_ids:
            reason = "stop"
        else:
            text = self._text.push(token)
            if not self._text.stopped and len(self.ids) == self.room:
                reason = "length"
        if reason is not None:
            text += self._text.flush()
        if self._text.stopped:
            reason = "stop"
        self._pieces.append(text)
        if reason is not None:
            self.completion = Completion(
                "".join(self._pieces), self.ids, reason, len(self.request.ids), self._logprobs
            )
        return Event(self.index, token, logprob, text, self.completion)
