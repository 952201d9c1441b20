"""A toy multimodal model, an engine that follows a script, and clients of an app around them."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from herdling.errors import Error
from herdling.infer.lm import LM
from herdling.infer.request import Completion, Event, Request, Stats, Timings, check
from herdling.inputs.tokenizer import Tokenizer
from herdling.serve.app import create
from herdling.serve.server import bind
from herdling.serve.service import Service, Settings

TEXT = (
    "the quick brown fox jumps over the lazy dog, and then the dog sleeps. "
    'numbers 1 2 3 and signs (), = # [weather(city="Oslo")] {"name": "x", "parameters": {}}'
)


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train([TEXT] * 4, 330)


@pytest.fixture(scope="session")
def lm(tok: Tokenizer, toy_lm: Callable[..., LM]) -> LM:
    """Nano with vision, 2048 positions; its greedy replies hold no control tokens."""
    return toy_lm(tok, seed=3, std=0.12, max_position_embeddings=2048)


class FakeEngine:
    """Says what `script(request)` gives, a token a step; can be slow, fail a request, or crash."""

    def __init__(
        self, lm: LM, script: Callable[[Request], str] = lambda request: "the dog"
    ) -> None:
        self.lm, self.script = lm, script
        self.pause = 0.0
        """Seconds of a step."""
        self.go = threading.Event()
        """Steps wait for it."""
        self.go.set()
        self.crash: Exception | None = None
        """What the next step raises."""
        self.poison: Callable[[Request], Error | None] = lambda request: None
        self.endless = False
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.threads: set[str] = set()
        self.steps = 0
        self._running: dict[int, tuple[Request, deque[int], list[int]]] = {}
        self._ended: list[Event] = []

    @property
    def busy(self) -> bool:
        return bool(self._running or self._ended)

    def add(self, request: Request) -> int:
        check(request, self.lm.config)
        index = len(self.requests)
        self.requests.append(request)
        ids = [*self.lm.tokenizer.encode(self.script(request)), *request.stop_ids[:1]]
        self._running[index] = request, deque(ids), []
        return index

    def cancel(self, index: int) -> None:
        if index in self._running:
            self.cancelled.append(index)
            self._ended.append(self._end(index, "cancelled"))

    def step(self) -> list[Event]:
        self.threads.add(threading.current_thread().name)
        self.go.wait(10)
        time.sleep(self.pause)
        if self.crash is not None:
            raise self.crash
        self.steps += 1
        events, self._ended = self._ended, []
        for index in list(self._running):
            events.append(self._advance(index))
        return events

    def _advance(self, index: int) -> Event:
        request, ids, said = self._running[index]
        if (problem := self.poison(request)) is not None:
            del self._running[index]
            return Event(index, None, 0.0, "", error=problem)
        if request.max_tokens == 0:
            return self._end(index, "length")
        token = ids[0] if self.endless else ids.popleft()
        said.append(token)
        if token in request.stop_ids:
            return replace(self._end(index, "stop"), token=token, logprob=-0.5)
        text = self.lm.tokenizer.decode([token])
        if len(said) == request.max_tokens:
            return replace(self._end(index, "length"), token=token, logprob=-0.5, text=text)
        top = [(token, -0.5), (5, -2.0)][: request.top_logprobs]
        return Event(index, token, -0.5, text, top=top)

    def _end(self, index: int, reason) -> Event:
        request, _, said = self._running.pop(index)
        text = self.lm.tokenizer.decode([t for t in said if t not in request.stop_ids])
        done = Completion(
            text, said, reason, len(request.ids), [-0.5] * len(said), timings=Timings(0.1, 0.2, 0.3)
        )
        return Event(index, None, 0.0, "", done)

    def stats(self) -> Stats:
        return Stats(
            len(self._running), 0, 8, 1, 2, 4096, 10, 3, 7, self.steps, 0, 0, expert_load=[[1, 2]]
        )


@pytest.fixture
def engine(lm: LM) -> FakeEngine:
    return FakeEngine(lm)


@pytest.fixture
def make_service(lm: LM) -> Iterator[Callable[..., Service]]:
    """make_service(engine=None, **settings): ready; without `engine` the model's own."""
    made: list[Service] = []

    def make(engine: FakeEngine | None = None, **settings) -> Service:
        service = Service(Settings(**{"name": "toy", **settings}))
        service.ready(lm, engine)
        made.append(service)
        return service

    yield make
    for service in made:
        if service.worker is not None and isinstance(service.worker._engine, FakeEngine):
            service.worker._engine.go.set()
        service.close()


_apps: WeakKeyDictionary[Service, FastAPI] = WeakKeyDictionary()  # building one takes a while


def _client(service: Service) -> httpx.AsyncClient:
    app = _apps.get(service) or _apps.setdefault(service, create(service))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
def client() -> Callable[[Service], httpx.AsyncClient]:
    """client(service): calls the app without sockets; it never sees a disconnect."""
    return _client


@pytest.fixture
def ask() -> Callable[..., httpx.Response]:
    """ask(service, method, path, **options of httpx): one call, in an event loop of its own."""

    def ask(service: Service, method: str, path: str, **options: Any) -> httpx.Response:
        async def work() -> httpx.Response:
            async with _client(service) as api:
                return await api.request(method, path, **options)

        return asyncio.run(work())

    return ask


@contextmanager
def _served(service: Service) -> Iterator[str]:
    """A real server on a free port of this machine, for what needs sockets; yields its URL."""
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(create(service), lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture
def served() -> Callable[[Service], AbstractContextManager[str]]:
    """with served(service) as url"""
    return _served
