"""Bodies of /v1/messages: python -m pytest tests/serve/dialects/test_messages_in.py"""

import json

import pytest

from herdling.serve.dialects import messages_in
from herdling.serve.errors import ApiError

USER = {"role": "user", "content": "hi"}
WEATHER = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}


def chat(**body):
    return messages_in.chat({"max_tokens": 9, "messages": [USER], **body})


def test_system_is_the_first_message():
    assert chat(system="brief").messages[0] == {"role": "system", "content": "brief"}
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    assert chat(system=blocks).messages[0]["content"] == [{"type": "text", "text": "a"}]


def test_settings():
    options = chat(
        temperature=1, top_k=5, top_p=0.5, stop_sequences=["a", "b"], metadata={}
    ).options
    assert (options.max_tokens, options.temperature, options.top_k, options.top_p) == (9, 1, 5, 0.5)
    assert options.stop == ("a", "b")


def test_pictures_and_documents():
    image = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
    }
    far = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    document = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "t"},
    }
    content = [image, far, document, {"type": "text", "text": "?"}]
    (message,) = chat(messages=[{"role": "user", "content": content}]).messages
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "text", "text": "t"},
        {"type": "text", "text": "?"},
    ]


def test_a_tool_loop():
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
    nothing = {"type": "tool_result", "tool_use_id": "toolu_2"}
    turns = [
        USER,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "so"}, use]},
        {"role": "user", "content": [{"type": "text", "text": "well?"}, result, nothing]},
    ]
    _, assistant, first, second, user = chat(messages=turns, tools=[WEATHER]).messages
    assert assistant["content"] == [{"type": "text", "text": "so"}]
    assert assistant["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"city": "Oslo"},
    }
    assert (first["role"], first["content"], second["content"]) == ("tool", "rain", "")
    assert user["content"] == [{"type": "text", "text": "well?"}]


def test_tools_and_choices():
    def chosen(**choice):
        made = chat(tools=[WEATHER], tool_choice=choice)
        return made.tool_choice, made.parallel_tool_calls

    assert chat(tools=[WEATHER]).tools == [
        {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    ]
    assert chosen(type="auto", disable_parallel_tool_use=True) == ("auto", False)
    assert chosen(type="any") == ("required", True)
    assert chosen(type="none") == ("none", True)
    assert chosen(type="tool", name="weather") == ({"name": "weather"}, True)


def test_a_schema_for_the_reply():
    made = chat(
        output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}}
    ).format
    assert (made.kind, json.loads(made.text)) == ("json_schema", {"type": "object"})


def test_a_reply_that_was_begun():
    begun = chat(messages=[USER, {"role": "assistant", "content": "Well,"}])
    assert messages_in.begun(begun) == ([USER], "Well,")
    assert messages_in.begun(chat()) == ([USER], "")
    with pytest.raises(ApiError):
        messages_in.begun(chat(messages=begun.messages, tools=[WEATHER]))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [USER]}, "max_tokens"),
        ({"max_tokens": 1}, "messages"),
        ({"max_tokens": 1, "messages": []}, "messages"),
        ({"max_tokens": -1, "messages": [USER]}, "max_tokens"),
        ({"max_tokens": 1, "messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"max_tokens": 1, "messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"max_tokens": 1, "messages": [USER], "tools": [{"type": "bash_20250124"}]},
            "tools[0].type",
        ),
        ({"max_tokens": 1, "messages": [USER], "tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"max_tokens": 1, "messages": [USER], "tool_choice": {"type": "x"}}, "tool_choice.type"),
    ],
)
def test_what_cannot_be_done_is_named(body, param):
    with pytest.raises(ApiError) as caught:
        messages_in.chat(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_counting_needs_no_max_tokens():
    assert messages_in.chat({"messages": [USER]}, counting=True).options.max_tokens is None
