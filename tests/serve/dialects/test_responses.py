"""`/v1/responses` over a scripted engine: python -m pytest tests/serve/dialects/test_responses.py"""

import pytest

from herdling.errors import Error

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather"}
REQUIRED = {
    *("id", "object", "created_at", "status", "error", "incomplete_details", "instructions"),
    *("model", "output", "metadata", "parallel_tool_calls", "tool_choice", "tools"),
    *("temperature", "top_p", "usage"),
}


def test_a_reply(api, engine):
    reply = api.post(
        PATH, {"model": "toy", "input": "hello", "metadata": {"k": "v"}, "new": 1}
    ).json()
    assert reply.keys() >= REQUIRED
    assert (reply["object"], reply["status"], reply["error"]) == ("response", "completed", None)
    (item,) = reply["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    (part,) = item["content"]
    assert (part["type"], part["text"], part["annotations"]) == ("output_text", "the dog", [])
    usage = reply["usage"]
    assert usage["input_tokens"] == len(engine.requests[0].ids)
    assert usage["output_tokens"] == len(engine.lm.tokenizer.encode("the dog")) + 1
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert reply["metadata"] == {"k": "v"}


def test_a_stream_names_and_numbers_every_event(api):
    events = api.events(PATH, {"input": "hello"})
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events]
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert len(deltas) > 1
    assert "".join(deltas) == "the dog" == events[-4]["text"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert len({e["item_id"] for e in events if "item_id" in e}) == 1


def test_a_short_reply_is_incomplete(api):
    body = {"input": "hello", "max_output_tokens": 1}
    reply = api.post(PATH, body).json()
    assert reply["status"] == reply["output"][0]["status"] == "incomplete"
    assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
    assert api.events(PATH, body)[-1]["type"] == "response.incomplete"


def test_a_call_is_an_item_of_its_own(api, engine):
    engine.script = lambda request: 'so [weather(city="Oslo")]'
    body = {"input": "hi", "tools": [WEATHER]}
    message, call = api.post(PATH, body).json()["output"]
    assert message["content"][0]["text"] == "so "
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert call["arguments"] == '{"city": "Oslo"}'
    assert call["call_id"].startswith("call_")
    events = api.events(PATH, body)
    name = "response.function_call_arguments"
    at = [e["type"] for e in events].index(f"{name}.delta")
    added, delta, done, item, completed = events[at - 1 :]
    assert (added["item"]["status"], added["item"]["arguments"]) == ("in_progress", "")
    assert delta["delta"] == done["arguments"] == item["item"]["arguments"] == call["arguments"]
    assert {added["output_index"], delta["output_index"], item["output_index"]} == {1}
    assert events[at - 2]["item"]["type"] == "message"  # which is done before the call begins
    assert len(completed["response"]["output"]) == 2


def test_calls_without_words_leave_no_empty_message(api, engine):
    engine.script = lambda request: "[weather()]"
    (call,) = api.post(PATH, {"input": "hi", "tools": [WEATHER]}).json()["output"]
    assert call["type"] == "function_call"


def test_a_conversation_goes_on_from_a_stored_response(api, engine):
    first = api.post(PATH, {"input": "hello", "instructions": "be brief"}).json()
    api.post(PATH, {"input": "and?", "previous_response_id": first["id"]})
    said = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "and?"},
    ]
    assert list(engine.requests[1].ids) == engine.lm.render(said).ids
    assert api.get(f"{PATH}/{first['id']}").json() == first
    assert api.call("DELETE", f"{PATH}/{first['id']}").json()["deleted"] is True
    for reply in (
        api.get(f"{PATH}/{first['id']}"),
        api.post(PATH, {"input": "x", "previous_response_id": first["id"]}),
    ):
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "previous_response_not_found"


def test_streams_are_stored_and_store_false_is_not(api):
    streamed = api.events(PATH, {"input": "hello"})[-1]["response"]
    assert api.get(f"{PATH}/{streamed['id']}").json() == streamed
    unstored = api.post(PATH, {"input": "hello", "store": False}).json()
    assert unstored["store"] is False
    assert api.get(f"{PATH}/{unstored['id']}").status_code == 404


def test_logprobs_are_those_of_the_text(api):
    body = {"input": "hello", "top_logprobs": 2}
    told = api.post(PATH, body).json()["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in told) == "the dog"
    assert bytes(told[0]["bytes"]) == told[0]["token"].encode()
    assert [len(entry["top_logprobs"]) for entry in told] == [2] * len(told)
    deltas = [e for e in api.events(PATH, body) if e["type"] == "response.output_text.delta"]
    streamed = [entry["token"] for e in deltas for entry in e["logprobs"]]
    assert streamed == [entry["token"] for entry in told]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, None),
        ({"input": "x", "model": "other"}, 404, "model_not_found"),
        ({"input": "the dog " * 2000}, 400, "context_length_exceeded"),
        ({"input": "x", "stream": "yes"}, 400, None),
    ],
)
def test_errors(api, body, status, code):
    reply = api.post(PATH, body)
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    assert reply.json()["error"]["code"] == code


def test_an_error_in_a_stream_fails_the_response(api, engine):
    engine.poison = lambda request: Error("no luck")
    *_, last = api.events(PATH, {"input": "hello"})
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "no luck"}
