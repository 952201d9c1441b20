"""Streams to clients, and what happens when a client goes away.

    return EventStream(sse(chunks()), request)             # text/event-stream
    return EventStream(ndjson(chunks()), request, media_type="application/x-ndjson")
    reply = await until_gone(request, work())              # for an answer in one piece

A client that closes its connection cancels what was being made for it, also while nothing is being
sent: the connection is watched all along. Starlette's own StreamingResponse notices only at the next
write.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from herdling.serve import errors

log = logging.getLogger(__name__)
T = TypeVar("T")
DONE = "data: [DONE]\n\n"
_SILENCE_SECONDS = 15.0


class EventStream(Response):
    """A body that is sent piece by piece; closing the connection closes the iterator."""

    def __init__(
        self,
        pieces: AsyncIterator[str],
        request: Request,
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # nginx would collect the pieces
        self._pieces, self._receive = pieces, request.receive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def speak() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._pieces:
                await send(
                    {"type": "http.response.body", "body": piece.encode(), "more_body": True}
                )
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _race(speak(), self._receive)
        except Gone:
            scope.setdefault("state", {})["gone"] = True
        finally:
            if (close := getattr(self._pieces, "aclose", None)) is not None:
                await close()


class Gone(errors.ApiError):
    """The client closed its connection; nobody reads this."""

    def __init__(self) -> None:
        super().__init__(499, "The client closed the connection", code="client_closed_request")


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (then raises Gone).

    Only after the body has been read.
    """
    return await _race(work, request.receive)


async def _race(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for job in (task, watch):
            job.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event; `data` becomes JSON on one line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


async def sse(chunks: AsyncIterator[Any], path: str = "", done: bool = True) -> AsyncIterator[str]:
    """OpenAI's framing: each chunk as `data:`, an error as a last one, then `[DONE]`.

    A comment goes out in long silences (a long prompt), which proxies would take for the end.
    """
    try:
        async for chunk in _with_pauses(chunks):
            yield ": still working\n\n" if chunk is _PAUSE else event(chunk)
    except Exception as problem:
        yield event(errors.body(path, told(problem)))
    if done:
        yield DONE


async def ndjson(chunks: AsyncIterator[Any], path: str = "") -> AsyncIterator[str]:
    """One JSON object a line; an error is the last one."""
    try:
        async for chunk in chunks:
            yield json.dumps(chunk, ensure_ascii=False, allow_nan=False) + "\n"
    except Exception as problem:
        yield json.dumps(errors.body(path, told(problem))) + "\n"


def told(problem: Exception) -> errors.ApiError:
    """The error for the client; one that is not meant for users goes to the log as well."""
    error = errors.of(problem)
    if error.status >= 500 and error is not problem:
        log.error("a stream failed: %s", problem, exc_info=problem)
    return error


_PAUSE = object()


async def _with_pauses(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The chunks, and `_PAUSE` for each while without any."""
    iterator = aiter(chunks)
    following: asyncio.Future[Any] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(iterator))  # pyright: ignore
            done, _ = await asyncio.wait((following,), timeout=_SILENCE_SECONDS)
            if not done:
                yield _PAUSE
                continue
            ready, following = following, None
            try:
                yield ready.result()
            except StopAsyncIteration:
                return
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        if (close := getattr(chunks, "aclose", None)) is not None:
            await close()
