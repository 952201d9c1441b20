"""The engine that chat, server, evaluation and rollouts share: requests in, tokens and text out.

    engine = Engine(model, tokenizer)
    a = engine.add(Request(ids, max_tokens=64))
    while engine.busy:
        for event in engine.step():
            print(event.text, end="")

Requests join and leave between steps (continuous batching), prompts are read in pieces beside those
that decode, equal beginnings are computed once, and the cache keeps to its memory. Every reply is
what its request alone would give. One thread at a time may use an engine.
"""

import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from herdling import lora
from herdling.errors import ConfigError, Error
from herdling.infer.costs import predict
from herdling.infer.drafts import Drafter, Proposal
from herdling.infer.guessing import MOST, Guessing
from herdling.infer.kv_quant import layers_of, open_store
from herdling.infer.pace import Pace
from herdling.infer.pages import PAGE, Pages
from herdling.infer.request import (
    Alternatives,
    Completion,
    Event,
    PromptToken,
    Request,
    Stats,
    check,
)
from herdling.infer.runner import Runner
from herdling.infer.sampler import choose, log_probs_of, top_of
from herdling.infer.scheduler import Piece, Scheduler
from herdling.infer.sequence import Sequence as Running
from herdling.infer.sequence import Speculation
from herdling.infer.speculative import accept
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.llama import LanguageModel

if TYPE_CHECKING:
    from herdling.infer.grammar import GrammarCompiler

COUNTED = ("prompt", "cached", "new", "steps", "finished", "drafted", "accepted")
LATENCY = 2**24
"""What the engine does around a step's products, in bytes that they would read in that time: about a
millisecond. It decides how many tokens are guessed at first, and so the speed alone."""
SCORED_AT_ONCE = 256
"""Prompt positions whose logits are in memory at once."""


@dataclass
class _Test:
    """A guess that is to be tested in a step."""

    piece: Piece
    guess: Proposal
    step: slice
    """The piece's rows in the step."""
    first: int = 0
    """Its first row of logits: of the last token before the guess."""

    @property
    def rows(self) -> int:
        return len(self.guess.tokens) + 1


