"""Keys, limits and ids of calls: python -m pytest tests/serve/test_gate.py"""

import asyncio
import logging
import socket

import pytest

from herdling.serve.limits import Limits

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}]}
KEYS = ("alpha-key", "b\u00e9ta")


@pytest.fixture
def guarded(make_service, engine):
    return make_service(engine, keys=KEYS)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer alpha-ke"},
        {"Authorization": "Bearer alpha-key2"},
        {"Authorization": "Basic alpha-key"},
        {"Authorization": "Bearer"},
        {"Authorization": ""},
        {"x-api-key": "alpha"},
    ],
)
def test_without_a_valid_key_it_is_a_401(guarded, ask, engine, headers):
    for method, path in (
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/nope"),
        ("GET", "/metrics"),
    ):
        reply = ask(guarded, method, path, headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert engine.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer alpha-key"},
        {"Authorization": "bearer  alpha-key "},
        {"x-api-key": "alpha-key"},
        {"Authorization": "Bearer b\u00e9ta".encode()},
    ],
)
def test_any_of_the_keys_opens(guarded, ask, headers):
    assert ask(guarded, "POST", CHAT, json=BODY, headers=headers).status_code == 200


def test_health_needs_no_key(guarded, ask):
    for path in ("/health", "/v1/health", "/ping"):
        assert ask(guarded, "GET", path).status_code == 200


def test_errors_take_the_shape_of_the_api_that_was_called(guarded, ask):
    assert ask(guarded, "POST", "/v1/messages", json={}).json()["type"] == "error"
    assert isinstance(ask(guarded, "POST", "/api/chat", json={}).json()["error"], str)


def test_a_body_that_says_it_is_too_large(make_service, engine, ask):
    service = make_service(engine, limits=Limits(body_bytes=100))
    reply = ask(
        service, "POST", CHAT, content=b"x" * 101, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413
    assert reply.headers["connection"] == "close"
    assert "100 bytes" in reply.json()["error"]["message"]


def test_a_body_that_does_not_say_is_counted_as_it_comes(make_service, engine, client):
    service = make_service(engine, limits=Limits(body_bytes=1000))
    sent = 0

    async def pieces():
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b"x" * 100

    async def go():
        async with client(service) as api:
            headers = {"content-type": "application/json"}
            return await api.post(CHAT, content=pieces(), headers=headers)

    reply = asyncio.run(go())
    assert reply.status_code == 413
    assert sent <= 4200  # some more is read, so that the client gets to see the answer


def test_a_client_that_is_still_sending_sees_the_answer(make_service, engine, served):
    """Closing a connection with unread bytes resets it, and the answer would be lost with them."""
    service = make_service(engine, limits=Limits(body_bytes=2_000_000))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 6000000\r\n"
    with served(service) as url:
        place = (url.split(":")[1].strip("/"), int(url.rpartition(":")[2]))
        for _ in range(3):
            with socket.create_connection(place, timeout=10) as caller:
                caller.sendall(head.encode() + b"\r\n" + b"x" * 6_000_000)
                assert caller.recv(100).startswith(b"HTTP/1.1 413")
        with socket.create_connection(place, timeout=4) as caller:  # has nothing under way
            caller.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
            assert caller.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_comes_too_slowly(make_service, engine, client):
    service = make_service(engine, limits=Limits(body_seconds=0.05))

    async def pieces():
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.02)

    async def go():
        async with client(service) as api:
            headers = {"content-type": "application/json"}
            return await api.post(CHAT, content=pieces(), headers=headers)

    assert asyncio.run(go()).status_code == 408


def test_request_ids_are_kept_or_made(make_service, engine, ask):
    service = make_service(engine)
    reply = ask(service, "GET", "/health", headers={"X-Request-Id": "abc-1.2:3"})
    assert reply.headers["x-request-id"] == "abc-1.2:3"
    for odd in ("a b", "x" * 200, "<script>", ""):
        made = ask(service, "GET", "/health", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert len(made) == 32
    assert ask(service, "GET", "/nope").headers["x-request-id"]


def test_other_names_of_a_local_server_are_refused(make_service, engine, ask):
    service = make_service(engine, trusted=("localhost", "127.0.0.1", "[::1]"))
    for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("LOCALHOST", 200),
                         ("evil.example", 403), ("localhost.evil.example:8000", 403), ("", 403)):  # fmt: skip
        assert ask(service, "GET", "/health", headers={"Host": host}).status_code == status, host


def test_a_call_is_one_log_line_without_content(make_service, engine, ask, caplog):
    service = make_service(engine)
    with caplog.at_level(logging.INFO, "herdling.serve.access"):
        ask(service, "POST", CHAT, json={**BODY, "n": 2}, headers={"X-Request-Id": "mine"})
        ask(service, "GET", "/health")
    (record,) = [r for r in caplog.records if r.name == "herdling.serve.access"]
    fields = record.fields
    assert (fields["id"], fields["method"], fields["path"]) == ("mine", "POST", CHAT)
    assert (fields["status"], fields["finish"]) == (200, "stop")
    assert fields["prompt_tokens"] == len(engine.requests[0].ids)
    assert fields["new_tokens"] == 2 * (len(engine.lm.tokenizer.encode("the dog")) + 1)
    assert {"queue", "prefill", "decode", "seconds"} <= set(fields)
    assert "hello" not in repr(fields)
    assert "the dog" not in repr(fields)


def test_a_bug_is_a_500_that_tells_nothing(make_service, engine, ask, caplog):
    def broken(request):
        raise RuntimeError("secret detail")

    engine.add = broken
    reply = ask(make_service(engine), "POST", CHAT, json=BODY)
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret detail" in caplog.text
