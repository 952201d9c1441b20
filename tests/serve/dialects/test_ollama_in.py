"""Bodies of /api/chat and /api/generate: python -m pytest tests/serve/dialects/test_ollama_in.py"""

import json

import pytest

from herdling.serve.dialects import ollama_in
from herdling.serve.errors import ApiError


def test_options_in_our_names():
    given = {
        "num_predict": 7,
        "temperature": 0,
        "repeat_penalty": 1.2,
        "stop": ["x"],
        "num_ctx": 9,
        "seed": 3,
    }
    options = ollama_in.settings({"options": given})
    assert (options.max_tokens, options.temperature, options.repetition_penalty) == (7, 0, 1.2)
    assert (options.stop, options.seed) == (("x",), 3)
    assert ollama_in.settings({"options": {"num_predict": -1}}).max_tokens is None


def test_names_with_and_without_a_tag():
    assert ollama_in.model_name({"model": "m:latest"}) == "m"
    assert ollama_in.model_name({"name": "m"}) == "m"
    assert ollama_in.model_name({"model": "m:7b"}) == "m:7b"


def test_messages_with_pictures_and_calls():
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chat = ollama_in.chat(
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": "look", "images": ["AAAA"]},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "rain", "tool_name": "weather"},
            ],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        }
    )
    user, assistant, tool = chat.messages
    assert user["content"] == [{"type": "image", "image": "AAAA"}, {"type": "text", "text": "look"}]
    function = assistant["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("weather", {"city": "Oslo"})
    assert tool == {"role": "tool", "content": "rain"}
    assert len(chat.tools) == 1


def test_a_prompt_is_a_conversation():
    chat = ollama_in.generate({"model": "m", "prompt": "hi", "system": "brief", "images": ["AA"]})
    system, user = chat.messages
    assert system == {"role": "system", "content": "brief"}
    assert [part["type"] for part in user["content"]] == ["image", "text"]


def test_formats():
    def kind(wanted):
        return ollama_in.generate({"model": "m", "prompt": "x", "format": wanted}).format.kind

    assert [kind(f) for f in (None, "", "json", {"type": "object"})] == [
        "text",
        "text",
        "json",
        "json_schema",
    ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "model"),
        ({"model": "m", "messages": "x"}, "messages"),
        ({"model": "m", "messages": [{"role": "robot"}]}, "messages[0]"),
        ({"model": "m", "messages": [{"role": "user", "images": [1]}]}, "messages[0].images[0]"),
        ({"model": "m", "format": "xml"}, "format"),
        ({"model": "m", "options": {"top_p": 9}}, "top_p"),
    ],
)
def test_what_cannot_be_done_is_named(body, param):
    with pytest.raises(ApiError) as caught:
        ollama_in.chat(body)
    assert (caught.value.status, caught.value.param) == (400, param)
