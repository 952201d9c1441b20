"""`/v1/chat/completions`: python -m pytest tests/serve/test_openai_chat.py"""

import json

import pytest

from herdling.errors import Error

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def chunks_of(reply) -> list[dict]:
    """The chunks of a stream, whose framing is checked."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, last, end = reply.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@pytest.fixture
def chat(make_service, engine, ask):
    """chat(**body) -> the answer of the scripted engine."""
    service = make_service(engine)

    def chat(**body):
        return ask(service, "POST", PATH, json={"model": "toy", "messages": HELLO, **body})

    return chat


def test_a_reply_has_every_field_that_clients_need(chat, engine):
    reply = chat().json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    assert isinstance(reply["created"], int)
    assert reply["model"] == "toy"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "the dog", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    new = len(engine.lm.tokenizer.encode("the dog")) + 1
    prompt = len(engine.requests[0].ids)
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_settings_reach_the_engine(chat, engine):
    chat(
        max_tokens=9, max_completion_tokens=7, temperature=0.5, top_p=0.8, top_k=-1, min_p=0.1,
        typical_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1,
        logit_bias={"5": -100}, seed=11, n=2, stop="now", user="me", ignore_eos=True,
        stop_token_ids=[7], chat_template_kwargs={"thinking": True}, an_unknown_key=[1],
    )  # fmt: skip
    first, second = engine.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.8, 0)
    assert (sampling.min_p, sampling.typical_p, sampling.repetition_penalty) == (0.1, 0.9, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert dict(sampling.logit_bias) == {5: -100.0}
    assert (first.seed, second.seed) == (11, 12)
    assert (first.max_tokens, first.stop, first.stop_ids) == (7, ("now",), (7,))


def test_defaults_are_those_of_chat(chat, engine, tok):
    chat()
    request = engine.requests[0]
    assert (request.sampling.temperature, request.sampling.top_p) == (0.6, 0.9)
    assert (request.seed, request.stop_ids) == (None, tuple(tok.stop_ids))
    assert request.max_tokens == 2048  # the context


def test_a_stream_begins_with_a_role_and_ends_with_a_reason(chat):
    chunks = chunks_of(chat(stream=True))
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == "the dog"
    assert all(c["delta"]["content"] for c in choices[1:-1])
    assert choices[-1]["delta"] == {}
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_once_in_a_chunk_of_its_own(chat):
    chunks = chunks_of(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    running = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        c["usage"]["completion_tokens"]
        for c in chunks_of(chat(stream=True, stream_options=running))
    ]
    assert counts == sorted(counts)
    assert counts[-1] == chunks[-1]["usage"]["completion_tokens"]


def test_choices_are_streamed_side_by_side(chat):
    chunks = chunks_of(chat(stream=True, n=3))
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in own) == "the dog"
        assert own[-1]["finish_reason"] == "stop"


def test_length_is_told(chat):
    reply = chat(max_tokens=1).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_content(chat, tok, stream):
    reply = chat(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        parts = [c["choices"][0]["logprobs"] for c in chunks_of(reply)]
        content = [token for part in parts if part for token in part["content"]]
    else:
        content = reply.json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == "the dog"
    assert bytes(b for token in content for b in token["bytes"]) == b"the dog"
    first = content[0]
    assert first["logprob"] == -0.5
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -2.0]


@pytest.fixture
def calling(engine):
    """The model answers with words and a call."""
    engine.script = lambda request: 'the dog [weather(city="Oslo")]'


def test_calls_in_a_reply(chat, calling):
    choice = chat(tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "the dog "
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


def test_a_reply_of_calls_alone_has_no_content(chat, engine):
    engine.script = lambda request: "[weather(city=1), now()]"
    message = chat(tools=[TOOL]).json()["choices"][0]["message"]
    assert message["content"] is None
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather", "now"]
    message = chat(tools=[TOOL], parallel_tool_calls=False).json()["choices"][0]["message"]
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather"]


def test_calls_are_streamed_by_index_after_the_words(chat, calling):
    chunks = chunks_of(chat(tools=[TOOL], stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == "the dog "
    calls = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    assert calls[0]["index"] == 0
    assert calls[0]["type"] == "function"
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert all(set(call) == {"index", "function"} for call in calls[1:])
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"city": "Oslo"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_only_text(chat, calling, engine):
    for body in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = chat(**body).json()["choices"][0]
        assert choice["message"]["content"] == 'the dog [weather(city="Oslo")]'
        assert choice["finish_reason"] == "stop"
    assert engine.requests[0].ids == engine.requests[1].ids


def test_required_and_named_calls_come_with_a_grammar(chat, calling, engine):
    other = {"type": "function", "function": {"name": "now"}}
    chat(tools=[TOOL, other], tool_choice="required")
    chat(tools=[TOOL, other], tool_choice={"type": "function", "function": {"name": "weather"}})
    required, named = engine.requests
    assert required.grammar is not None
    assert named.grammar is not None
    assert "now" in required.grammar.text
    assert "now" not in named.grammar.text


def test_formats_become_grammars(chat, engine):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat(response_format={"type": "text"})
    chat(response_format={"type": "json_object"})
    chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    text, json_object, json_schema = (request.grammar for request in engine.requests)
    assert text is None
    assert json_object.kind == "json"
    assert json_schema.kind == "json_schema"
    assert json.loads(json_schema.text) == schema


@pytest.mark.parametrize("field", ["schema", "value"])
def test_a_schema_beside_json_object_counts(chat, engine, field):
    """As llama.cpp's clients and huggingface_hub send it; read past, it would not be kept."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat(response_format={"type": "json_object", field: schema})
    assert engine.requests[0].grammar.kind == "json_schema"
    assert json.loads(engine.requests[0].grammar.text) == schema
    refused = chat(response_format={"type": "json_object", field: "a schema"})
    assert refused.status_code == 400
    assert f"response_format.{field}" in refused.json()["error"]["message"]


