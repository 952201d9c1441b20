"""A client that goes away ends what was made for it, in every API.

python -m pytest tests/serve/dialects/test_gone.py
"""

import time

import httpx
import pytest

HELLO = [{"role": "user", "content": "hello"}]
CALLS = {
    "responses": ("/v1/responses", {"input": "hello"}, True),
    "messages": ("/v1/messages", {"messages": HELLO, "max_tokens": 2000}, True),
    "ollama": ("/api/chat", {"model": "toy", "messages": HELLO}, True),
    "ollama generate": ("/api/generate", {"model": "toy", "prompt": "hello"}, True),
    "tgi": ("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 2000}}, True),
    "responses, whole": ("/v1/responses", {"input": "hello"}, False),
    "messages, whole": ("/v1/messages", {"messages": HELLO, "max_tokens": 2000}, False),
    "ollama, whole": ("/api/chat", {"model": "toy", "messages": HELLO, "stream": False}, False),
    "tgi, whole": ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 2000}}, False),
    "mlflow": ("/invocations", {"inputs": ["a", "b"], "params": {"max_tokens": 2000}}, False),
}


def until(true, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("name", CALLS)
def test_going_away_cancels(make_service, engine, served, name):
    path, body, streamed = CALLS[name]
    engine.endless, engine.pause = True, 0.005
    service = make_service(engine)
    with served(service) as url, httpx.Client(timeout=5) as client:
        if streamed:
            with client.stream("POST", url + path, json={"stream": True, **body}) as reply:
                assert reply.status_code == 200
                next(reply.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url + path, json=body, timeout=0.3)
        until(lambda: len(engine.cancelled) == len(engine.requests))
        until(lambda: service.worker.open == 0)
        # Counted as left by the client, which is also the last that the server does for a call.
        until(lambda: b'status="499"' in service.metrics.text())
