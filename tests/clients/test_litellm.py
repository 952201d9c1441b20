"""`litellm` as its users name a local server: model `openai/...` with `api_base`."""

import json
import os
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the net for prices when imported
import litellm

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def ask(server):
    def ask(**more: Any) -> Any:
        given = {"messages": HELLO, "max_tokens": 8, "temperature": 0, **more}
        return litellm.completion(
            "openai/toy", api_base=f"{server.url}/v1", api_key="none", max_retries=0, **given
        )

    return ask


def test_whole_and_streamed(ask):
    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_call(ask, stream):
    made = ask(tools=[WEATHER], tool_choice="required", max_tokens=300, stream=stream)
    if stream:
        made = litellm.stream_chunk_builder(list(made), messages=HELLO)
    call = made.choices[0].message.tool_calls[0].function
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    assert made.choices[0].finish_reason == "tool_calls"


def test_a_schema(ask):
    schema = WEATHER["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    made = ask(response_format=form, max_tokens=200)
    assert json.loads(made.choices[0].message.content)["city"] in ("Oslo", "Rome")


def test_text_completion_and_embedding(server):
    given: Any = {"api_base": f"{server.url}/v1", "api_key": "none"}
    made = litellm.text_completion(
        model="text-completion-openai/toy", prompt="hello", max_tokens=5, **given
    )
    assert made.choices[0].text
    assert len(litellm.embedding("openai/toy", input=["a", "b"], **given).data) == 2


def test_messages_and_responses(server):
    said = litellm.completion(
        "anthropic/toy", messages=HELLO, max_tokens=8, api_base=server.url, api_key="none"
    )
    assert said.choices[0].message.content
    made = litellm.responses(
        model="openai/toy",
        input="hello",
        max_output_tokens=8,
        api_base=f"{server.url}/v1",
        api_key="none",
    )
    assert made.output


def test_errors(ask):
    with pytest.raises(litellm.BadRequestError):
        ask(temperature=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": "hello " * 20_000}])
