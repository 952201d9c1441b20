"""Streams, and clients that go away: python -m pytest tests/serve/test_stream.py"""

import asyncio
import json
import socket
import time

import pytest

from herdling.errors import InputError
from herdling.serve import stream
from herdling.serve.app import create

CHAT = "/v1/chat/completions"


def call(url: str, path: str, body: dict) -> socket.socket:
    """Send a call over a socket of its own."""
    host, _, port = url.removeprefix("http://").partition(":")
    wire = socket.create_connection((host, int(port)), 10)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    wire.sendall(head.encode() + content)
    return wire


def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


@pytest.fixture
def endless(engine):
    engine.endless, engine.pause = True, 0.005
    return engine


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hello"}], "stream": True, "n": 2}),
        (CHAT, {"messages": [{"role": "user", "content": "hello"}], "n": 2}),
        ("/v1/completions", {"prompt": ["hello", "you"], "max_tokens": 1500, "stream": True}),
        ("/v1/completions", {"prompt": ["hello", "you"], "max_tokens": 1500}),
    ],
)
def test_a_client_that_leaves_stops_its_requests(make_service, endless, served, path, body):
    service = make_service(endless)
    with served(service) as url:
        wire = call(url, path, body)
        until(lambda: endless.steps > 3)
        if body.get("stream"):
            assert wire.recv(100).startswith(b"HTTP/1.1 200")
        wire.close()
        at = endless.steps
        until(lambda: len(endless.cancelled) == 2)
        assert endless.steps - at < 50
        until(lambda: service.worker.open == 0)
        until(lambda: not endless.busy)


def test_a_client_that_leaves_while_its_prompt_is_read(make_service, endless, served):
    service = make_service(endless)
    with served(service) as url:
        endless.go.clear()
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
        wire = call(url, CHAT, body)
        until(lambda: endless.threads)
        wire.close()
        until(lambda: service.worker.open == 0)
        endless.go.set()
        until(lambda: endless.cancelled == [0])


def test_a_client_that_left_before_the_stream_began(make_service, endless):
    service = make_service(endless)
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": headers,
        "query_string": b"",
    }

    async def go():
        messages = [{"type": "http.request", "body": content}]

        async def receive():
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message):
            await asyncio.sleep(0.05)

        await create(service)({**scope, "http_version": "1.1", "scheme": "http"}, receive, send)

    asyncio.run(go())
    assert service.worker.open == 0
    until(lambda: endless.cancelled == [0])


def test_a_client_that_leaves_harms_no_other(make_service, endless, served):
    service = make_service(endless)
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    with served(service) as url:
        leaving = call(url, CHAT, body)
        staying = call(url, CHAT, {**body, "max_tokens": 60})
        until(lambda: endless.steps > 5)
        leaving.close()
        said = b""
        while piece := staying.recv(65536):
            said += piece
            if b"[DONE]" in said:
                break
        staying.close()
    assert said.count(b'"content":') == 61  # the role's empty one, and 60 tokens
    assert [endless.requests[i].max_tokens for i in endless.cancelled] == [2048]


def test_long_silences_are_filled(monkeypatch):
    monkeypatch.setattr(stream, "_SILENCE_SECONDS", 0.02)

    async def chunks():
        yield 1
        await asyncio.sleep(0.07)
        yield 2

    async def go():
        return [piece async for piece in stream.sse(chunks())]

    pieces = asyncio.run(go())
    assert [p for p in pieces if not p.startswith(":")] == [
        "data: 1\n\n",
        "data: 2\n\n",
        stream.DONE,
    ]
    assert 2 <= sum(p.startswith(":") for p in pieces) <= 4


def test_an_error_on_the_way_is_the_last_word():
    async def chunks():
        yield {"a": "\u2028 \n"}
        raise InputError("no further")

    async def go(framing):
        return [piece async for piece in framing(chunks())]

    first, error, done = asyncio.run(go(stream.sse))
    assert first == 'data: {"a":"\u2028 \\n"}\n\n'
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "no further"
    assert done == stream.DONE
    lines = asyncio.run(go(stream.ndjson))
    assert json.loads(lines[0]) == {"a": "\u2028 \n"}
    assert json.loads(lines[1])["error"]["message"] == "no further"


def test_leaving_a_stream_closes_its_source():
    closed = []

    async def chunks():
        try:
            while True:
                yield 1
                await asyncio.sleep(0.05)
        finally:
            closed.append(True)

    async def go():
        pieces = stream.sse(chunks())
        async for _ in pieces:
            break
        await pieces.aclose()

    asyncio.run(go())
    assert closed == [True]
