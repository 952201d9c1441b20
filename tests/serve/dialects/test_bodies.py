"""JSON bodies, hostile ones among them: python -m pytest tests/serve/dialects/test_bodies.py"""

import json

import pytest

from herdling.serve.dialects import bodies
from herdling.serve.errors import ApiError


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b"[" * 100_000,
        b"[" * 201 + b"]" * 201,
        b'{"a":' * 201 + b"1" + b"}" * 201,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_no_reply_could_repeat_is_refused(raw):
    with pytest.raises(ApiError) as caught:
        bodies.parse(raw)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


def test_values_come_through():
    assert bodies.parse(b'{"a": [1, 2.5, null, "\\u00e9\\ud83d\\ude00"]}') == {
        "a": [1, 2.5, None, "é😀"]
    }
    deep = json.loads("[" * 200 + "]" * 200)
    assert bodies.parse(json.dumps(deep).encode()) == deep
    assert bodies.parse(b"3") == 3


def test_half_surrogate_pairs_become_replacement_characters():
    assert bodies.parse(b'{"a\\ud800": "\\udc00b\\ud83d\\ude00"}') == {"a\ufffd": "\ufffdb😀"}


def test_the_body_of_a_call_must_be_an_object(api):
    for raw in ("[]", "3", "", "null"):
        reply = api.call("POST", "/v1/responses", content=raw)
        assert reply.status_code == 400, raw
        assert reply.json()["error"]["type"] == "invalid_request_error"
