"""What every call passes first: a request id, the key, the limits, and at the end one log line.

Written against ASGI itself, so that streams pass through piece by piece and a disconnect is seen where
it matters. Bodies are counted as they come in, whatever Content-Length claims.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from herdling.serve import cleanup, errors, logs

if TYPE_CHECKING:
    from herdling.serve.service import Service

log = logging.getLogger(__name__)
OPEN = ("/health", "/v1/health", "/ping")
"""Paths that need no key, for those who only ask whether the server lives."""
_DRAIN = 4
"""How much of a refused body is read, in largest bodies."""
_DRAIN_SECONDS = 5.0
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, service: "Service") -> None:
        self._app, self._service = app, service
        self._keys = [
            _digest(key.encode("utf-8", "surrogateescape")) for key in service.settings.keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, headers = time.monotonic(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id
        answer, body = _Answer(send, id), _Body(receive, headers, self._service)
        with (
            cleanup.scope(),
            logs.call(id=id, method=scope["method"], path=scope["path"][:200]) as fields,
        ):
            try:
                self._admit(scope, headers)
                await self._app(scope, body.receive, answer.send)
            except errors.ApiError as refusal:
                await body.drain()
                await errors.response(scope["path"], refusal)(scope, receive, answer.send)
            except Exception as problem:
                log.error(
                    "a call failed: %s", problem, exc_info=problem, extra={"fields": {"id": id}}
                )
                if not answer.status:
                    error = errors.of(problem)
                    await errors.response(scope["path"], error)(scope, receive, answer.send)
            finally:
                seconds = time.monotonic() - begun
                status = 499 if scope["state"].get("gone") else answer.status or 499
                fields |= {"status": status, "seconds": seconds}
                route = getattr(scope.get("route"), "path", None) or "other"
                self._service.metrics.answered(route, status, seconds)
                quiet = route in OPEN or route == "/metrics"
                level = logging.DEBUG if quiet else logging.INFO
                logs.access.log(level, "call", extra={"fields": fields})

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError for a call that may not come in."""
        settings = self._service.settings
        if settings.trusted and _host(headers.get("host", "")) not in settings.trusted:
            raise errors.ApiError(
                403, f"Host {headers.get('host', '')[:100]!r} is not one of this server's names"
            )
        if self._keys and self._guarded(scope) and not self._has_key(headers):
            raise errors.no_key()
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > settings.limits.body_bytes:
            raise _Body.too_large(settings.limits.body_bytes)

    def _guarded(self, scope: Scope) -> bool:
        """The page itself is open; what it shows is not."""
        path = scope["path"]
        return path not in OPEN and not (
            scope["method"] in ("GET", "HEAD") and path in self._service.open_paths
        )

    def _has_key(self, headers: Headers) -> bool:
        """Compares with every key, in a time that tells nothing about them."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given.encode("latin-1"))  # the bytes that were sent
        return any([hmac.compare_digest(digest, key) for key in self._keys])


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host(value: str) -> str:
    """A Host header without its port."""
    return re.sub(r":\d*$", "", value).lower()


class _Answer:
    """Watches what goes out, and puts the request id on it."""

    def __init__(self, send: Send, id: str) -> None:
        self._send, self._id = send, id
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._id
            headers["X-Content-Type-Options"] = "nosniff"
        await self._send(message)


class _Body:
    """Counts what comes in, and gives up on a body that is too large or too slow."""

    def __init__(self, receive: Receive, headers: Headers, service: "Service") -> None:
        self._receive, self._limits = receive, service.limits
        self._end = time.monotonic() + self._limits.body_seconds
        self._size, self._whole = 0, False
        self._waits = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        if self._whole:  # from now on this only waits for the client to go away
            return await self._receive()
        try:
            left = max(0.0, self._end - time.monotonic())
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            raise errors.ApiError(
                408, "The body took too long to arrive", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.request":
            self._count(message)
            if self._size > self._limits.body_bytes:
                await self.drain()
                raise self.too_large(self._limits.body_bytes)
        return message

    def _count(self, message: Message) -> None:
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)

    async def drain(self) -> None:
        """Read the rest of a refused body and forget it, within bounds.

        A client that is still sending when the connection closes sees it reset, and no answer. One that
        waits to be told to go on (`Expect`) has nothing under way.
        """
        if self._waits and not self._size:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._whole and self._size < _DRAIN * self._limits.body_bytes:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        return
                    self._count(message)

    @staticmethod
    def too_large(most: int) -> errors.ApiError:
        return errors.too_large(f"The body is larger than {most} bytes")
