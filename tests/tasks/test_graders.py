"""Every grader against right answers in all their spellings, and against what a model might try."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import DataError
from herdling.tasks import jail
from herdling.tasks.graders import GRADERS, code_of, last_number

RECORDS = {
    "exact": {"answer": ["Paris", "City of Paris"]},
    "number": {"answer": 42},
    "choice": {"answer": "B", "choices": ["Rome", "Paris", "Oslo"]},
    "contains": {"answer": "Paris", "others": ["Rome", "Oslo"]},
    "json": {"answer": {"a": 1, "b": [True, None, 0.1]}},
    "regex": {"answer": r"\d{4}-\d\d-\d\d"},
    "python": {"tests": [["double(4)", 8], "assert double('ab') == 'abab'"]},
}
RIGHT = {
    "exact": ["Paris", " paris.\n", "PARIS", "city  of\nParis"],
    "number": ["42", "42.", "42.0", "+42", " 42\n\n", "6 * 7 = 42", "40 + 2\n42", "The answer is 42.",
               "Answer: 42", "**Answer:** 42", "Answer: **42**", "The answer is **42**.", "The answer is $42$.", "**42**", "$42$", "4.2e1", "#### 42", "x = 042", "So the final answer is 42"],
    "choice": ["B", "b", "(B)", "B.", "B)", "The answer is B.", "Answer: (B)", "B) Paris", "(b) paris.", "Paris",
               "The answer is: B", "**B**", "The answer is **B**.", "**B)** Paris"],
    "contains": ["Paris", "It is Paris.", "paris, of course", "The capital (Paris)", "\u201cParis\u201d"],
    "json": ['{"a": 1, "b": [true, null, 0.1]}', '{"b":[true,null,1e-1],"a":1.0}',
             '```json\n{"a": 1, "b": [true, null, 0.1]}\n```', '```\n{"a": 1, "b": [true, null, 0.1]}```'],
    "regex": ["2024-02-29", " 2024-02-29\n"],
    "python": ["def double(x):\n    return 2 * x", "Here it is:\n```python\ndef double(x): return x + x\n```\nDone."],
}  # fmt: skip
DEEP: list = []
for _ in range(60):
    DEEP = [DEEP]
WRONG = {
    "exact": ["", "Paris or Rome", "Paris Rome Oslo", "not Paris", "P\u0430ris", "Pa\u200bris", "\uff30aris",
              "Paris\nRome", "answer: Paris", "```\nParis\n```", '["Paris"]'],
    "number": ["", "43", "41.999", "42 or 43", "answer: 42 or 43", "41 42 43", "42, 43", "not 42", "42 43", "42\n43",
               "4 2", "nan", "inf", "-42", "--42", "\u0664\u0662", "\uff14\uff12", "\u2074\u00b2", "42/1", "0x2a", "42x", "x42",
               "4_2", "42 = x", "1:42 or so", "forty-two", "42!", "4**2", "41 * 42", "41**42", "42e99999999", "1e999", "I guess 42", "42%", ""],
    "choice": ["", "A", "C", "A B", "A or B", "B or C", "AB", "ABC", "A, B", "Not B", "B) Rome", "B Rome", "A) Paris",
               "Rome Paris Oslo", "Paris or Rome", "**A** **B**", "**B** or **C**", "*", "**", "The answer is B or C", "\u0412", "B?", "D", "answer"],
    "contains": ["", "Parisian", "Comparison", "Paris or Rome", "Rome, Paris, Oslo", "P\u0430ris", "Pa\u200bris", "Paris\u0301"],
    "json": ["", "{}", "[]", "1", '{"a": 1}', '{"a": 1, "b": [true, null, 0.1], "c": 2}', '{"a": true, "b": [true, null, 0.1]}',
             '{"a": 1, "b": [1, null, 0.1]}', '{"a": 1, "b": [true, null, NaN]}', '{"a": 2, "a": 1, "b": [true, null, 0.1]}',
             'Sure! {"a": 1, "b": [true, null, 0.1]}', '{"a": 1, "b": [true, null, 0.1]} {"a": 2}', "{'a': 1}", "[" * 4000,
             '{"a": 1' + "0" * 4000 + "}", '```python\n{"a": 1, "b": [true, null, 0.1]}\n```', '{"a": "1", "b": [true, null, 0.1]}'],
    "regex": ["", "2024-2-29", "on 2024-02-29", "2024-02-29\n2024-02-30", "\u0662024-02-29x"],
    "python": ["", "8", "def double(x): return 8", "double = 3", "def double(x): return x", "import sys\nsys.exit(0)", "raise SystemExit",
               "import os\nos._exit(0)", "def double(x):\n    while True: pass", "```python\na = 1\n```\n```python\ndef double(x): return 2*x\n```",
               "def double(x):\n    class Any(int):\n        def __eq__(self, other): return True\n    return Any()",
               "def double(x): return type('S', (str,), {'__eq__': lambda *a: True})('8')", "print('ok')", "def double(x): return 8.5",
               "def double(x): raise AssertionError", "def double(x): return double"],
}  # fmt: skip


@pytest.mark.parametrize("name", GRADERS)
def test_right_and_wrong(name: str) -> None:
    if name in ("regex", "python") and jail.missing():
        pytest.skip(jail.missing())
    grader, record = GRADERS[name], RECORDS[name]
    grader.check(record)
    for reply in RIGHT[name]:
        assert grader.grade(record, reply) == 1.0, reply
    for reply in WRONG[name]:
        assert grader.grade(record, reply) == 0.0, reply
    for reply in ("\0", "\ud800", "x" * 10**6, RIGHT[name][0] + " " * 10**6, "<|eot|>", "\u202e24"):
        assert grader.grade(record, reply) == 0.0, reply[:20]


@given(st.text(st.characters(), max_size=60))
@settings(max_examples=300)
def test_any_text_is_graded(reply: str) -> None:
    for name in ("exact", "number", "choice", "contains", "json"):
        assert GRADERS[name].grade(RECORDS[name], reply) in (0.0, 1.0)


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9
    )
)
def test_numbers_are_read_as_written(value) -> None:
    for text in (str(value), f"{value:,}", f"a = {value}", f"1 2 3\nx: {value}."):
        assert last_number(text) == value


def test_tolerance_and_text_answers() -> None:
    record = {"answer": "1,000.5", "tolerance": 0.1}
    GRADERS["number"].check(record)
    assert [GRADERS["number"].grade(record, r) for r in ("1000.4", "1000.6", "1000.61")] == [
        1,
        1,
        0,
    ]
    long = {"answer": 10**39 + 1}
    assert [GRADERS["number"].grade(long, str(10**39 + n)) for n in (0, 1, 2)] == [0, 1, 0]


def test_a_choice_without_texts() -> None:
    grader = GRADERS["choice"]
    assert [grader.grade({"answer": "c"}, r) for r in ("C", "c.", "C) something", "d")] == [
        1,
        1,
        0,
        0,
    ]


def test_a_number_in_words_is_a_whole_one() -> None:
    grader, record = GRADERS["contains"], {"answer": "5"}
    for reply in (
        "5",
        "It is 5.",
        "5, of course",
        "(5)",
        "5%",
        "room no.5",
        "COVID-5",
        "2-5",
        "= 5.\n",
    ):
        assert grader.grade(record, reply) == 1.0, reply
    for reply in (
        "-5",
        "It is \u22125.",
        "5.3",
        "0.5",
        "1,5",
        "5,2",
        "about -5",
        "(-5)",
        "15",
        "5e",
    ):
        assert grader.grade(record, reply) == 0.0, reply
    assert grader.grade({"answer": "-5"}, "It is -5.") == 1.0


def test_a_whole_number_is_no_other_one_written_with_a_point() -> None:
    grader, record = GRADERS["json"], {"answer": 4_000_000_000}
    assert grader.grade(record, "4000000000.0") == grader.grade(record, "4e9") == 1.0
    assert grader.grade(record, "4000000001.0") == grader.grade(record, "4000000001") == 0.0
    assert grader.grade({"answer": 4e12 / 3}, str(4e12 / 3 + 0.001)) == 1.0


def test_hostile_replies_cost_little() -> None:
    start = time.perf_counter()
    for filling in (" ", "\n", "`", "\t", "a", "1,111,", "\u0316\u0301", "[", "answer is "):
        many = filling * (50_000 // len(filling))
        for reply in (
            many,
            f"```\n{many}x```",
            f"```{many}.\n```",
            f"```json\n1\n{many}```",
            f"``` {many}",
        ):
            assert GRADERS["json"].grade({"answer": 2}, reply[:4096]) == 0.0
            assert code_of(reply) is not None
            for name in ("exact", "number", "choice", "contains"):
                assert GRADERS[name].grade(RECORDS[name], reply[:4096]) == 0.0
    assert time.perf_counter() - start < 10.0


@pytest.mark.skipif(bool(jail.missing()), reason=jail.missing() or "-")
def test_long_code_is_not_read() -> None:
    grade, fenced = GRADERS["python"].grade, "```\ndef double(x): return x + x\n```"
    assert grade(RECORDS["python"], fenced.rjust(100_000)) == 1.0
    assert grade(RECORDS["python"], fenced.rjust(100_001)) == 0.0


def test_only_one_fence_is_code() -> None:
    assert code_of("x = 1") == "x = 1"
    assert code_of("a\n```py\nx = 1\ny = 2\n```\nb") == "x = 1\ny = 2"
    assert code_of("a\n  ``` c++ \n  x = 1\n\n  ``` b") == "  x = 1\n"
    for text in (
        "```",
        "```\nx",
        "```\na\n```\n```\nb\n```",
        "``` x = 1 ```",
        "```a b\nx```",
        "```````",
    ):
        assert code_of(text) == ""


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("exact", {"answer": 3}, "answer is 3; it must be a text, or a list of texts"),
        ("exact", {"answer": []}, "answer is ''; it must be a text"),
        ("exact", {"answer": ["a", "."]}, "answer is '.'; it must be a text"),
        ("contains", {"answer": "a", "others": "b"}, "others is b; it must be a list of texts"),
        ("number", {"answer": "six"}, "answer is 'six'; it must be a number"),
        ("number", {"answer": True}, "answer is 'True'; it must be a number"),
        ("number", {"answer": float("inf")}, "answer is 'inf'; it must be a number"),
        ("number", {"answer": 1, "tolerance": "x"}, "tolerance is 'x'; it must be a number"),
        ("choice", {"answer": "Paris"}, "answer is 'Paris'; it must be the letter of a choice"),
        ("choice", {"answer": "D", "choices": ["a"]}, "answer is 'D', but there are 1 choices"),
        ("choice", {"answer": "A", "choices": "ab"}, "choices is ab; it must be a list of texts"),
        ("regex", {"answer": "("}, "answer is no regular expression: missing )"),
        ("regex", {"answer": 4}, "answer is no regular expression"),
        (
            "regex",
            {"answer": "a{99999999999}"},
            "answer is no regular expression: the repetition number",
        ),
        (
            "number",
            {"answer": 1, "tolerance": -0.5},
            "tolerance is '-0.5'; it must not be negative",
        ),
        ("json", {}, "has no answer"),
        ("json", {"answer": {"a": float("nan")}}, "answer is no JSON: Out of range float values"),
        ("json", {"answer": DEEP}, "answer is no JSON: a value is nested more than 50 deep"),
        ("python", {}, "the grader python needs 'tests'"),
        ("python", {"tests": ["assert f(1)"]}, "test 'assert f(1)' is neither"),
        ("python", {"tests": ["assert f(1) == g(1)"]}, "test 'assert f(1) == g(1)' is neither"),
        ("python", {"tests": [["f(1)"]]}, "is neither"),
        ("python", {"tests": [["f(1", 1]]}, "test \"['f(1', 1]\" is neither"),
        ("python", {"tests": [["x = 1", 1]]}, "is neither"),
        ("python", {"tests": [["f()", DEEP]]}, "is neither"),
        (
            "python",
            {"tests": [["f(1) == 9", True]]},
            "test \"['f(1) == 9', True]\": code can return what compares as it",
        ),
        (
            "python",
            {"tests": [["f(1) > 3", False]]},
            "likes; remedy: the value itself, such as ['f(1)', VALUE]",
        ),
        ("python", {"tests": ["assert (f(1) == 9) == True"]}, "code can return"),
        ("python", {"tests": [["f(1)", 1]], "setup": "import ("}, "setup is not Python: "),
        ("python", {"tests": [["f(1)", 1]], "setup": 3}, "setup must be Python code as a text"),
    ],
)
def test_malformed_records_are_told(name: str, record: dict, message: str) -> None:
    with pytest.raises(DataError) as problem:
        GRADERS[name].check(record)
    assert str(problem.value).startswith(message) or message in str(problem.value)


@pytest.mark.skipif(bool(jail.missing()), reason=jail.missing() or "-")
def test_code_cannot_feign_what_it_does_not_compute() -> None:
    grader = GRADERS["python"]
    record = {
        "tests": [
            "assert f(2) == 4",
            "assert f((1, 2)) is None",
            ["{f(3)}", [9]],
            "assert {1: f(1), 0: 0} == {0: 0, 1: 1}",
        ],
        "setup": "import math",
    }
    grader.check(record)
    assert (
        grader.grade(record, "def f(x): return math.prod([x, x]) if isinstance(x, int) else None")
        == 1.0
    )
    spying = """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        if 'request' in frame.f_locals:
            return str(frame.f_locals['request'])
        frame = frame.f_back
"""  # fmt: skip
    assert grader.grade(record, spying) == 0.0
    postponed = (
        "from __future__ import annotations\nf = lambda x: None if isinstance(x, tuple) else x * x"
    )
    assert grader.grade(record, postponed) == 1.0
    meddling = "import json\njson.dumps = lambda *a, **k: '{}'\ndef f(x): return x * x"
    assert grader.grade(record, meddling) == 0.0


@pytest.mark.skipif(bool(jail.missing()), reason=jail.missing() or "-")
def test_a_slow_pattern_is_cut_off() -> None:
    assert GRADERS["regex"].grade({"answer": "(a+)+b"}, "a" * 200) == 0.0
