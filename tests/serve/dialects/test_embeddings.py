"""`/v1/embeddings`: python -m pytest tests/serve/dialects/test_embeddings.py"""

import base64
import functools
import threading

import numpy as np
import pytest
import torch

from herdling.infer import embed
from herdling.serve.dialects import embeddings

PATH = "/v1/embeddings"


def vectors(reply) -> torch.Tensor:
    assert reply.status_code == 200, reply.text
    return torch.tensor([entry["embedding"] for entry in reply.json()["data"]])


def test_texts_and_their_ids_give_the_pooled_states(api, lm):
    tok = lm.tokenizer
    texts = ["hello", "the dog sleeps"]
    ids = [[tok.bos, *tok.encode(text)] for text in texts]
    reply = api.post(PATH, {"model": "toy", "input": texts})
    torch.testing.assert_close(vectors(reply), embed.pooled(lm.model, ids, tok.bos))
    torch.testing.assert_close(vectors(api.post(PATH, {"input": ids})), vectors(reply))
    torch.testing.assert_close(vectors(api.post(PATH, {"input": ids[1]})), vectors(reply)[1:])
    torch.testing.assert_close(vectors(api.post(PATH, {"input": texts[0]})), vectors(reply)[:1])
    said = reply.json()
    count = sum(map(len, ids))
    assert said["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert (said["object"], said["model"]) == ("list", "toy")
    assert [(e["object"], e["index"]) for e in said["data"]] == [("embedding", 0), ("embedding", 1)]


def test_base64_is_little_endian_float32(api):
    plain = vectors(api.post(PATH, {"input": "hello"}))[0]
    coded = api.post(PATH, {"input": "hello", "encoding_format": "base64"}).json()["data"][0]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(coded["embedding"]), "<f4"), plain)


def test_fewer_dimensions_have_length_one(api):
    whole = vectors(api.post(PATH, {"input": "hello"}))[0]
    short = vectors(api.post(PATH, {"input": "hello", "dimensions": 5}))[0]
    torch.testing.assert_close(short, whole[:5] / whole[:5].norm())


def test_texts_are_read_piece_by_piece_in_the_engines_thread(api, monkeypatch):
    threads = []
    work = api.service.worker.call

    def counted(job):
        return work(lambda: (threads.append(threading.current_thread().name), job())[1])

    monkeypatch.setattr(api.service.worker, "call", counted)
    seven = functools.partial(embed.reading, piece=7)
    monkeypatch.setattr(embed, "reading", seven)
    assert api.post(PATH, {"input": list(range(20))}).status_code == 200
    assert threads == ["engine"] * 4  # three pieces, and the one that finds the end


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"input": []}, 400),
        ({"input": ""}, 400),
        ({"input": ["a", ""]}, 400),
        ({"input": [[]]}, 400),
        ({"input": [1, "a"]}, 400),
        ({"input": [[1, True]]}, 400),
        ({"input": [10**6]}, 400),
        ({"input": [-1]}, 400),
        ({"input": {"text": "a"}}, 400),
        ({"input": ["a"] * (embeddings.MOST_INPUTS + 1)}, 400),
        ({"input": "a", "encoding_format": "int8"}, 400),
        ({"input": "a", "dimensions": 0}, 400),
        ({"input": "a", "dimensions": 10**6}, 400),
        ({"input": "a", "model": "other"}, 404),
    ],
)
def test_errors(api, body, status):
    reply = api.post(PATH, body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_a_long_text_is_refused_with_the_numbers(api):
    error = api.post(PATH, {"input": ["a", [5] * 3000]}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "3000" in error["message"]
    assert "2048" in error["message"]
    assert api.post(PATH, {"input": [5] * 2048}).status_code == 200


def test_adapters_have_no_embeddings(make_api, engine):
    api = make_api(engine, adapters=("poet",))
    reply = api.post(PATH, {"input": "a", "model": "poet"})
    assert reply.status_code == 400
    assert "poet" in reply.json()["error"]["message"]
