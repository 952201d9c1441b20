"""`/ping` and `/invocations` over a scripted engine.

python -m pytest tests/serve/dialects/test_invocations.py
"""

import json

import pytest

from herdling.errors import Error
from herdling.serve.service import Service, Settings

PATH = "/invocations"
HELLO = [{"role": "user", "content": "hello"}]


def test_ping(api, make_api, engine):
    alive = api.get("/ping")
    assert (alive.status_code, alive.content) == (200, b"")
    api.service.failure = "broken"
    assert api.get("/ping").status_code == 503


def test_ping_while_loading(ask):
    assert ask(Service(Settings(name="toy")), "GET", "/ping").status_code == 503


def test_bodies_of_other_apis_are_answered_as_these_do(api, engine):
    chat = api.post(PATH, {"messages": HELLO, "model": "toy"}).json()
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["content"] == "the dog"
    complete = api.post(PATH, {"prompt": "hello", "max_tokens": 1}).json()
    assert (complete["object"], complete["choices"][0]["text"]) == ("text_completion", "the")
    embedded = api.post(PATH, {"input": ["a", "b"]}).json()
    assert [entry["object"] for entry in embedded["data"]] == ["embedding"] * 2
    assert api.post(PATH, {"input": HELLO}).json()["object"] == "response"
    tgi = api.post(PATH, {"inputs": "hello", "parameters": {"max_new_tokens": 1}}).json()
    assert tgi == [{"generated_text": "the"}]


def test_streams(api):
    reply = api.post(PATH, {"messages": HELLO, "stream": True})
    assert reply.text.endswith("data: [DONE]\n\n")
    body = {"inputs": "hello", "parameters": {}}
    assert api.events(PATH, body)[-1]["generated_text"] == "the dog"


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": ["a", "b"]},
        {"instances": [{"prompt": "a"}, {"prompt": "b"}]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["a"], ["b"]]}},
        {"dataframe_records": [{"text": "a"}, {"text": "b"}]},
    ],
)
def test_rows_are_answered_in_order(api, engine, body):
    engine.script = lambda request: engine.lm.tokenizer.decode(request.ids[1:]) + " dog"
    reply = api.post(PATH, {**body, "params": {"max_tokens": 9, "temperature": 0}})
    assert reply.json() == {"predictions": ["a dog", "b dog"]}
    assert {request.sampling.temperature for request in engine.requests} == {0}


def test_a_conversation_in_a_row(api, engine):
    rows = [{"messages": HELLO}, "hello"]
    reply = api.post(PATH, {"instances": rows, "params": {"max_new_tokens": 1}}).json()
    assert reply == {"predictions": ["the", "the"]}
    prompts = {tuple(request.ids) for request in engine.requests}
    assert tuple(engine.lm.render(HELLO).ids) in prompts


def test_csv(api):
    for kind in ("text/csv", "text/csv; charset=utf-8", "Text/CSV"):
        reply = api.call("POST", PATH, content="prompt\na\nb\n", headers={"content-type": kind})
        assert reply.json() == {"predictions": ["the dog"] * 2}


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-npy", "application/json; charset=latin-1", "text/csv; x=1"],
)
def test_other_content_types(api, kind):
    body = json.dumps({"inputs": "a"})
    reply = api.call("POST", PATH, content=body, headers={"content-type": kind})
    assert reply.status_code == 415
    assert reply.json()["error_code"] == "BAD_REQUEST"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "BAD_REQUEST"),
        ([], 400, "BAD_REQUEST"),
        ({"inputs": "a", "instances": ["b"]}, 400, "BAD_REQUEST"),
        ({"inputs": [1]}, 400, "BAD_REQUEST"),
        ({"inputs": ["a"] * 1000}, 400, "BAD_REQUEST"),
        ({"inputs": "a", "params": {"temperature": "hot"}}, 400, "BAD_REQUEST"),
        ({"inputs": ["a", "dog " * 3000]}, 400, "BAD_REQUEST"),
        ({"messages": []}, 400, "BAD_REQUEST"),
        ({"messages": HELLO, "model": "other"}, 404, "NOT_FOUND"),
        ({"prompt": "a", "n": 0}, 400, "BAD_REQUEST"),
    ],
)
def test_errors_fit_both_kinds_of_client(api, body, status, code):
    reply = api.post(PATH, body)
    assert reply.status_code == status
    told = reply.json()
    assert told["error_code"] == code
    assert told["message"] == told["error"]["message"]


def test_one_row_that_fails_fails_the_call(api, engine):
    bad = [engine.lm.tokenizer.bos, *engine.lm.tokenizer.encode("b")]
    engine.poison = lambda request: Error("no luck") if list(request.ids) == bad else None
    engine.endless = True
    reply = api.post(PATH, {"inputs": ["a", "b"], "params": {"max_tokens": 1000}})
    assert reply.status_code == 500
    assert (reply.json()["message"], reply.json()["error_code"]) == ("no luck", "INTERNAL_ERROR")
    assert engine.cancelled  # the other row
