"""`/api/...` over a scripted engine: python -m pytest tests/serve/dialects/test_ollama.py"""

import base64
import io
from datetime import datetime

import pytest
from PIL import Image

from herdling.errors import Error

CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hello"}]}
GENERATE = {"model": "toy", "prompt": "hello"}
COUNTS = ("prompt_eval_count", "eval_count")
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_chat_streams_lines_unless_told_otherwise(api, engine):
    *pieces, last = api.lines("/api/chat", CHAT)
    assert "".join(p["message"]["content"] for p in pieces) == "the dog"
    assert {p["message"]["role"] for p in pieces} == {"assistant"}
    assert {p["done"] for p in pieces} == {False}
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "stop", "")
    assert last["prompt_eval_count"] == len(engine.requests[0].ids)
    assert last["eval_count"] == len(engine.lm.tokenizer.encode("the dog")) + 1
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (200_000_000, 300_000_000)
    assert all(isinstance(last[name], int) for name in DURATIONS)
    datetime.fromisoformat(last["created_at"])


def test_one_object(api):
    reply = api.post("/api/chat", {**CHAT, "stream": False, "options": {"num_predict": 1}}).json()
    assert reply["message"] == {"role": "assistant", "content": "the"}
    assert (reply["done"], reply["done_reason"], reply["model"]) == (True, "length", "toy")
    assert reply.keys() >= {*COUNTS, *DURATIONS}


def test_calls_have_objects_for_arguments(api, engine):
    engine.script = lambda request: '[weather(city="Oslo")]'
    body = {**CHAT, "tools": [{"type": "function", "function": {"name": "weather"}}]}
    whole = api.post("/api/chat", {**body, "stream": False}).json()["message"]["tool_calls"]
    streamed = [line["message"]["tool_calls"] for line in api.lines("/api/chat", body)[:-1]]
    for (call,) in (whole, *streamed):
        assert call["function"]["name"] == "weather"
        assert call["function"]["arguments"] == {"city": "Oslo"}


def test_generate(api, engine):
    *pieces, last = api.lines("/api/generate", {**GENERATE, "model": "toy:latest"})
    assert "".join(p["response"] for p in pieces) == "the dog"
    assert last["done"] is True
    whole = api.post("/api/generate", {**GENERATE, "stream": False, "system": "brief"}).json()
    assert whole["response"] == "the dog"
    said = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hello"}]
    assert list(engine.requests[1].ids) == engine.lm.render(said).ids


def test_context_begins_the_next_prompt(api, engine):
    first = api.post("/api/generate", {**GENERATE, "stream": False}).json()["context"]
    assert first[: len(engine.requests[0].ids)] == list(engine.requests[0].ids)
    api.post("/api/generate", {**GENERATE, "prompt": "more", "context": first, "stream": False})
    more = engine.lm.render([{"role": "user", "content": "more"}]).ids
    assert list(engine.requests[1].ids) == first + more[1:]


def test_a_raw_prompt_is_continued(api, engine):
    api.lines("/api/generate", {**GENERATE, "raw": True})
    tok = engine.lm.tokenizer
    assert list(engine.requests[0].ids) == [tok.bos, *tok.encode("hello")]


def test_pictures_are_bare_base64(api, engine):
    body = {**GENERATE, "images": [picture()], "stream": False}
    reply = api.post("/api/generate", body)
    assert engine.requests[0].tiles is not None
    assert "context" not in reply.json()
    message = {"role": "user", "content": "?", "images": [picture()]}
    api.lines("/api/chat", {"model": "toy", "messages": [message]})
    assert engine.requests[1].tiles is not None


def test_logprobs(api):
    body = {**CHAT, "logprobs": True, "top_logprobs": 1}
    told = [entry for line in api.lines("/api/chat", body) for entry in line.get("logprobs", [])]
    assert "".join(entry["token"] for entry in told) == "the dog"
    assert told == api.post("/api/chat", {**body, "stream": False}).json()["logprobs"]
    assert told[0]["top_logprobs"][0]["token"] == told[0]["token"]


def test_nothing_to_say_only_loads(api, engine):
    assert api.post("/api/generate", {"model": "toy"}).json()["done_reason"] == "load"
    unload = api.post("/api/chat", {"model": "toy", "messages": [], "keep_alive": 0}).json()
    assert (unload["done_reason"], unload["message"]["content"]) == ("unload", "")
    assert engine.requests == []


def test_models(make_api, engine):
    api = make_api(engine, aliases=("other",))
    assert api.get("/api/version").json()["version"]
    tags = api.get("/api/tags").json()["models"]
    assert [model["name"] for model in tags] == ["toy:latest", "other:latest"]
    assert len({model["digest"] for model in tags}) == 2
    assert all(len(model["digest"]) == 64 for model in tags)
    count = sum(p.numel() for p in engine.lm.model.parameters())
    assert tags[0]["size"] == 4 * count
    assert tags[0]["details"]["family"] == "llama4"
    running = api.get("/api/ps").json()["models"][0]
    assert running["context_length"] == 2048
    shown = api.post("/api/show", {"model": tags[1]["name"]}).json()
    assert shown["model_info"]["general.parameter_count"] == count
    assert "vision" in shown["capabilities"]
    assert "{{" in shown["template"]


def test_embeddings_are_those_of_openais_route(api):
    expected = api.post("/v1/embeddings", {"input": ["hello", "the dog"]}).json()["data"]
    reply = api.post("/api/embed", {"model": "toy", "input": ["hello", "the dog"]}).json()
    assert reply["embeddings"] == [entry["embedding"] for entry in expected]
    assert reply["prompt_eval_count"] > 2
    one = api.post("/api/embeddings", {"model": "toy", "prompt": "hello"}).json()
    assert one == {"embedding": expected[0]["embedding"]}
    short = api.post("/api/embed", {"model": "toy", "input": "hello", "dimensions": 4}).json()
    assert len(short["embeddings"][0]) == 4


def test_long_texts_are_cut_unless_truncate_is_false(api):
    body = {"model": "toy", "input": "the dog " * 2000}
    assert api.post("/api/embed", body).json()["prompt_eval_count"] == 2048
    refused = api.post("/api/embed", {**body, "truncate": False})
    assert refused.status_code == 400
    assert "2048" in refused.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/chat", {"messages": []}, 400),
        ("/api/chat", {**CHAT, "model": "other"}, 404),
        (
            "/api/chat",
            {"model": "toy", "messages": [{"role": "user", "content": "dog " * 3000}]},
            400,
        ),
        ("/api/generate", {**GENERATE, "suffix": "x"}, 400),
        ("/api/generate", {**GENERATE, "template": "x"}, 400),
        ("/api/generate", {**GENERATE, "raw": True, "system": "x"}, 400),
        ("/api/generate", {**GENERATE, "context": ["x"]}, 400),
        ("/api/show", {"model": "other"}, 404),
        ("/api/embed", {"model": "toy"}, 400),
        ("/api/nothing", {}, 404),
    ],
)
def test_errors_are_a_sentence(api, path, body, status):
    reply = api.post(path, body)
    assert reply.status_code == status
    assert reply.json().keys() == {"error"}
    assert isinstance(reply.json()["error"], str)


def test_an_error_in_a_stream_is_its_last_line(api, engine):
    engine.poison = lambda request: Error("no luck")
    assert api.lines("/api/chat", CHAT)[-1] == {"error": "no luck"}
