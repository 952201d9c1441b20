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
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from herdling import lora
from herdling.errors import ConfigError, Error, InputError
from herdling.infer.costs import predict
from herdling.infer.drafts import Drafter
from herdling.infer.guessing import MOST, Guessing
from herdling.infer.kv_quant import layers_of, open_store
from herdling.infer.pace import Pace
from herdling.infer.pages import PAGE, Pages
from herdling.infer.request import Completion, Event, Request, Stats, check
from herdling.infer.runner import Runner
from herdling.infer.scheduler import Scheduler
from herdling.infer.sequence import Sequence as Running
from herdling.infer.sequence import Speculation
from herdling.infer.stepper import Counts, Stepper
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.llama import LanguageModel

if TYPE_CHECKING:
    from herdling.infer.grammar import GrammarCompiler

LATENCY = 2**24
"""What the engine does around a step's products, in bytes that they would read in that time: about a
millisecond. It decides how many tokens are guessed at first, and so the speed alone."""


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
        self._next, self._changes = 0, 0
        self._ended: deque[Event] = deque()
        self._counts = Counts()
        self._open: Stepper | None = None
        self._weights: list[tuple] = []

    # The store is made with the first request: a model may be loaded for its weights alone.
    def _ready(self) -> Stepper:
        if self._open is None:
            self._weights = self._fingerprint()
            weight = next(self.model.parameters())
            config = self.model.config.text
            budget = self._memory
            if budget is None:
                size = self._layers.position_bytes(weight.dtype)
                longest = config.max_position_embeddings + self._step_tokens
                budget = min(_free(weight.device) // 4, 2 * self._max_running * longest * size)
            drafter, guess = self._drafter, self._costs.longest if self._costs else 0
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
            runner = Runner(self.model, store)
            self._open = Stepper(scheduler, runner, self._counts, drafter, self._guessing)
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
        if self._open.runner.store.dtype != next(self.model.parameters()).dtype:
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
        self._ready().scheduler.check(min(len(request.ids) + request.max_tokens, longest))

    def add(self, request: Request) -> int:
        """Put a request into the queue; returns the index that its events will carry.

        Raises InputError (ConfigError for settings) for one that cannot be taken.
        """
        self._notice_new_weights()
        self.check(request)
        scheduler = self._ready().scheduler
        index, self._next = self._next, self._next + 1
        sequence = Running(
            index,
            request,
            self.model.config,
            self.tokenizer,
            scheduler.store,
            scheduler.pages,
            lora.of(self.model).key(request.adapter),
        )
        if request.grammar is not None:
            sequence.matcher = self._grammars.matcher(request.grammar, request.stop_ids)
        if self._drafter and self._costs:
            sequence.speculation = Speculation(self._drafter, self._costs, sequence.ids)
        scheduler.add(sequence)
        return index

    def cancel(self, index: int) -> None:
        """End a request; its last event comes with the next step. Ended ones are left alone."""
        sequence = self._open and self._open.scheduler.remove(index)
        if sequence:
            self._counts.finished += 1
            self._ended.append(sequence.end("cancelled"))

    @property
    def busy(self) -> bool:
        """Whether another step would bring anything."""
        scheduler = self._open and self._open.scheduler
        return bool(self._ended or (scheduler and (scheduler.running or scheduler.waiting)))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one step; returns what it brought, in the order of the requests' rank."""
        self._drop_unadapted()
        events = list(self._ended)
        self._ended.clear()
        stepper = self._ready()
        begun = time.perf_counter()
        pieces = stepper.scheduler.plan()
        if not pieces:
            return events
        tokens = sum(len(piece.tokens) for piece in pieces)
        guessed = 0.0
        with self._pace(tokens) if self._pace else nullcontext():
            guessed = stepper.guess(pieces)
            events += stepper.compute(pieces)
        if self._guessing:
            count = sum(len(piece.guess.tokens) for piece in pieces if piece.guess)
            self._guessing.note(tokens + count, count, time.perf_counter() - begun - guessed)
        return events

    def _drop_unadapted(self) -> None:
        """End the requests whose adapter was taken off, though another one may have its name by now."""
        adapters = lora.of(self.model)
        if self._changes == adapters.changes:
            return
        self._changes = adapters.changes
        scheduler = self._ready().scheduler
        for sequence in scheduler.sequences:
            name = sequence.request.adapter
            if name is None or adapters.key(name) == sequence.adapter:
                continue
            scheduler.remove(sequence.index)
            problem = InputError(f"adapter {name!r} was taken off while the request was under way")
            self._counts.finished += 1
            self._ended.append(Event(sequence.index, None, 0.0, "", error=problem))

    def forget(self) -> None:
        """Drop what is kept for reuse. Changes of the weights are noticed when the engine is idle,
        unless they go through `.data`, which torch does not count: then call this."""
        if self._open:
            self._open.scheduler.pages.forget()

    def stats(self) -> Stats:
        """Where the engine stands, and its counts since it was made."""
        scheduler = self._ready().scheduler
        pages, counts = scheduler.pages, self._counts
        return Stats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            pages=pages.count,
            pages_used=pages.count - pages.available,
            pages_cached=pages.cached,
            page_bytes=scheduler.store.page_bytes,
            prompt_tokens=counts.prompt,
            cached_tokens=counts.cached,
            new_tokens=counts.new,
            steps=counts.steps,
            preemptions=scheduler.preemptions,
            finished=counts.finished,
            drafted=counts.drafted,
            accepted=counts.accepted,
            expert_load=[] if counts.load is None else counts.load.tolist(),
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
