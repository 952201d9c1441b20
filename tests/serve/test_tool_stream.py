"""Content and calls in a growing reply: python -m pytest tests/serve/test_tool_stream.py"""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdling.inputs import tool_calls
from herdling.serve.tool_stream import CallSplitter

CALLS = [
    ("weather", {"city": "Oslo", "days": 2}),
    ("now", {}),
    ("a.b-c", {"x y": [1, {"k": None}]}),
]


def feed(pieces: list[str]) -> tuple[list[str], str, list]:
    splitter = CallSplitter()
    sent = [splitter.push(piece) for piece in pieces]
    rest, calls = splitter.end()
    return sent, rest, calls


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(at)]


places = st.lists(st.integers(0, 200), max_size=30)


@given(
    st.sampled_from(["", "Let me see. ", "a[i] < b[0] {x} ", "\n", "[link](there) "]),
    st.lists(st.sampled_from(CALLS), min_size=1, max_size=3),
    st.sampled_from(["pythonic", "json", "tag"]),
    places,
)
def test_calls_are_found_however_the_text_is_cut(before, calls, dialect, places):
    if dialect == "tag":
        written = "".join(f"<function={n}>{json.dumps(a)}</function>" for n, a in calls)
    else:
        written = tool_calls.write(calls, dialect)
    sent, rest, found = feed(cut(before + written, places))
    assert found == calls
    assert ("".join(sent) + rest).strip() == before.strip()


@given(st.text(alphabet='[]{}<>()=",:abtypename \n*1;', max_size=120), places)
def test_any_text_gives_what_the_reader_says_of_the_whole(text, places):
    sent, rest, calls = feed(cut(text, places))
    reading = tool_calls.read(text)
    assert calls == reading.calls
    if calls:
        assert ("".join(sent) + rest).strip() == reading.content.strip()
    else:
        assert "".join(sent) + rest == text


@pytest.mark.parametrize(
    "text",
    [
        "plain words, at once",
        "see [1] and [2, 3] or a[i](x) and f(x)",
        "if a < b then {x: 1} else {}",
        '{"answer": 4}',
        "[link](https://example.org)",
        "<b>bold</b> <|eot|>",
    ],
)
def test_what_is_no_call_goes_out_at_once(text):
    splitter = CallSplitter()
    sent = ""
    for i, character in enumerate(text):
        sent += splitter.push(character)
        assert len(sent) >= i - 22, f"held back at {text[: i + 1]!r}"
    assert sent == text


def test_a_list_of_calls_with_words_after_it_is_content():
    sent, rest, calls = feed(
        ["[now()]", " is what I would call, ", "if I wanted to do such a thing"]
    )
    assert calls == []
    assert "".join(sent) + rest == "[now()] is what I would call, if I wanted to do such a thing"
    assert "".join(sent).startswith("[now()] is")


def test_code_for_the_interpreter():
    _, rest, calls = feed(["<|python_", "start|>print(1)", "<|python_end|>"])
    assert (rest, calls) == ("", [("code_interpreter", {"code": "print(1)"})])


def test_long_replies_take_linear_time():
    splitter = CallSplitter()
    for _ in range(20_000):
        splitter.push("[f(a=1), ")
    assert splitter.end()[1] == []
