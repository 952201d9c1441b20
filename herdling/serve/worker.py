"""The engine's thread, and the way from asyncio to it and back.

    worker = Worker(engine)
    async with await worker.submit([request]) as tickets:       # raises what Engine.add raises
        async for choice, event in tickets:
            ...
    hidden = await worker.call(lambda: lm.logits(ids))           # runs between two steps

The engine has one thread and no lock: everything that touches it is a job which the thread does
between steps. Leaving the `async with` cancels what is unfinished, before the next step. An exception
out of `Engine.step` ends the thread: every open ticket gets it, and `failure` says what happened.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from herdling.serve import errors

if TYPE_CHECKING:
    from herdling.infer.request import Event, Request, Stats

log = logging.getLogger(__name__)
T = TypeVar("T")
_SNAPSHOT_SECONDS = 0.2


class Engine(Protocol):
    """What the worker asks of an engine."""

    @property
    def busy(self) -> bool: ...

    def add(self, request: "Request") -> int: ...
    def step(self) -> "list[Event]": ...
    def cancel(self, index: int, /) -> Any: ...
    def stats(self) -> "Stats": ...


class Worker:
    """Runs an engine in a thread of its own, which ends with `stop` or with the engine's failure."""

    def __init__(
        self, engine: Engine, queue: int = 256, on_failure: Callable[[str], None] | None = None
    ) -> None:
        """`queue`: calls are refused with 429 while this many requests wait for their first token.

        `on_failure(reason)` is called in the engine's thread.
        """
        self._engine, self.queue, self._on_failure = engine, queue, on_failure
        self._wake = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._by_id: dict[int, tuple[Tickets, int]] = {}  # the thread's own
        self._open: set[Tickets | _Call] = set()  # guarded by _wake
        self._seconds_per_request = 1.0  # how fast the queue moves, for Retry-After
        self._last_end = time.monotonic()
        self.failure: str | None = None
        """Why the engine stopped, or None."""
        self.stats: Stats | None = None
        """The engine's counts a moment ago."""
        self.history: deque[tuple[float, Stats]] = deque(maxlen=50)
        """The same over the last seconds, each with `time.monotonic()`."""
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    # ---- called from asyncio

    @property
    def waiting(self) -> int:
        """Requests that have had no event yet."""
        with self._wake:
            return sum(t.waiting for t in self._open if isinstance(t, Tickets))

    @property
    def alive(self) -> bool:
        """Whether the thread runs, maybe within its last step."""
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        with self._wake:
            return sum(len(t.unfinished) for t in self._open if isinstance(t, Tickets))

    async def submit(
        self, requests: "Sequence[Request]", seconds: float | None = None
    ) -> "Tickets":
        """Add requests, all or none; their events come from the iterator that is returned.

        What still runs after `seconds` is cut: its last event has the finish reason `cancelled`.
        Raises ApiError 429 when too many wait, 503 when the engine is gone, and whatever
        `Engine.add` raises for a request it cannot take.
        """
        waiting = self.waiting
        if waiting >= self.queue:
            pause = min(60, round(waiting * self._seconds_per_request))
            raise errors.busy(f"{waiting} requests are waiting already; try again later", pause)
        tickets = Tickets(self, requests)
        self._register(tickets)
        self._post(tickets._add)
        try:
            await tickets._accepted
        except BaseException:
            tickets.close()
            raise
        if seconds is not None:
            tickets._timer = tickets._loop.call_later(seconds, tickets.cut)
        return tickets

    async def call(self, work: Callable[[], T]) -> T:
        """The result of `work()`, done in the engine's thread between two steps; or what it raises."""
        call = _Call(self, work)
        self._register(call)
        self._post(call.run)
        return await call.future

    def cut_all(self) -> None:
        """Cut every open request: each is answered with what it has."""
        with self._wake:
            tickets = [t for t in self._open if isinstance(t, Tickets)]
        for ticket in tickets:
            ticket.cut()

    async def drained(self, seconds: float) -> bool:
        """Wait until nothing is open, at most so long; whether that came about."""
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._open

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread after the step that it is in; open requests get 503. May be called twice."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        self._fail_all(errors.unavailable("The server is shutting down", "shutting_down"))

    def _register(self, item: "Tickets | _Call") -> None:
        with self._wake:
            if self.failure is not None:
                raise errors.unavailable(f"The engine has stopped: {self.failure}", "engine_failed")
            if self._stopping:
                raise errors.unavailable("The server is shutting down", "shutting_down")
            self._open.add(item)

    def _forget(self, item: "Tickets | _Call") -> None:
        with self._wake:
            self._open.discard(item)

    def _post(self, job: Callable[[], None]) -> None:
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()

    # ---- the engine's thread

    def _main(self) -> None:
        try:
            while self._turn():
                pass
        except (
            BaseException
        ) as problem:  # whatever it is, the engine's state can no longer be trusted
            self._failed(problem)

    def _turn(self) -> bool:
        with self._wake:
            while not (self._jobs or self._engine.busy or self._stopping):
                self._wake.wait()
            jobs = list(self._jobs)
            self._jobs.clear()
            if self._stopping:
                return False
        for job in jobs:
            job()
        if self._engine.busy:
            self._deliver(self._engine.step())
        last = self.history[-1][0] if self.history else -math.inf
        if time.monotonic() - last > _SNAPSHOT_SECONDS or not self._engine.busy:
            self.stats = self._engine.stats()
            self.history.append((time.monotonic(), self.stats))
        return True

    def _deliver(self, events: "Sequence[Event]") -> None:
        """Hand events to their tickets, one wake-up of the event loop for each of these."""
        parcels: dict[Tickets, list[tuple[int, Event]]] = {}
        for event in events:
            if event.index not in self._by_id:
                continue  # cancelled, and nobody listens any more
            tickets, choice = self._by_id[event.index]
            parcels.setdefault(tickets, []).append((choice, event))
            if event.completion is not None or event.error is not None:
                del self._by_id[event.index]
                now = time.monotonic()
                took, self._last_end = min(now - self._last_end, 60.0), now
                self._seconds_per_request += 0.1 * (took - self._seconds_per_request)
        for tickets, parcel in parcels.items():
            tickets._post(lambda tickets=tickets, parcel=parcel: tickets._take(parcel))

    def _failed(self, problem: BaseException) -> None:
        reason = f"{type(problem).__name__}: {problem}"
        log.critical("the engine failed, and the server ends: %s", reason, exc_info=problem)
        with self._wake:
            self.failure = reason
        self._fail_all(
            errors.ApiError(500, "The engine failed; the request is lost", code="engine_failed")
        )
        if self._on_failure is not None:
            self._on_failure(reason)

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            items = list(self._open)
            self._open.clear()
        for item in items:
            item._post(lambda item=item: item._fail(error))


