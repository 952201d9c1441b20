"""Conversations in the forms of others: the same ids and loss mask as in OpenAI's, and clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from herdling.data.conversations import normal
from herdling.data.records import InMemory, JsonLines, content
from herdling.data.spec import Opening, open_sources
from herdling.errors import DataError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer

TOK = Tokenizer.train(["user assistant what is the number"], 300)
PROCESSOR = ImageProcessor(size=32, patch_size=4)
USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [USER, SAID]}, [USER, SAID]),
        ({"messages": [USER, SAID], "system": "s"}, [{"role": "system", "content": "s"}, USER, SAID]),
        ({"messages": [{"role": "system", "content": "s"}, USER, SAID], "system": "s"},
         [{"role": "system", "content": "s"}, USER, SAID]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, [USER, SAID]),
        ({"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "system": "s"},
         [{"role": "system", "content": "s"}, USER, SAID]),
        ({"instruction": "hi", "input": "", "output": "yo"}, [USER, SAID]),
        ({"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["hi", "yo"]]},
         [{"role": "system", "content": "s"}, USER, SAID, {"role": "user", "content": "add\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"prompt": "hi", "completion": "yo"}, [USER, SAID]),
        ({"prompt": [USER], "completion": [SAID]}, [USER, SAID]),
        ({"prompt": "hi", "completion": "yo", "system": "s"}, [{"role": "system", "content": "s"}, USER, SAID]),
        ({"question": "hi", "answer": ["yo", "ho"]}, [USER, SAID]),
        ({"question": "1 + 1?", "answer": 2, "grader": "number"}, [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]),
        ({"messages": [USER], "answer": {"a": "\u00e9"}, "grader": "json"}, [USER, {"role": "assistant", "content": '{"a": "\u00e9"}'}]),
        ({"question": "hi", "system": "s", "reply": "yo", "answer": "y.", "grader": "regex"}, [{"role": "system", "content": "s"}, USER, SAID]),
    ],
)  # fmt: skip
def test_every_form_becomes_messages(record: dict, messages: list) -> None:
    assert normal(record)["messages"] == messages
    assert InMemory([("here", Path(), record)]).read(0)[2]["messages"] == messages


def test_sharegpt_with_tools() -> None:
    tools = [
        {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
    ]
    record = {
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ],
        "tools": json.dumps(tools),
    }
    found = normal(record)
    assert found["tools"] == tools
    assert [m["role"] for m in found["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert found["messages"][1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]
    assert asked(found) == "[add(a=1)]<|eom|>3<|eot|>"
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    for said in ("", None):
        turn = {"role": "assistant", "content": said, "tool_calls": calls}
        assert asked({"conversations": [USER, turn]}) == "[add(a=1)]<|eom|>"


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_reply_of_weight_0_is_read_and_not_learnt(name: str) -> None:
    turns = [USER, {**SAID, "weight": 0}, USER, {"role": "assistant", "content": "ho", "weight": 1}]
    assert asked({name: turns}) == "ho<|eot|>"
    with pytest.raises(DataError, match="all the assistant says has weight 0"):
        asked({name: turns[:2]})


def test_tools_may_be_json_text() -> None:
    for form in ({"messages": [USER, SAID]}, {"prompt": "hi", "completion": "yo"},
                 {"prompt": "hi", "chosen": "yo", "rejected": "no"}):  # fmt: skip
        records = InMemory([("here", Path(), {**form, "tools": '[{"name": "f"}]'})])
        assert records.read(0)[2]["tools"] == [{"name": "f"}]


def asked(record: dict[str, Any]) -> str:
    """The text under the loss of a record, read from a file as training reads it."""
    folder = Path(record.pop("folder", "."))
    path = folder / "one.jsonl"
    records = InMemory([(str(path), folder, record)])
    assert len(records.sizes) == 1
    from herdling.data.record_source import RecordSource

    example = RecordSource("one", records, TOK, processor=PROCESSOR).example(0)
    return TOK.decode(t for t, m in zip(example.tokens, example.loss_mask, strict=True) if m)


def test_loss_is_on_all_that_the_assistant_says_and_on_nothing_else() -> None:
    turns = [{"role": "system", "content": "s"}, USER, SAID, USER,
             {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
             {"role": "tool", "content": "r"}, {"role": "assistant", "content": "end"}]  # fmt: skip
    assert asked({"messages": turns}) == "yo<|eot|>so[f(x=1)]<|eom|>end<|eot|>"


def test_images_stand_where_their_marks_are(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    turns = [{"from": "human", "value": "<image>\nwhat? <image>"}, {"from": "gpt", "value": "yo"}]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"conversations": turns, "images": ["a.png", "b.png"]}) + "\n"
                    + json.dumps({"conversations": [{"from": "human", "value": "<image>hi"}, turns[1]], "image": "a.png"}) + "\n")  # fmt: skip
    records = JsonLines([path])
    assert records.read(0)[2]["messages"][0]["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "what? "},
        {"type": "image", "image": "b.png"},
    ]
    ((source, _),) = open_sources(str(path), Opening(TOK, "all", processor=PROCESSOR))
    tiles = [source.example(i).tiles for i in range(2)]
    assert sorted(len(t) for t in tiles if t is not None) == [1, 2]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"conversations": "x"}, "conversations is str; it must be a list"),
        ({"conversations": ["x"]}, "conversations[0] is str; it must be an object"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0] is from 'alien'; use one of system"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] has no value"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "conversations[0] has an <image> mark for which"),
        ({"conversations": [{"from": "human", "value": "x"}], "image": "a.png"}, "has 1 images more than <image> marks"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "conversations[0]: a call is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "[1]"}]}, "conversations[0]: a call must be such as"),
        ({"conversations": [{"from": "human", "value": "x"}], "tools": "{"}, "tools is not JSON"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no message has role 'assistant'"),
        ({"instruction": 3, "output": "x"}, "instruction is int; it must be a text"),
        ({"instruction": "x"}, "output is missing; it must be a text"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "history[0] must be a pair of texts"),
        ({"completion": "x"}, "prompt is missing"),
        ({"prompt": "x", "completion": "y", "images": ["a.png"]}, "has images beside completion, where"),
        ({"instruction": "x", "output": "y", "image": "a.png"}, "has image beside instruction, where"),
        ({"messages": [USER], "answer": "y", "images": ["a.png"]}, "has images beside messages, where"),
        ({"question": "x", "answer": "y", "image": "a.png"}, "a.png is not a file"),
        ({"question": "x"}, "the grader exact knows no reply to train on; remedy: add a 'reply'"),
        ({"question": "x", "answer": "y", "grader": "regex"}, "the grader regex knows no reply"),
        ({"question": "x", "messages": [USER], "answer": "y"}, "either 'question' or 'messages'"),
        ({"question": "x", "answer": True}, "the grader exact knows no reply"),
        ({"text": "x", "split": "dev"}, "split is 'dev'; use one of train, validation, test"),
    ],
)  # fmt: skip
def test_refusals_name_file_and_line(record: dict, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [USER, SAID]}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError) as problem:
        JsonLines([path])
    assert str(problem.value).startswith(f"{path}:2: ")
    assert complaint in str(problem.value)


def test_a_record_s_own_split_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}", "split": "test"}) + "\n" for i in range(5)))
    assert [len(JsonLines([path], split).sizes) for split in ("train", "test", "all")] == [0, 5, 5]


def test_a_question_is_in_one_split_whatever_its_answer() -> None:
    contents = {content(normal({"question": "q", "answer": a})) for a in ("x", "y")}
    assert contents == {content({"messages": [{"role": "user", "content": "q"}]})}
