"""Every field of every API replaced by what it should not be: refused or read past, never a 5xx.

python -m pytest tests/serve/dialects/test_hostile.py
"""

import asyncio
import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from herdling.serve.app import create

IMAGE = "data:image/png;base64,AAAA"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA}
USER = {"role": "user", "content": "hello"}
BODIES: dict[str, list[Any]] = {
    "/v1/responses": [
        {
            "model": "toy",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
                {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "rain"},
            ],
            "instructions": "brief",
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": {
                "type": "allowed_tools",
                "tools": [{"name": "weather"}],
                "mode": "auto",
            },
            "text": {"format": {"type": "text"}},
            "include": ["message.output_text.logprobs"],
            "max_output_tokens": 2,
            "temperature": 1,
            "top_logprobs": 1,
            "store": True,
            "stream": False,
            "metadata": {"a": "b"},
        }
    ],
    "/v1/messages": [
        {
            "model": "toy",
            "max_tokens": 2,
            "system": [{"type": "text", "text": "brief"}],
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "name": "weather", "input": {}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "content": "rain"}]},
            ],
            "tools": [{"name": "weather", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "stop_sequences": ["x"],
            "output_config": {"format": None},
            "temperature": 1,
            "top_k": 3,
        }
    ],
    "/v1/embeddings": [
        {"model": "toy", "input": [[1, 2]], "encoding_format": "float", "dimensions": 4},
        {"input": ["a"]},
    ],
    "/tokenize": [
        {"prompt": "a", "add_special_tokens": True, "return_token_strs": True},
        {"messages": [USER], "tools": [{"type": "function", "function": FUNCTION}]},
    ],
    "/detokenize": [{"tokens": [1, 2]}],
    "/api/chat": [
        {
            "model": "toy",
            "messages": [
                {**USER, "images": []},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                {"role": "tool", "content": "rain", "tool_name": "f"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "options": {"num_predict": 2, "temperature": 1, "stop": ["x"], "seed": 1},
            "logprobs": True,
            "top_logprobs": 1,
            "stream": False,
            "keep_alive": 0,
        }
    ],
    "/api/generate": [
        {"model": "toy", "prompt": "a", "system": "b", "context": [1], "images": [], "raw": False}
    ],
    "/api/embed": [{"model": "toy", "input": ["a"], "truncate": True, "dimensions": 3}],
    "/api/show": [{"model": "toy"}],
    "/generate": [
        {
            "inputs": "a",
            "parameters": {
                "max_new_tokens": 2,
                "details": True,
                "stop": ["x"],
                "truncate": 1,
                "seed": 1,
                "top_n_tokens": 1,
                "return_full_text": True,
                "grammar": None,
                "adapter_id": None,
            },
        }
    ],
    "/generate_stream": [{"inputs": "a", "parameters": {"max_new_tokens": 2, "details": True}}],
    "/": [{"inputs": "a", "stream": True, "parameters": {}}],
    "/invocations": [
        {"dataframe_split": {"columns": ["prompt"], "data": [["a"]]}, "params": {"max_tokens": 2}},
        {"instances": [{"messages": [USER]}]},
        {"inputs": "a", "parameters": {}},
        {"input": [USER]},
        {"messages": [USER], "max_tokens": 2},
    ],
}
JUNK = [None, True, -1, 10**30, "", "a\u0000" * 2000, [None], {"a": []}]


def places(value: Any) -> Iterator[list[Any]]:
    """The path of every value inside a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield [key]
        if isinstance(inner, dict | list):
            for path in places(inner):
                yield [key, *path]


def spoilt(body: Any) -> Iterator[Any]:
    for path in places(body):
        for junk in JUNK:
            copied = copy.deepcopy(body)
            inner = copied
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = junk
            yield copied


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_an_error_of_the_server(make_service, engine, path):
    app = create(make_service(engine))

    async def work() -> int:
        calls = 0
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for body in BODIES[path]:
                first = await client.post(path, json=body)
                assert first.status_code == 200, first.text
                for bad in spoilt(body):
                    reply = await client.post(path, json=bad)
                    assert reply.status_code < 500, (bad, reply.text)
                    if reply.status_code != 200:
                        assert reply.json(), bad
                    calls += 1
        return calls

    assert asyncio.run(work()) >= len(JUNK)
