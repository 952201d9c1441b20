"""`openai`, 2.x and 3.x, over what the server offers of its API.

    HERDLING_PYTHON=.venv/bin/python .clients/sdk/bin/python -m pytest -c tests/clients/pytest.ini \
        tests/clients/test_openai.py
"""

import asyncio
import base64
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

HELLO: Any = [{"role": "user", "content": "hello"}]
WHOLE: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


class Trip(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2, 3]
    by_train: bool


@pytest.fixture(scope="module")
def api(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(api) -> Callable[..., Any]:
    def chat(**more: Any) -> Any:
        given = {"model": "toy", "messages": HELLO, "max_tokens": 8, **more}
        return api.chat.completions.create(**given)

    return chat


def fits(kind: Any, made: Any) -> None:
    """The SDK builds its objects unchecked; this checks them."""
    TypeAdapter(kind).validate_python(made.model_dump(exclude_unset=True))


# ---- chat


def test_a_reply(chat):
    reply = chat(**WHOLE)
    fits(ChatCompletion, reply)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert chat(**WHOLE).choices[0].message.content == reply.choices[0].message.content


def test_a_stream_is_the_reply_in_pieces(chat):
    chunks = list(chat(stream=True, **WHOLE))
    for chunk in chunks:
        fits(ChatCompletionChunk, chunk)
        assert len(chunk.choices) == 1
        assert chunk.usage is None
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == chat(**WHOLE).choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_the_usage_chunk(chat):
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, **WHOLE))
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert all("usage" in c.model_fields_set and c.usage is None for c in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 8


def test_the_stream_helper(api):
    with api.chat.completions.stream(
        model="toy", messages=HELLO, response_format=Trip, max_tokens=200, seed=3
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Trip)


def test_several_choices_and_their_seeds(chat):
    def texts(**more: Any) -> list[str]:
        return [
            c.message.content for c in chat(n=3, temperature=2.0, max_tokens=16, **more).choices
        ]

    first = texts(seed=7)
    assert texts(seed=7) == first
    assert len(set(first)) > 1
    indices = {chunk.choices[0].index for chunk in chat(n=3, stream=True)}
    assert indices == {0, 1, 2}


def test_logprobs(chat):
    choice = chat(logprobs=True, top_logprobs=3, **WHOLE).choices[0]
    content = choice.logprobs.content
    assert len(content) == 8
    for token in content:
        assert token.logprob <= 0
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert token.logprob == best[0]  # greedy
    said = bytes(byte for token in content for byte in token.bytes)
    assert said.decode(errors="replace") == choice.message.content


def test_stop_strings(chat):
    whole = chat(max_tokens=24, **WHOLE).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    reply = chat(max_tokens=24, stop=[stop], **WHOLE).choices[0]
    assert reply.finish_reason == "stop"
    assert reply.message.content == whole[: whole.index(stop)]


def test_a_picture(chat, picture):
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "hello"}]}]
    shown = chat(messages=messages)
    assert shown.usage.prompt_tokens > chat().usage.prompt_tokens


