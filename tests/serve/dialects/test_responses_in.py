"""Bodies of /v1/responses: python -m pytest tests/serve/dialects/test_responses_in.py"""

import json

import pytest

from herdling.serve.dialects import responses_in
from herdling.serve.errors import ApiError

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}


def test_a_text_is_a_user_message():
    chat = responses_in.chat(
        {"input": "hi", "model": "m", "max_output_tokens": 3, "temperature": 0.5}
    )
    assert chat.messages == [{"role": "user", "content": "hi"}]
    assert (chat.model, chat.options.max_tokens, chat.options.temperature) == ("m", 3, 0.5)


def test_instructions_stand_before_an_earlier_conversation():
    earlier = [{"role": "user", "content": "a"}]
    chat = responses_in.chat({"input": "b", "instructions": "be brief"}, earlier)
    assert [m["content"] for m in chat.messages] == ["be brief", "a", "b"]
    assert chat.messages[0]["role"] == "system"


def test_items_become_messages():
    items = [
        {"role": "developer", "content": "rules"},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "look"},
                {
                    "type": "input_image",
                    "image_url": "data:image/png;base64,AA==",
                    "detail": "auto",
                },
            ],
        },
        {"type": "reasoning", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "so"}],
        },
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "clock", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "2",
            "output": [{"type": "input_text", "text": "9"}],
        },
    ]
    system, user, assistant, first, second = responses_in.messages({"input": items})
    assert system == {"role": "system", "content": "rules"}
    assert user["content"] == [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    assert assistant["content"] == [{"type": "text", "text": "so"}]
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["weather", "clock"]
    assert (first["role"], first["tool_call_id"], first["content"]) == ("tool", "1", "rain")
    assert second["content"] == [{"type": "text", "text": "9"}]


def test_a_call_without_words_is_a_message_of_its_own():
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    _, assistant = responses_in.messages({"input": [{"role": "user", "content": "x"}, call]})
    assert assistant["content"] is None
    assert len(assistant["tool_calls"]) == 1


def test_tools_and_choices():
    def chosen(choice):
        chat = responses_in.chat({"input": "x", "tools": [WEATHER], "tool_choice": choice})
        return chat.tool_choice, len(chat.tools)

    assert responses_in.chat({"input": "x", "tools": [WEATHER]}).tool_choice == "auto"
    assert chosen("required") == ("required", 1)
    assert chosen({"type": "function", "name": "weather"}) == ({"name": "weather"}, 1)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": []}
    assert chosen(allowed) == ("required", 0)
    assert chosen({**allowed, "tools": [{"type": "function", "name": "weather"}]}) == (
        "required",
        1,
    )


def test_formats():
    def format(**wanted):
        return responses_in.chat({"input": "x", "text": {"format": wanted}}).format

    schema = {"type": "object"}
    assert format(type="text").kind == "text"
    assert format(type="json_object").kind == "json"
    made = format(type="json_schema", name="n", schema=schema, strict=True)
    assert (made.kind, json.loads(made.text)) == ("json_schema", schema)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tool_choice": "maybe"}, "tool_choice"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "top_p": 7}, "top_p"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
def test_what_cannot_be_done_is_named(body, param):
    with pytest.raises(ApiError) as caught:
        responses_in.chat(body)
    assert (caught.value.status, caught.value.param) == (400, param)
