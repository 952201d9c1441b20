"""MLflow's tables as rows: python -m pytest tests/serve/dialects/test_frames.py"""

import pytest

from herdling.serve.dialects import frames
from herdling.serve.errors import ApiError

ROWS = [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}]
SPLIT = {"columns": ["id", "prompt"], "index": [0, 1], "data": [[1, "a"], [2, "b"]]}


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": SPLIT},
        {"dataframe_records": ROWS},
        {"instances": ROWS},
        {"inputs": ROWS},
        {"inputs": {"id": [1, 2], "prompt": ["a", "b"]}},
        {"instances": ROWS, "params": {}},
    ],
)
def test_every_form_gives_the_same_rows(body):
    assert frames.rows(body) == ROWS


def test_a_single_value_is_a_row():
    assert frames.rows({"inputs": "a"}) == ["a"]
    assert frames.rows({"inputs": {"prompt": "a"}}) == [{"prompt": "a"}]
    messages = {"messages": [{"role": "user", "content": "a"}]}
    assert frames.rows({"inputs": messages}) == [messages]


def test_csv():
    assert frames.from_csv('id,prompt\n1,"a, ""b"""\n\n2,c\n') == [
        {"id": "1", "prompt": 'a, "b"'},
        {"id": "2", "prompt": "c"},
    ]
    for bad in ("", "\n", "a,b\n1\n", 'a\n"x'):
        with pytest.raises(ApiError):
            frames.from_csv(bad)


def test_the_text_of_a_row():
    message = {"role": "user", "content": "hi"}
    assert frames.read("a", 0) == "a"
    assert frames.read({"id": 1, "prompt": "a", "other": "b"}, 0) == "a"
    assert frames.read({"id": 1, "whatever": "a"}, 0) == "a"
    assert frames.read({"0": "a"}, 0) == "a"
    assert frames.read({"messages": [message]}, 0) == [message]
    assert frames.read([message], 0) == [message]


@pytest.mark.parametrize(
    "row", [3, None, {}, {"id": 1}, {"x": "a", "y": "b"}, [1], {"messages": "a"}]
)
def test_a_row_without_a_clear_text_is_named(row):
    with pytest.raises(ApiError, match="row 7"):
        frames.read(row, 7)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": "a", "instances": "b"},
        {"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}},
        {"dataframe_split": {"columns": ["a"]}},
        {"dataframe_split": []},
        {"dataframe_records": {"a": 1}},
        {"inputs": {"a": [1], "b": [1, 2]}},
    ],
)
def test_broken_tables(body):
    with pytest.raises(ApiError) as caught:
        frames.rows(body)
    assert caught.value.status == 400