def test_roles_and_a_tool_loop(chat):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'},
    }
    messages = [
        {"role": "developer", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert chat(messages=messages, tools=[WEATHER]).choices[0].message.content is not None


# ---- tools and formats


def check_call(call: Any) -> None:
    assert call.type == "function"
    assert call.id
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["city"] in ("Oslo", "Rome")
        assert arguments["days"] in (1, 2, 3)
    else:
        assert call.function.name == "clock"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_be(chat, choice):
    tools = [WEATHER, CLOCK]
    reply = chat(tools=tools, tool_choice=choice, max_tokens=600, seed=1, parallel_tool_calls=False)
    fits(ChatCompletion, reply)
    (call,) = reply.choices[0].message.tool_calls
    check_call(call)
    assert reply.choices[0].finish_reason == "tool_calls"
    assert choice == "required" or call.function.name == "weather"


def test_auto_and_none_leave_the_model_free(chat):
    for choice in ("auto", "none"):
        message = chat(tools=[WEATHER], tool_choice=choice).choices[0].message
        assert message.content or message.tool_calls
    assert not chat(tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls


def test_a_call_in_a_stream(chat):
    stream = chat(tools=[WEATHER], tool_choice="required", max_tokens=600, stream=True, seed=1)
    calls: dict[int, dict[str, str]] = {}
    finish = None
    for chunk in stream:
        fits(ChatCompletionChunk, chunk)
        finish = chunk.choices[0].finish_reason or finish
        for piece in chunk.choices[0].delta.tool_calls or []:
            whole = calls.setdefault(piece.index, {"arguments": ""})
            if piece.id:
                assert "id" not in whole
                whole |= {"id": piece.id, "name": piece.function.name}
            whole["arguments"] += piece.function.arguments or ""
    assert finish == "tool_calls"
    assert calls
    for whole in calls.values():
        assert json.loads(whole["arguments"])["city"] in ("Oslo", "Rome")


def test_parse_gives_an_object(api):
    made = api.chat.completions.parse(
        model="toy", messages=HELLO, response_format=Trip, max_tokens=200, seed=3
    )
    assert isinstance(made.choices[0].message.parsed, Trip)


def test_parse_gives_the_arguments_of_a_call(api):
    tool = openai.pydantic_function_tool(Trip)
    made = api.chat.completions.parse(
        model="toy", messages=HELLO, tools=[tool], tool_choice="required", max_tokens=600, seed=3
    )
    assert isinstance(made.choices[0].message.tool_calls[0].function.parsed_arguments, Trip)


def test_a_schema_that_cannot_be_kept_is_refused_by_name(chat):
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        chat(response_format=form)


# ---- completions


def test_completions_of_texts_and_ids(api):
    ids = json.loads(api.post("/../tokenize", cast_to=str, body={"prompt": "hello"}))["tokens"]
    by_ids = api.completions.create(model="toy", prompt=[ids, ids], max_tokens=5, **WHOLE)
    by_text = api.completions.create(model="toy", prompt=["hello", "more"], max_tokens=5, **WHOLE)
    assert [choice.index for choice in by_ids.choices] == [0, 1]
    assert by_ids.choices[0].text == by_ids.choices[1].text == by_text.choices[0].text
    assert by_ids.usage.completion_tokens == 10


def test_completions_echo_and_logprobs(api):
    ids = json.loads(api.post("/../tokenize", cast_to=str, body={"prompt": "hello"}))["tokens"]
    made = api.completions.create(
        model="toy", prompt=[ids], max_tokens=2, echo=True, logprobs=2, **WHOLE
    ).choices[0]
    table = made.logprobs
    assert len(table.tokens) == len(table.text_offset) == len(table.token_logprobs) == len(ids) + 2
    assert table.token_logprobs[0] is None
    assert all(value <= 0 for value in table.token_logprobs[1:])
    assert made.text.startswith("hello") or "hello" in made.text
    plain = api.completions.create(model="toy", prompt=[ids], max_tokens=2, **WHOLE).choices[0].text
    assert made.text.endswith(plain)


def test_a_stream_of_completions(api):
    def ask(**more: Any) -> Any:
        return api.completions.create(model="toy", prompt="hello", max_tokens=6, **WHOLE, **more)

    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == ask().choices[0].text
    assert chunks[-1].usage.completion_tokens == 6


# ---- responses, embeddings, models


def test_responses(api):
    made = api.responses.create(
        model="toy", input="hello", instructions="Be brief.", max_output_tokens=8
    )
    assert made.object == "response"
    assert made.output_text
    assert made.usage.output_tokens <= 8
    again = api.responses.create(
        model="toy", input="and?", previous_response_id=made.id, max_output_tokens=8
    )
    assert again.usage.input_tokens > made.usage.input_tokens


def test_a_stream_of_responses(api):
    events = list(
        api.responses.create(model="toy", input="hello", max_output_tokens=8, stream=True)
    )
    for event in events:
        fits(ResponseStreamEvent, event)
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == events[-1].response.output_text


def test_responses_parse(api):
    made = api.responses.parse(model="toy", input="hello", text_format=Trip, max_output_tokens=200)
    assert isinstance(made.output_parsed, Trip)


def test_embeddings_as_floats_and_as_base64(api):
    def embed(**more: Any) -> Any:
        return api.embeddings.create(model="toy", input=["hello", "the quick fox"], **more).data

    plain, usual = embed(encoding_format="float"), embed()
    coded = embed(encoding_format="base64")[1].embedding
    numbers = struct.unpack(f"<{len(usual[1].embedding)}f", base64.b64decode(coded))
    assert [entry.index for entry in plain] == [0, 1]
    assert numbers == pytest.approx(plain[1].embedding, abs=1e-6)
    assert usual[1].embedding == pytest.approx(plain[1].embedding, abs=1e-6)
    assert sum(x * x for x in numbers) == pytest.approx(1, abs=1e-4)


def test_models(api):
    assert [model.id for model in api.models.list()] == ["toy"]
    assert api.models.retrieve("toy").object == "model"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other")


# ---- errors


def test_bad_requests(chat, api):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(messages=[{"role": "user", "content": "hello " * 20_000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        chat(messages=[])
    with pytest.raises(openai.NotFoundError):
        chat(model="other")
    with pytest.raises(openai.NotFoundError):
        api.post("/no/such/path", cast_to=str, body={})


def test_the_key(guarded):
    def ask(key: str) -> Any:
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)
        return client.models.list().data[0].id

    assert ask("secret") == "toy"
    with pytest.raises(openai.AuthenticationError):
        ask("wrong")


def test_a_full_queue_is_a_rate_limit_that_retries_get_past(guarded):
    """One reply runs, one waits; the next is refused, and told when to come again."""
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret", max_retries=0)

    def stream() -> Any:
        return client.chat.completions.create(
            model="toy",
            messages=HELLO,
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )

    running = stream()
    next(running)  # its first token is there, so the queue is empty

    async def main() -> None:
        other = openai.AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key="secret", max_retries=0)
        ask: Any = {"model": "toy", "messages": HELLO, "max_tokens": 2}
        waiting = asyncio.create_task(other.chat.completions.create(**ask))
        while guarded.open < 2:
            await asyncio.sleep(0.02)
        with pytest.raises(openai.RateLimitError) as caught:
            await other.chat.completions.create(**ask)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        patient = other.with_options(max_retries=5)
        third = asyncio.create_task(patient.chat.completions.create(**ask))
        await asyncio.sleep(0.2)
        running.close()
        assert (await waiting).choices
        assert (await third).choices
        await other.close()

    asyncio.run(main())
    guarded.until_open(0)


# ---- leaving


def test_a_stream_that_is_closed_ends_its_reply(api, server):
    sample = 'herdling_requests_total{route="/v1/chat/completions",status="499"}'
    before = server.metric(sample)
    stream = api.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    server.until_open(1)
    stream.close()
    server.until_open(0, 5)
    assert server.metric(sample) == before + 1


def test_a_call_that_times_out_ends_its_reply(api, server):
    with pytest.raises(openai.APITimeoutError):
        api.with_options(timeout=0.5).chat.completions.create(
            model="toy", messages=HELLO, max_tokens=3000, extra_body={"ignore_eos": True}
        )
    server.until_open(0, 5)


def test_a_task_that_is_cancelled_ends_its_reply(server):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            ask: Any = {"max_tokens": 3500, "extra_body": {"ignore_eos": True}}
            call = client.chat.completions.create(model="toy", messages=HELLO, **ask)
            task = asyncio.create_task(call)
            while server.open == 0:
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    server.until_open(0, 5)


def test_many_at_once(server):
    async def main() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            ask: Any = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
            calls = [
                client.completions.create(model="toy", prompt=f"number {i % 4}", **ask)
                for i in range(16)
            ]
            return [made.choices[0].text for made in await asyncio.gather(*calls)]

    texts = asyncio.run(main())
    assert [texts[i] for i in range(16)] == [texts[i % 4] for i in range(16)]
