"""`/generate` and its like over a scripted engine: python -m pytest tests/serve/dialects/test_tgi.py"""

import json

import pytest

from herdling.errors import Error
from herdling.serve.dialects.tgi import options
from herdling.serve.errors import ApiError

BODY = {"inputs": "hello"}


def test_a_text_goes_on(api, engine):
    assert api.post("/generate", BODY).json() == {"generated_text": "the dog"}
    tok = engine.lm.tokenizer
    request = engine.requests[0]
    assert list(request.ids) == [tok.bos, *tok.encode("hello")]
    assert (request.sampling.temperature, request.max_tokens) == (0, 100)


def test_parameters(api, engine):
    parameters = {
        "max_new_tokens": 1,
        "return_full_text": True,
        "truncate": 2,
        "seed": 4,
        "stop": ["x"],
    }
    reply = api.post("/generate", {**BODY, "parameters": parameters}).json()
    assert reply == {"generated_text": "hellothe"}
    request = engine.requests[0]
    assert (len(request.ids), request.seed, request.stop, request.max_tokens) == (2, 4, ("x",), 1)


def test_greedy_unless_something_says_to_sample():
    assert options({}).temperature == 0
    assert options({"do_sample": True}).temperature is None  # TGI's default, 1, is filled in later
    assert options({"top_p": 0.5}).temperature is None
    assert options({"temperature": 0.5}).temperature == 0.5
    for bad in ({"best_of": 2}, {"watermark": True}, {"max_new_tokens": 0}, {"top_p": 2}):
        with pytest.raises(ApiError):
            options(bad)


def test_details(api, engine):
    parameters = {"details": True, "top_n_tokens": 2, "seed": 3}
    told = api.post("/generate", {**BODY, "parameters": parameters}).json()["details"]
    assert (told["finish_reason"], told["seed"], told["prefill"]) == ("eos_token", 3, [])
    assert told["generated_tokens"] == len(told["tokens"]) == len(told["top_tokens"])
    *words, end = told["tokens"]
    assert "".join(token["text"] for token in words) == "the dog"
    assert [token["special"] for token in told["tokens"]] == [False] * len(words) + [True]
    assert end["id"] in engine.requests[0].stop_ids
    assert told["tokens"][0].keys() == {"id", "text", "logprob", "special"}


def test_the_model_tells_what_it_thought_of_the_prompt(model_api, tok):
    parameters = {"decoder_input_details": True, "max_new_tokens": 2}
    reply = model_api.post("/generate", {**BODY, "parameters": parameters}).json()
    prefill = reply["details"]["prefill"]
    assert [token["id"] for token in prefill] == [tok.bos, *tok.encode("hello")]
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in prefill[1:])
    assert reply["details"]["finish_reason"] == "length"


def test_a_stream_has_an_event_a_token(api, engine):
    events = api.events("/generate_stream", {**BODY, "parameters": {"details": True}})
    ids = [*engine.lm.tokenizer.encode("the dog"), engine.requests[0].stop_ids[0]]
    assert [e["token"]["id"] for e in events] == ids
    assert [e["index"] for e in events] == list(range(1, len(ids) + 1))
    assert "".join(e["token"]["text"] for e in events) == "the dog"
    *others, last = events
    assert {(e["generated_text"], e["details"]) for e in others} == {(None, None)}
    assert last["generated_text"] == "the dog"
    assert last["details"]["input_length"] == len(engine.requests[0].ids)
    assert last["details"]["finish_reason"] == "eos_token"


def test_huggingface_hub_posts_to_the_root(api):
    assert api.post("/", BODY).json() == [{"generated_text": "the dog"}]
    assert api.events("/", BODY)[-1]["generated_text"] == "the dog"


def test_grammars(model_api):
    def wrote(grammar):
        parameters = {"grammar": grammar, "max_new_tokens": 60}
        return model_api.post("/generate", {**BODY, "parameters": parameters}).json()[
            "generated_text"
        ]

    assert wrote({"type": "regex", "value": "[0-9]{3}"}).isdigit()
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    assert json.loads(wrote({"type": "json", "value": schema}))["a"] in (1, 2)
    assert json.loads(wrote({"type": "json", "value": json.dumps(schema)}))["a"] in (1, 2)


def test_info(api):
    told = api.get("/info").json()
    assert (told["model_id"], told["max_total_tokens"], told["router"]) == ("toy", 2048, "herdling")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": 3},
        {"inputs": "a", "parameters": []},
        {"inputs": "a", "parameters": {"best_of": 2}},
        {"inputs": "a", "parameters": {"temperature": -1}},
        {"inputs": "a", "parameters": {"adapter_id": "other"}},
        {"inputs": "a", "parameters": {"grammar": {"type": "xml"}}},
        {"inputs": "dog " * 3000},
    ],
)
def test_errors_have_tgis_shape_and_status(api, body):
    for path in ("/generate", "/generate_stream", "/"):
        reply = api.post(path, body)
        assert reply.status_code == 422
        assert reply.json().keys() == {"error", "error_type"}
        assert reply.json()["error_type"] == "validation"


def test_a_failure_while_writing(api, engine):
    engine.poison = lambda request: Error("no luck")
    reply = api.post("/generate", BODY)
    assert reply.status_code == 424
    assert reply.json() == {"error": "no luck", "error_type": "generation"}
    assert api.events("/generate_stream", BODY)[-1] == reply.json()
