"""A way to call the app without a server: `api.post("/v1/messages", {...})`."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from herdling.serve.app import create
from herdling.serve.service import Service


class Api:
    """Calls of one app, each in an event loop of its own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._app = create(service)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def work() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(work())

    def get(self, path: str) -> httpx.Response:
        return self.call("GET", path)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.call("POST", path, json=body, **options)

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The server-sent events of a stream; each that has a name has it as its type too."""
        reply = self.post(path, {**body, "stream": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        found = []
        for block in reply.text.strip().split("\n\n"):
            *name, data = block.split("\n")
            assert data.startswith("data: ")
            found.append(json.loads(data.removeprefix("data: ")))
            if name:
                assert name == [f"event: {found[-1]['type']}"]
        return found

    def lines(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The lines of an NDJSON stream, which is what Ollama does unless told otherwise."""
        reply = self.post(path, body)
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in reply.text.splitlines()]


@pytest.fixture
def make_api(make_service) -> Callable[..., Api]:
    """make_api(engine=None, **settings); without `engine` the model answers itself."""
    return lambda engine=None, **settings: Api(make_service(engine, **settings))


@pytest.fixture
def api(make_api, engine) -> Api:
    """Answered by the engine that follows a script."""
    return make_api(engine)


@pytest.fixture
def model_api(make_api) -> Api:
    """Answered by the toy model."""
    return make_api()