def test_roles_and_parts_of_other_names_are_understood(chat, engine):
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    odd = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}], "name": "Ann"},
    ]
    chat(messages=plain)
    chat(messages=odd)
    assert engine.requests[0].ids == engine.requests[1].ids


def test_experts_of_every_token(make_service, ask, lm):
    service = make_service()
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0, "herdling": {"experts": True}}
    chunks = chunks_of(ask(service, "POST", PATH, json={**body, "stream": True}))
    whole = ask(service, "POST", PATH, json=body).json()
    tokens = [c["herdling"] for c in chunks if "token" in c.get("herdling", {})]
    assert len(tokens) == 4
    assert all(token["experts"] is None and len(token["top"]) == 5 for token in tokens)
    last = chunks[-1]["herdling"]
    layers = len(lm.config.text.moe_layers)
    assert [row["token"] for row in last["reply"]] == [token["token"] for token in tokens]
    assert [row["experts"] is None for row in last["reply"]] == [False] * 3 + [True]
    told = [token["previous_experts"] for token in tokens]
    assert told == [None, *(row["experts"] for row in last["reply"][:-1])]
    assert all(len(row["experts"]) == layers for row in last["prompt"])
    assert whole["choices"][0]["herdling"]["reply"] == last["reply"]
    assert (
        "herdling"
        not in chunks_of(
            ask(service, "POST", PATH, json={"messages": HELLO, "max_tokens": 1, "stream": True})
        )[-1]
    )


def test_the_same_seed_gives_the_same_reply_streamed_or_not(make_service, ask):
    service = make_service()
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2}
    whole = ask(service, "POST", PATH, json=body).json()["choices"]
    chunks = chunks_of(ask(service, "POST", PATH, json={**body, "stream": True}))
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == whole[index]["message"]["content"]
    assert whole[0]["message"]["content"] != whole[1]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "queen", "content": ""}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, None),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [str(i) for i in range(17)]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": [{}]}, None),
        ({"tools": [TOOL] * 200}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_400_that_names_the_field(chat, body, param):
    reply = chat(**body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_prompt_that_is_too_long_is_told_both_numbers(chat, tok):
    text = "word " * 3000
    error = chat(messages=[{"role": "user", "content": text}]).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    assert any(str(len(tok.encode(text)) + extra) in error["message"] for extra in range(40))


def test_an_unknown_model_is_a_404(chat):
    reply = chat(model="gpt-9")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_is_an_error_in_its_own_shape(chat, engine, stream):
    engine.poison = lambda request: Error("the logits are not finite")
    reply = chat(stream=stream)
    if stream:
        assert reply.status_code == 200
        error = json.loads(reply.text.split("\n\n")[0].removeprefix("data: "))["error"]
        assert reply.text.endswith("data: [DONE]\n\n")
    else:
        assert reply.status_code == 500
        error = reply.json()["error"]
    assert error["type"] == "server_error"
    assert "not finite" in error["message"]


def test_an_unenforceable_schema_is_a_400_that_names_the_keyword(make_service, ask):
    schema = {"type": "object", "not": {"type": "string"}}
    body = {
        "messages": HELLO,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    reply = ask(make_service(), "POST", PATH, json=body)
    assert reply.status_code == 400, reply.text
    assert "not" in reply.json()["error"]["message"]