class Engine:
    """Generates with one model."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        memory: int | None = None,
        max_running: int = 64,
        step_tokens: int = 512,
        reuse: bool = True,
        drafter: Drafter | None = None,
        longest_guess: int = 8,
        kv: str = "plain",
        page: int = PAGE,
        adapt_threads: bool = False,
        adapt_guesses: bool = True,
    ) -> None:
        """
        Args:
            memory: bytes for keys and values; None takes a quarter of what is free when the first
                request comes, or less if so much could never be used.
            max_running: most requests that decode together.
            step_tokens: most tokens of a step: one for each request that decodes, the rest
                for prompts.
            reuse: keep the keys and values of past requests for prompts that begin the same.
            drafter: guesses tokens that the model then checks, several in a step (`drafts`,
                `draft_models`); what is generated stays the same.
            longest_guess: most tokens guessed at a time.
            kv: `plain` keeps keys and values in the model's type; `int8`, `int4` and `mixed` code
                them (`kv_quant`), which takes a half to a quarter of the memory and changes replies.
            page: positions of a page in a plain cache, times the local layers for each global one.
                Beginnings are shared in whole pages: small ones suit many replies to short prompts.
            adapt_threads: on a CPU, let each step have one thread of torch or all, by what was faster
                lately (`pace`). Log-probs may then differ in their last bits from run to run.
            adapt_guesses: time steps, and guess as many tokens as are fastest by that (`guessing`);
                otherwise lengths go by predicted costs and a request's own past alone, as they do
                where a drafter draws what it proposes.
        """
        for name, value in (
            ("max_running", max_running),
            ("step_tokens", step_tokens),
            ("page", page),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self.model, self.tokenizer = model, tokenizer
        self._memory, self._max_running = memory, max_running
        self._step_tokens, self._reuse = step_tokens, reuse
        self._kv, self._page = kv, page
        self._layers = layers_of(model.config.text, kv, page)
        on_cpu = next(model.parameters()).device.type == "cpu"
        self._pace = Pace() if adapt_threads and on_cpu else None
        least = 3 * self._layers.page_bytes(next(model.parameters()).dtype)
        if memory is not None and memory < least:  # said now, not with the first request
            raise ConfigError(f"memory is {memory} bytes; the cache needs at least {least}")
        self._drafter, self._costs = drafter, None
        self._guessing: Guessing | None = None
        if drafter is not None:
            width = next(model.parameters()).element_size()
            costs = predict(model.config, drafter.cost, MOST // 8, width=width, latency=LATENCY)
            self._costs = replace(costs, verify=costs.verify[: longest_guess + 1])
            if adapt_guesses and not drafter.sampled:
                self._guessing = Guessing(costs)
        self._compiler: GrammarCompiler | None = None
        self._next = 0
        self._ended: deque[Event] = deque()
        self._counts = dict.fromkeys(COUNTED, 0)
        self._load: Tensor | None = None
        self._open: tuple[Scheduler, Runner] | None = None
        self._weights: list[tuple] = []

    # The store is made with the first request: a model may be loaded for its weights alone.
    def _ready(self) -> tuple[Scheduler, Runner]:
        if self._open is None:
            self._weights = self._fingerprint()
            weight = next(self.model.parameters())
            config = self.model.config.text
            budget = self._memory
            if budget is None:
                size = self._layers.position_bytes(weight.dtype)
                longest = config.max_position_embeddings + self._step_tokens
                budget = min(_free(weight.device) // 4, 2 * self._max_running * longest * size)
            guess = self._costs.longest if self._costs else 0
            store = open_store(
                self._kv,
                config,
                budget,
                weight.dtype,
                weight.device,
                self._max_running,
                guess,
                self._page,
            )
            pages = Pages(store.pages)
            scheduler = Scheduler(
                store,
                pages,
                self._max_running,
                self._step_tokens,
                self._reuse,
                guess,
                self._guessing,
            )
            self._open = scheduler, Runner(self.model, store)
        return self._open

    @property
    def _grammars(self) -> "GrammarCompiler":
        if self._compiler is None:
            from herdling.infer.grammar import GrammarCompiler  # needs an extra

            self._compiler = GrammarCompiler(self.tokenizer, self.model.config.text.vocab_size)
        return self._compiler

    def _fingerprint(self) -> list[tuple]:
        """Changes with every weight that moves, changes type or is written to in place."""
        own = [(p.data_ptr(), p.dtype, p._version) for p in self.model.parameters()]
        return [(lora.of(self.model).changes,), *own]

    def _notice_new_weights(self) -> None:
        """Keys and values of other weights are worth nothing; one of another type needs a new store."""
        if self._open is None or self.busy or self._fingerprint() == self._weights:
            return
        self.forget()
        if self._open[1].store.dtype != next(self.model.parameters()).dtype:
            self._open = None
        else:
            self._weights = self._fingerprint()

    def check(self, request: Request) -> None:
        """Raise InputError (ConfigError for settings) unless `add` would take the request."""
        check(request, self.model.config)
        lora.of(self.model).check(request.adapter)
        if request.grammar is not None:
            self._grammars.check(request.grammar)
        longest = self.model.config.text.max_position_embeddings
        self._ready()[0].check(min(len(request.ids) + request.max_tokens, longest))

    def add(self, request: Request) -> int:
        """Put a request into the queue; returns the index that its events will carry.

        Raises InputError (ConfigError for settings) for one that cannot be taken.
        """
        self._notice_new_weights()
        self.check(request)
        scheduler, runner = self._ready()
        index, self._next = self._next, self._next + 1
        sequence = Running(
            index, request, self.model.config, self.tokenizer, runner.store, scheduler.pages
        )
        if request.grammar is not None:
            sequence.matcher = self._grammars.matcher(request.grammar, request.stop_ids)
        if self._drafter and self._costs:
            sequence.speculation = Speculation(self._drafter, self._costs, sequence.ids)
        scheduler.add(sequence)
        return index

    def cancel(self, index: int) -> None:
        """End a request; its last event comes with the next step. Ended ones are left alone."""
        sequence = self._open and self._open[0].remove(index)
        if sequence:
            self._counts["finished"] += 1
            self._ended.append(sequence.end("cancelled"))

    @property
    def busy(self) -> bool:
        """Whether another step would bring anything."""
        scheduler = self._open and self._open[0]
        return bool(self._ended or (scheduler and (scheduler.running or scheduler.waiting)))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one step; returns what it brought, in the order of the requests' rank."""
        events = list(self._ended)
        self._ended.clear()
        scheduler, runner = self._ready()
        begun = time.perf_counter()
        pieces = scheduler.plan()
        if not pieces:
            return events
        tokens = sum(len(piece.tokens) for piece in pieces)
        guessed = 0.0
        with self._pace(tokens) if self._pace else nullcontext():
            guessed = self._guess(pieces)
            events += self._compute(pieces, runner)
        if self._guessing:
            count = sum(len(piece.guess.tokens) for piece in pieces if piece.guess)
            self._guessing.note(tokens + count, count, time.perf_counter() - begun - guessed)
        return events

    def _compute(self, pieces: Sequence[Piece], runner: Runner) -> list[Event]:
        """Run the pieces, and sample where a sequence's tokens are all computed."""
        hidden, routes = runner.run(pieces)
        self._count(pieces, routes)
        ready: list[tuple[Piece, slice]] = []
        offset = 0
        for piece in pieces:
            rows = slice(offset, offset := offset + len(piece.tokens))
            sequence = piece.sequence
            if sequence.request.prompt_logprobs is not None and piece.start < sequence.prompt:
                self._score(piece, hidden[rows])
            if piece.last:
                ready.append((piece, rows))
            else:
                self._note_experts(piece, piece.end, rows, routes)
                sequence.memory.advance(piece.end, self._reuse)
        rows = sum(len(piece.guess.tokens) + 1 if piece.guess else 1 for piece, _ in ready)
        with runner.choosing(rows):
            return self._sample(ready, hidden, routes)

    def _guess(self, pieces: Sequence[Piece]) -> float:
        """Let the drafter guess on where a piece has all tokens there are; the seconds that it took."""
        asked = [
            (piece, speculation, piece.guessing)
            for piece in pieces
            if piece.guessing and (speculation := piece.sequence.speculation)
        ]
        if not self._drafter or not asked:
            return 0.0
        begun = time.perf_counter()
        proposals = self._drafter.propose(
            [(own.draft, count, piece.sequence.sampler) for piece, own, count in asked]
        )
        took = time.perf_counter() - begun
        # A draft that must first catch up takes longer, which says nothing about its guesses.
        if self._guessing and all(own.current for _, own, _ in asked):
            self._guessing.guesses.note(sum(count for _, _, count in asked) - 1, took)
        for (piece, _, _), proposal in zip(asked, proposals, strict=True):
            piece.add(proposal)
        return took

    def _note_experts(self, piece: Piece, end: int, rows: slice, routes: Tensor | None) -> None:
        """Note the experts of the piece's positions below `end`, where they are wanted."""
        if piece.sequence.request.want_experts and routes is not None:
            mine = routes[:, rows.start : rows.start + end - piece.start]
            piece.sequence.memory.routes.append(mine.transpose(0, 1).to(torch.int16).cpu())

    def _sample(
        self, ready: Sequence[tuple[Piece, slice]], hidden: Tensor, routes: Tensor | None
    ) -> list[Event]:
        """The next tokens of every sequence whose tokens are all computed."""
        events: list[Event] = []
        plain: list[tuple[Running, int]] = []
        tests: list[_Test] = []
        for piece, rows in ready:
            sequence = piece.sequence
            if piece.guess is None:
                self._note_experts(piece, piece.end, rows, routes)
                sequence.memory.advance(piece.end, self._reuse)
            if sequence.room == 0:
                events.append(self._retire(sequence, sequence.end("length")))
            elif piece.guess is not None:
                tests.append(_Test(piece, piece.guess, rows))
            elif (problem := sequence.prepare()) is not None:
                failed = Event(sequence.index, None, 0.0, "", error=problem)
                events.append(self._retire(sequence, failed))
            else:
                plain.append((sequence, rows.stop - 1))
        # One product with the head for all: the plain ones first, then each test's rows.
        places = [row for _, row in plain]
        names = [sequence.request.adapter for sequence, _ in plain]
        for test in tests:
            test.first = len(places)
            places += range(test.step.stop - test.rows, test.step.stop)
            names += [test.piece.sequence.request.adapter] * test.rows
        if not places:
            return events
        logits = self._ready()[1].logits(hidden[places], names)
        if plain:
            mine = logits[: len(plain)]
            masks = None
            if any(sequence.matcher for sequence, _ in plain):
                masks = [sequence.matcher and sequence.matcher.apply for sequence, _ in plain]
            tokens, logprobs = choose(mine, [sequence.sampler for sequence, _ in plain], masks)
            wanted = [sequence.request.top_logprobs for sequence, _ in plain]
            tops = top_of(mine, wanted) if any(wanted) else [[]] * len(plain)
            for i, (sequence, _) in enumerate(plain):
                events += self._take(sequence, None, [(tokens[i], logprobs[i], tops[i])])
        if tests:
            events += self._verify(tests, logits, routes)
        return events

    def _verify(
        self, tests: Sequence["_Test"], logits: Tensor, routes: Tensor | None
    ) -> list[Event]:
        """Keep what the model agrees with of each guess, and one token of its own."""
        events: list[Event] = []
        passed: list[tuple[_Test, list[int]]] = []
        kept: list[int] = []
        likeliest = logits.argmax(-1).tolist()
        for test in tests:
            sequence, rows = test.piece.sequence, slice(test.first, test.first + test.rows)
            try:
                masks = sequence.matcher and sequence.matcher.along(test.guess.tokens)
                tokens = accept(
                    logits[rows], test.guess.tokens, test.guess.q, sequence.sampler, masks,
                    likeliest[rows],
                )  # fmt: skip
            except Error as problem:
                failed = Event(sequence.index, None, 0.0, "", error=problem)
                events.append(self._retire(sequence, failed))
            else:
                passed.append((test, tokens))
                kept += range(test.first, test.first + len(tokens))
        if not passed:
            return events
        own = logits[kept]
        chosen = torch.tensor([token for _, tokens in passed for token in tokens])
        logprobs = own.log_softmax(-1).gather(1, chosen[:, None].to(own.device))[:, 0].tolist()
        wanted = [test.piece.sequence.request.top_logprobs for test, tokens in passed for _ in tokens]  # fmt: skip
        tops = top_of(own, wanted) if any(wanted) else [[]] * len(wanted)
        first = 0
        for test, tokens in passed:
            piece = test.piece
            end = piece.end - test.rows + len(tokens)
            self._note_experts(piece, end, test.step, routes)
            self._counts["drafted"] += len(test.guess.tokens)
            self._counts["accepted"] += len(tokens) - 1
            mine = slice(first, first := first + len(tokens))
            new = list(zip(tokens, logprobs[mine], tops[mine], strict=True))
            brought = self._take(piece.sequence, test.guess, new)
            if brought[-1].completion is None and brought[-1].error is None:
                piece.sequence.memory.advance(end, self._reuse)
            events += brought
        return events

    def _take(
        self,
        sequence: Running,
        guess: Proposal | None,
        new: Sequence[tuple[int, float, Alternatives]],
    ) -> list[Event]:
        """Add tokens to a reply until it ends."""
        events = []
        for i, (token, logprob, top) in enumerate(new):
            try:
                complete = sequence.accept(token)
                event = sequence.take(token, logprob, top, complete, len(new) - i)
            except Error as problem:
                event = Event(sequence.index, None, 0.0, "", error=problem)
            self._counts["new"] += 1
            events.append(event)
            if event.completion is not None or event.error is not None:
                self._retire(sequence, event)
                return events
        if sequence.speculation:
            sequence.speculation.commit(guess, [token for token, _, _ in new])
        return events

    def _retire(self, sequence: Running, event: Event) -> Event:
        self._ready()[0].retire(sequence)
        self._counts["finished"] += 1
        return event

    def _score(self, piece: Piece, hidden: Tensor) -> None:
        """Log-probs of the prompt tokens that follow the piece's positions."""
        sequence, runner = piece.sequence, self._ready()[1]
        first, end = max(piece.start, len(sequence.prompt_tokens) - 1), sequence.prompt - 1
        top = sequence.request.prompt_logprobs or 0
        for a in range(first, min(piece.end, end), SCORED_AT_ONCE):
            b = min(a + SCORED_AT_ONCE, piece.end, end)
            part = hidden[a - piece.start : b - piece.start]
            logits = runner.logits(part, [sequence.request.adapter])
            targets = torch.tensor(sequence.ids[a + 1 : b + 1])
            own, ids, values = log_probs_of(logits, targets, top)
            for i, token in enumerate(targets.tolist()):
                best = list(zip(ids[i].tolist(), values[i].tolist(), strict=True))
                sequence.prompt_tokens.append(PromptToken(token, own[i].item(), best))

    def _count(self, pieces: Sequence[Piece], routes: Tensor | None) -> None:
        counts = self._counts
        counts["steps"] += 1
        for piece in pieces:
            sequence = piece.sequence
            if (
                not sequence.counted
            ):  # one that was put back begins again, and its prompt is no new one
                sequence.counted = True
                counts["cached"] += sequence.cached
                counts["prompt"] += sequence.prompt
        if routes is not None:
            if self._load is None:
                experts = self.model.config.text.num_local_experts
                self._load = torch.zeros(len(routes), experts, dtype=torch.int64)
            flat = routes.flatten(1).cpu()
            self._load.scatter_add_(1, flat, torch.ones_like(flat))

    def forget(self) -> None:
        """Drop what is kept for reuse. Changes of the weights are noticed when the engine is idle,
        unless they go through `.data`, which torch does not count: then call this."""
        if self._open:
            self._open[0].pages.forget()

    def stats(self) -> Stats:
        """Where the engine stands, and its counts since it was made."""
        scheduler, runner = self._ready()
        pages, counts = scheduler.pages, self._counts
        return Stats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            pages=pages.count,
            pages_used=pages.count - pages.available,
            pages_cached=pages.cached,
            page_bytes=runner.store.page_bytes,
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            new_tokens=counts["new"],
            steps=counts["steps"],
            preemptions=scheduler.preemptions,
            finished=counts["finished"],
            drafted=counts["drafted"],
            accepted=counts["accepted"],
            expert_load=[] if self._load is None else self._load.tolist(),
        )

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """The replies, in the order of the requests."""
        done: dict[int, Completion] = {}
        for event in self.stream(requests):
            if event.completion is not None:
                done[event.index] = event.completion
        return [done[i] for i in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Generator[Event, None, None]:
        """Events of these requests as they come. Closing the iterator cancels what is left.

        Raises InputError before anything runs if any request cannot be taken, and a request's own
        Error when it fails. Not for an engine that others use at the same time.
        """
        for i, request in enumerate(requests):
            try:
                self.check(request)
            except Error as problem:
                if len(requests) == 1:
                    raise
                raise type(problem)(f"prompts[{i}]: {problem}") from None
        return self._stream(requests)

    def _stream(self, requests: Iterable[Request]) -> Generator[Event, None, None]:
        place: dict[int, int] = {}
        try:
            for i, request in enumerate(requests):
                place[self.add(request)] = i
            while self.busy:
                for event in self.step():
                    if event.completion is not None or event.error is not None:
                        i = place.pop(event.index)
                    else:
                        i = place[event.index]
                    if event.error is not None:
                        raise event.error
                    yield replace(event, index=i)
        finally:
            for index in place:
                self.cancel(index)
            self._ended.clear()


def _free(device: torch.device) -> int:
    """Bytes of memory not in use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
