"""`anthropic` over `/v1/messages`: whole, streamed, counted, with tools; see also sdk_shapes.py."""

import base64
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def api(server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message(api):
    made = api.messages.create(model="toy", max_tokens=8, system="Be brief.", messages=HELLO)
    assert made.role == "assistant"
    assert made.content[0].type == "text"
    assert made.stop_reason in ("max_tokens", "end_turn")
    assert made.usage.output_tokens <= 8


def test_a_stream(api):
    asked: Any = {
        "model": "toy",
        "max_tokens": 8,
        "messages": HELLO,
        "extra_body": {"temperature": 0},
    }
    with api.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].text == api.messages.create(**asked).content[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_used(api, stream):
    asked: Any = {
        "model": "toy",
        "max_tokens": 300,
        "messages": HELLO,
        "tools": [WEATHER],
        "tool_choice": {"type": "tool", "name": "weather"},
    }
    if stream:
        with api.messages.stream(**asked) as events:
            made = events.get_final_message()
    else:
        made = api.messages.create(**asked)
    assert made.stop_reason == "tool_use"
    used = next(block for block in made.content if block.type == "tool_use")
    assert used.name == "weather"
    assert used.input["city"] in ("Oslo", "Rome")
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "rain"}
    turns: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": [block.model_dump(exclude_unset=True) for block in made.content],
        },
        {"role": "user", "content": [result]},
    ]
    assert api.messages.create(model="toy", max_tokens=8, messages=turns, tools=[WEATHER]).content


def test_count_tokens(api):
    count = api.messages.count_tokens(model="toy", messages=HELLO, tools=[WEATHER]).input_tokens
    usage = api.messages.create(model="toy", max_tokens=1, messages=HELLO, tools=[WEATHER]).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens


def test_a_picture(api, picture):
    source = {
        "type": "base64",
        "media_type": "image/png",
        "data": base64.b64encode(picture).decode(),
    }
    messages: Any = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    shown = api.messages.count_tokens(model="toy", messages=messages).input_tokens
    assert shown > api.messages.count_tokens(model="toy", messages=HELLO).input_tokens
    assert api.messages.create(model="toy", max_tokens=4, messages=messages).content


def test_errors_are_of_its_classes(api, guarded):
    with pytest.raises(anthropic.BadRequestError):
        api.messages.create(model="toy", max_tokens=8, messages=[])
    with pytest.raises(anthropic.NotFoundError):
        api.messages.create(model="other", max_tokens=8, messages=HELLO)
    stranger = anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model="toy", max_tokens=8, messages=HELLO)


def test_a_stream_that_is_left_ends_its_reply(api, server):
    with api.messages.stream(model="toy", max_tokens=3000, messages=HELLO) as stream:
        next(iter(stream.text_stream))
    server.until_open(0, 5)