class _OnLoop:
    """Something that belongs to the event loop in which it was made."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._loop = worker, asyncio.get_running_loop()

    def _post(self, job: Callable[[], None]) -> None:
        """Do `job` in the event loop; from any thread. A loop that is closed has no listeners."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(job)


class Tickets(_OnLoop):
    """Requests under way: an async iterator of (place of the request, Event)."""

    def __init__(self, worker: Worker, requests: "Sequence[Request]") -> None:
        super().__init__(worker)
        self.requests = requests
        self.unfinished = set(range(len(requests)))
        self.waiting = len(requests)
        """Requests without any event so far."""
        self._silent = set(self.unfinished)
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self._ids: list[int] = []  # the thread's own
        self._gone = False
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "Tickets":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def __aiter__(self) -> "AsyncIterator[tuple[int, Event]]":
        """Events as they come; ends when every request has. Raises what made the engine stop."""
        while self.unfinished or not self._events.empty():
            item = await self._events.get()
            if isinstance(item, Exception):
                raise item
            choice, event = item
            if event.completion is not None or event.error is not None:
                self.unfinished.discard(choice)
            yield choice, event

    def cut(self) -> None:
        """Cancel what is unfinished, and keep listening for how it ended."""
        self._worker._post(self._cancel)

    def drop(self, choice: int) -> None:
        """Cancel one request, and keep listening for how it ended."""
        self._worker._post(lambda: self._cancel([choice]))

    def close(self) -> None:
        """Cancel what is unfinished, and listen no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._worker._forget(self)
        if not self._gone and (self.unfinished or not self._accepted.done()):
            self._worker._post(self._leave)
        self._gone = True

    # ---- jobs in the engine's thread

    def _add(self) -> None:
        if self._gone:
            return
        try:
            for choice, request in enumerate(self.requests):
                id = self._worker._engine.add(request)
                self._ids.append(id)
                self._worker._by_id[id] = (self, choice)
        except Exception as problem:
            self._leave()
            self._post(lambda problem=problem: self._refused(problem))
            return
        self._post(self._admitted)

    def _cancel(self, choices: "Sequence[int] | None" = None) -> None:
        for id in self._ids if choices is None else [self._ids[choice] for choice in choices]:
            if id in self._worker._by_id:
                self._worker._engine.cancel(id)

    def _leave(self) -> None:
        self._cancel()
        for id in self._ids:
            self._worker._by_id.pop(id, None)

    # ---- in the event loop

    def _admitted(self) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _refused(self, problem: Exception) -> None:
        if not self._accepted.done():
            self._accepted.set_exception(problem)

    def _take(self, parcel: "list[tuple[int, Event]]") -> None:
        for choice, event in parcel:
            self._silent.discard(choice)
            self._events.put_nowait((choice, event))
        self.waiting = len(self._silent)

    def _fail(self, error: Exception) -> None:
        self._refused(error)
        self._events.put_nowait(error)


class _Call(_OnLoop):
    """A function to run between two steps."""

    def __init__(self, worker: Worker, work: Callable[[], Any]) -> None:
        super().__init__(worker)
        self.future: asyncio.Future[Any] = self._loop.create_future()
        self._work = work

    def run(self) -> None:
        if self.future.cancelled():
            self._worker._forget(self)
            return
        try:
            result = self._work()
        except Exception as problem:
            self._post(lambda problem=problem: self._fail(problem))
        else:
            self._post(lambda: self._done(result))
        self._worker._forget(self)

    def _done(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def _fail(self, problem: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(problem)
