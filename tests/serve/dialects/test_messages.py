"""`/v1/messages` over a scripted engine: python -m pytest tests/serve/dialects/test_messages.py"""

import json

import pytest

from herdling.errors import Error
from herdling.infer.request import Completion, Request
from herdling.serve.dialects.messages import stop_sequence

PATH = "/v1/messages"
USER = {"role": "user", "content": "hello"}
BODY = {"model": "toy", "max_tokens": 50, "messages": [USER]}
WEATHER = {"name": "weather", "input_schema": {"type": "object"}}


def test_a_message(api, engine):
    reply = api.post(PATH, {**BODY, "system": "brief", "new": 1}).json()
    assert reply.pop("id").startswith("msg_")
    said = [{"role": "system", "content": "brief"}, USER]
    assert list(engine.requests[0].ids) == engine.lm.render(said).ids
    new = len(engine.lm.tokenizer.encode("the dog")) + 1
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": "toy",
        "content": [{"type": "text", "text": "the dog"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(engine.requests[0].ids),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": new,
        },
    }


def test_a_stream(api):
    start, ping, opened, *deltas, closed, last, stop = api.events(PATH, BODY)
    assert start["type"] == "message_start"
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    assert start["message"]["usage"]["input_tokens"] > 0
    assert ping == {"type": "ping"}
    block = {"type": "text", "text": ""}
    assert opened == {"type": "content_block_start", "index": 0, "content_block": block}
    assert {d["type"] for d in deltas} == {"content_block_delta"}
    assert "".join(d["delta"]["text"] for d in deltas) == "the dog"
    assert closed == {"type": "content_block_stop", "index": 0}
    assert last["type"] == "message_delta"
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"]["output_tokens"] > 0
    assert stop == {"type": "message_stop"}


def test_tool_use(api, engine):
    engine.script = lambda request: 'so [weather(city="Oslo"), weather()]'
    body = {**BODY, "tools": [WEATHER]}
    reply = api.post(PATH, body).json()
    text, first, second = reply["content"]
    assert (text["text"], reply["stop_reason"]) == ("so ", "tool_use")
    assert (first["type"], first["name"], first["input"]) == (
        "tool_use",
        "weather",
        {"city": "Oslo"},
    )
    assert first["id"].startswith("toolu_")
    assert second["input"] == {}
    blocks: dict[int, list[dict]] = {}
    for event in api.events(PATH, body):
        if "index" in event:
            blocks.setdefault(event["index"], []).append(event)
    assert list(blocks) == [0, 1, 2]
    for events in blocks.values():
        assert events[0]["type"] == "content_block_start"
        assert events[-1]["type"] == "content_block_stop"
    opened, delta, _ = blocks[1]
    assert opened["content_block"]["input"] == {}
    assert delta["delta"]["type"] == "input_json_delta"
    assert json.loads(delta["delta"]["partial_json"]) == {"city": "Oslo"}


def test_one_call_at_a_time_where_asked(api, engine):
    engine.script = lambda request: "[weather(), weather()]"
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    reply = api.post(PATH, {**BODY, "tools": [WEATHER], "tool_choice": choice}).json()
    assert len(reply["content"]) == 1


def test_a_short_reply(api):
    assert api.post(PATH, {**BODY, "max_tokens": 1}).json()["stop_reason"] == "max_tokens"


def test_the_stop_sequence_that_ended_a_reply_is_told(tok):
    def found(said: str, text: str, ended: bool = False) -> str | None:
        ids = [*tok.encode(said), *([tok.eot] if ended else [])]
        request = Request([1], stop=("dog", "fox"), stop_ids=(tok.eot,))
        return stop_sequence(Completion(text, ids, "stop", 1, [0.0] * len(ids)), request, tok)

    assert found("the dog", "the ") == "dog"
    assert found("the fox jumps", "the ") == "fox"
    assert found("the cat", "the cat", ended=True) is None
    assert found("the", "the") is None


def test_the_model_itself_stops_at_a_sequence(model_api):
    body = {**BODY, "temperature": 0, "max_tokens": 12}
    text = model_api.post(PATH, body).json()["content"][0]["text"]
    stop = next(c for c in text[3:] if c != "\ufffd" and c not in text[:3])
    reply = model_api.post(PATH, {**body, "stop_sequences": ["never", stop]}).json()
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", stop)
    assert reply["content"][0]["text"] == text[: text.index(stop)]
    assert model_api.events(PATH, {**body, "stop_sequences": [stop]})[-2]["delta"] == {
        "stop_reason": "stop_sequence",
        "stop_sequence": stop,
    }


def test_a_begun_reply_goes_on(api, engine):
    api.post(PATH, {**BODY, "messages": [USER, {"role": "assistant", "content": "the fox"}]})
    expected = engine.lm.render([USER]).ids + engine.lm.tokenizer.encode("the fox")
    assert list(engine.requests[0].ids) == expected
    assert engine.requests[0].max_tokens == 50
    assert engine.requests[0].sampling.temperature == 0.6


def test_counting_tokens(api, engine):
    body = {"model": "toy", "messages": [USER], "tools": [WEATHER], "system": "brief"}
    count = api.post(f"{PATH}/count_tokens", body).json()
    api.post(PATH, {**body, "max_tokens": 5})
    assert count == {"input_tokens": len(engine.requests[0].ids)}


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"messages": []}, 400, "invalid_request_error", "max_tokens"),
        ({**BODY, "model": "other"}, 404, "not_found_error", "other"),
        ({**BODY, "messages": [{"role": "user", "content": "dog " * 3000}]}, 400, None, "2048"),
        ({**BODY, "tools": [{"name": "a name", "input_schema": {}}]}, 400, None, "tools[0]"),
    ],
)
def test_errors_have_anthropics_shape(api, body, status, kind, words):
    reply = api.post(PATH, body)
    assert reply.status_code == status
    assert reply.json().keys() == {"type", "error"}
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == (kind or "invalid_request_error")
    assert words in reply.json()["error"]["message"]


def test_counting_takes_what_is_too_long_and_refuses_unknown_models(api):
    long = {"messages": [{"role": "user", "content": "dog " * 3000}]}
    assert api.post(f"{PATH}/count_tokens", long).json()["input_tokens"] > 3000
    refused = api.post(f"{PATH}/count_tokens", {**long, "model": "other"})
    assert (refused.status_code, refused.json()["type"]) == (404, "error")


def test_keys_come_in_anthropics_header(make_api, engine):
    api = make_api(engine, keys=("secret",))
    refused = api.post(PATH, BODY)
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"
    assert api.post(PATH, BODY, headers={"x-api-key": "secret"}).status_code == 200


def test_an_error_in_a_stream_is_its_last_event(api, engine):
    engine.poison = lambda request: Error("no luck")
    last = api.events(PATH, BODY)[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "no luck"}}
