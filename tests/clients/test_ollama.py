"""`ollama` over `/api/...`; see also sdk_shapes.py."""

import json
from typing import Any

import ollama
import pytest

HELLO: Any = [{"role": "user", "content": "hello"}]
SHORT: Any = {"num_predict": 8, "temperature": 0}
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def api(server) -> ollama.Client:
    return ollama.Client(host=server.url)


def test_chat_whole_and_streamed(api):
    whole = api.chat("toy", HELLO, options=SHORT)
    pieces = list(api.chat("toy", HELLO, options=SHORT, stream=True))
    assert whole.done
    assert whole.eval_count <= 8
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].total_duration > 0


def test_generate_whole_and_streamed(api):
    whole = api.generate("toy", "hello", options=SHORT)
    pieces = list(api.generate("toy", "hello", options=SHORT, stream=True))
    assert "".join(piece.response for piece in pieces) == whole.response
    more = api.generate("toy", "more", context=whole.context, options=SHORT)
    assert more.prompt_eval_count > whole.prompt_eval_count


def test_a_format(api):
    made = api.chat("toy", HELLO, format=SCHEMA, options={"num_predict": 200})
    assert json.loads(made.message.content)["city"] in ("Oslo", "Rome")


def test_tools_do_not_disturb(api):
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    made = api.chat("toy", HELLO, tools=[tool], options=SHORT)
    assert made.message.content or made.message.tool_calls


def test_a_picture(api, picture):
    shown = api.chat(
        "toy", [{"role": "user", "content": "what?", "images": [picture]}], options=SHORT
    )
    plain = api.chat("toy", [{"role": "user", "content": "what?"}], options=SHORT)
    assert shown.prompt_eval_count > plain.prompt_eval_count


def test_embed_and_list(api):
    many = api.embed("toy", ["hello", "the quick fox"]).embeddings
    assert len(many) == 2
    assert len(many[0]) == len(many[1])
    assert api.list().models[0].model.startswith("toy")
    assert api.show("toy").capabilities
    assert api.ps().models


def test_errors(api):
    with pytest.raises(ollama.ResponseError) as caught:
        api.chat("other", HELLO)
    assert caught.value.status_code == 404


def test_a_stream_that_is_left_ends_its_reply(api, server):
    stream = api.chat("toy", HELLO, options={"num_predict": 3000}, stream=True)
    next(iter(stream))
    stream.close()
    server.until_open(0, 5)
