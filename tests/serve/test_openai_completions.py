"""`/v1/completions`: python -m pytest tests/serve/test_openai_completions.py"""

import json
import threading

import pytest
import torch

PATH = "/v1/completions"


@pytest.fixture
def complete(make_service, engine, ask):
    """complete(**body) -> the answer of the scripted engine."""
    service = make_service(engine)

    def complete(**body):
        return ask(service, "POST", PATH, json={"model": "toy", "prompt": "hello", **body})

    return complete


@pytest.fixture
def real(make_service, ask):
    """The same of the toy model."""
    service = make_service()
    return lambda **body: ask(service, "POST", PATH, json={"temperature": 0, **body})


def chunks_of(reply) -> list[dict]:
    assert reply.status_code == 200, reply.text
    *blocks, last, end = reply.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_a_reply_has_every_field(complete, engine, tok):
    reply = complete().json()
    assert reply["id"].startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": "the dog", "logprobs": None, "finish_reason": "stop"}
    ]
    assert reply["usage"]["prompt_tokens"] == len(engine.requests[0].ids)
    assert engine.requests[0].ids == [tok.bos, *tok.encode("hello")]
    assert engine.requests[0].max_tokens == 16
    assert engine.requests[0].sampling.temperature == 1


def test_prompts_of_all_four_forms(complete, engine, tok):
    ids = tok.encode("hello")
    for prompt, count in (("hello", 1), (["hello", "you"], 2), (ids, 1), ([ids, [5, 6]], 2)):
        choices = complete(prompt=prompt, n=2).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(2 * count))
    taken = [list(request.ids) for request in engine.requests[::2]]
    hello = [tok.bos, *ids]
    assert taken == [hello, hello, [tok.bos, *tok.encode("you")], ids, ids, [5, 6]]
    complete(add_special_tokens=False)
    assert list(engine.requests[-1].ids) == ids


def test_choices_belong_to_their_prompts(complete, engine, tok):
    engine.script = lambda request: tok.decode(list(request.ids[1:]))
    choices = complete(prompt=["hello", "you"], n=2).json()["choices"]
    assert [choice["text"] for choice in choices] == ["hello", "hello", "you", "you"]
    chunks = chunks_of(complete(prompt=["hello", "you"], n=2, stream=True))
    texts = {}
    for choice in (chunk["choices"][0] for chunk in chunks):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "hello", 1: "hello", 2: "you", 3: "you"}


def test_echoed_logprobs_are_those_of_the_plain_forward(real, lm, tok):
    """What lm-eval sums up: `token_logprobs[context:-1]`."""
    prompts = [[tok.bos, *tok.encode("the quick brown fox")], [tok.bos, *tok.encode("a dog")]]
    body = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    choices = real(prompt=prompts, **body).json()["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        table = choice["logprobs"]
        assert len(table["tokens"]) == len(prompt) + 1
        assert {len(column) for column in table.values()} == {len(prompt) + 1}
        wanted = lm.logits([prompt])[0].log_softmax(-1)  # (T, V)
        scores = wanted[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
        assert table["token_logprobs"][0] is None
        assert table["top_logprobs"][0] is None
        given = torch.tensor(table["token_logprobs"][1:-1])
        torch.testing.assert_close(given, scores, atol=1e-3, rtol=0)
        assert table["token_logprobs"][-1] == pytest.approx(wanted[-1].max().item(), abs=1e-3)
        for i, (name, top) in enumerate(
            zip(table["tokens"][1:-1], table["top_logprobs"][1:-1], strict=True)
        ):
            assert name in top
            greedy = wanted[i].argmax().item() == prompt[i + 1]
            assert greedy == (max(top, key=top.get) == name)


def test_offsets_point_into_the_text(real):
    text = "the quick brown fox jumps"
    choice = real(prompt=text, max_tokens=5, logprobs=2, echo=True).json()["choices"][0]
    assert choice["text"].startswith(text)
    table = choice["logprobs"]
    assert table["tokens"][0] == "<|begin_of_text|>"
    assert table["text_offset"][:2] == [0, 0]
    for token, offset in list(zip(table["tokens"], table["text_offset"], strict=True))[1:]:
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][offset:].startswith(token)


def test_reading_a_prompt_without_writing(real, tok):
    body = {"prompt": "the dog", "max_tokens": 0, "echo": True, "logprobs": 0}
    reply = real(**body).json()
    choice = reply["choices"][0]
    assert choice["text"] == "the dog"
    assert len(choice["logprobs"]["tokens"]) == 1 + len(tok.encode("the dog"))
    assert reply["usage"]["completion_tokens"] == 0


def test_token_texts_that_are_no_characters(real, tok):
    ids = [tok.bos, *tok.encode("\u20ac")]
    choice = real(prompt=ids, max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    assert choice["logprobs"]["tokens"][1:] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert choice["logprobs"]["text_offset"][1:] == [len("<|begin_of_text|>")] * 3


def test_the_best_of_several(make_service, ask, lm):
    service = make_service()
    body = {"prompt": "the", "max_tokens": 8, "temperature": 1.5, "seed": 5, "logprobs": 0}
    all_ = ask(service, "POST", PATH, json={**body, "n": 4}).json()["choices"]
    best = ask(service, "POST", PATH, json={**body, "n": 2, "best_of": 4}).json()
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / 8 for c in all_}
    ranked = sorted(means, key=means.__getitem__, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == ranked[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 32


def test_a_stream_in_pieces(complete):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(complete(echo=True, **options))
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "hellothe dog"
    assert [c["choices"][0]["finish_reason"] for c in chunks[-2:-1]] == ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    chunks = chunks_of(complete(stream=True, logprobs=1))
    tables = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [token for table in tables for token in table["tokens"]]
    assert "".join(tokens).startswith("the dog")  # the stop token follows
    assert tables[0]["text_offset"][0] == 0
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[10**9]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5] * 3000}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_cannot_be_meant_is_a_400_that_names_the_field(complete, body, param):
    reply = complete(**body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_an_empty_suffix_is_none(complete):
    assert complete(suffix="").status_code == 200


@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
def test_prompts_are_read_beside_the_event_loop(make_service, engine, ask, monkeypatch, path):
    """A prompt of megabytes takes seconds, in which other streams go on."""
    seen, encode = [], engine.lm.tokenizer.encode

    def watched(*args, **more):
        seen.append(threading.current_thread())
        return encode(*args, **more)

    monkeypatch.setattr(engine.lm.tokenizer, "encode", watched)
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    body = {"prompt": "hello"} if path == PATH else {"messages": said, "max_tokens": 9}
    assert ask(make_service(engine), "POST", path, json=body).status_code == 200
    assert seen
    assert threading.current_thread() not in seen  # the loop runs in this one
