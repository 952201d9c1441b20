"""`huggingface_hub.InferenceClient`: chat completions, and text generation as TGI answers it."""

import json
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError

HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def chats(server) -> InferenceClient:
    return InferenceClient(base_url=f"{server.url}/v1", api_key="none")


@pytest.fixture(scope="module")
def texts(server) -> InferenceClient:
    return InferenceClient(server.url, token="none")


def test_chat_whole_and_streamed(chats):
    asked: Any = {"model": "toy", "max_tokens": 8, "temperature": 0}
    whole = chats.chat_completion(HELLO, **asked)
    pieces = list(chats.chat_completion(HELLO, stream=True, **asked))
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert said == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 8


def test_chat_with_a_schema_and_with_tools(chats):
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    made = chats.chat_completion(HELLO, model="toy", response_format=form, max_tokens=200)
    assert json.loads(made.choices[0].message.content)["city"] in ("Oslo", "Rome")
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    made = chats.chat_completion(
        HELLO, model="toy", tools=[tool], tool_choice="required", max_tokens=300
    )
    call = made.choices[0].message.tool_calls[0].function
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")


def test_chat_logprobs(chats):
    made = chats.chat_completion(HELLO, model="toy", logprobs=True, top_logprobs=2, max_tokens=4)
    assert made.choices[0].logprobs.content[0].top_logprobs


def test_text_generation(texts):
    whole = texts.text_generation("hello", max_new_tokens=6)
    assert "".join(texts.text_generation("hello", max_new_tokens=6, stream=True)) == whole
    told = texts.text_generation("hello", max_new_tokens=6, details=True)
    assert told.generated_text == whole
    assert told.details.generated_tokens == len(told.details.tokens)
    digits = texts.text_generation(
        "hello", max_new_tokens=40, grammar={"type": "regex", "value": "[0-9]{3}"}
    )
    assert len(digits) == 3
    assert digits.isdecimal()


def test_errors(chats, texts):
    with pytest.raises(HfHubHTTPError, match="404"):
        chats.chat_completion(HELLO, model="other")
    with pytest.raises(ValidationError, match="context length"):
        texts.text_generation("hello " * 20_000, max_new_tokens=6)
