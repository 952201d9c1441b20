"""Tasks of several turns: the tools are exact and never raise, and the reference turns are real."""

import ast
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdling.errors import ConfigError
from herdling.inputs import chat
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.base import MultiTurn
from herdling.tasks.calculator import CALC, Calculator, evaluate
from herdling.tasks.mixture import TaskSource
from herdling.tasks.registry import TASKS, TOOL_TASKS, create
from herdling.tasks.search import Library, Search, facts, library
from herdling.tasks.tools import Tool, answer_calls

TOK = Tokenizer.train(["user assistant what is the number"], 300)


@pytest.mark.parametrize("name", TOOL_TASKS)
def test_the_reference_turns_are_what_the_tools_say(name: str) -> None:
    task = create(name)
    assert isinstance(task, MultiTurn)
    for i in range(100):
        item = task.item(i, "test")
        assert item.tools
        talk = list(item.messages)
        for turn in item.turns:
            if turn["role"] == "tool":
                assert task.respond(item, talk) == [turn]
            talk.append(turn)
        assert item.answer in talk[-1]["content"]  # the result holds the answer
        assert item.answer not in str(item.messages[0]["content"]).split()
        chat.check(item.conversation(), item.tools)


def test_others_are_single_turn() -> None:
    for name in TASKS.keys() - TOOL_TASKS.keys():
        task = create(name)
        assert not isinstance(task, MultiTurn)
        assert task.item(0, "train").tools == task.item(0, "train").turns == ()


@pytest.mark.parametrize("name", TOOL_TASKS)
def test_a_call_that_the_model_writes_is_answered(name: str) -> None:
    task = create(name)
    assert isinstance(task, MultiTurn)
    item = task.item(3, "train")
    for dialect in ("pythonic", "json"):
        rendered = chat.render(item.conversation(), TOK, item.tools, False, dialect)
        written = TOK.decode(
            i for i, loss in zip(rendered.ids, rendered.loss_mask, strict=True) if loss
        )
        call, answer, _ = written.replace("<|eot|>", "<|eom|>").split("<|eom|>")
        said = chat.parse(call)
        assert said["tool_calls"], call
        assert task.respond(item, [*item.messages, said]) == [item.turns[1]]
        assert task.grade(item, answer) == 1.0
        assert task.grade(item, call) == 0.0


def test_loss_is_on_every_assistant_turn_and_on_no_result() -> None:
    example = TaskSource(create("calculator"), TOK).example(5)
    item = create("calculator").item(5, "train")
    asked = TOK.decode(t for t, m in zip(example.tokens, example.loss_mask, strict=True) if m)
    assert asked == f'[calc(x="{item.key}")]<|eom|>{item.answer}<|eot|>'
    assert "Here is a list of functions" in TOK.decode(example.tokens)
    plain = TaskSource(create("calculator"), TOK, form="document").example(5)
    lines = TOK.decode(plain.tokens[1:-1]).split("\n")
    assert lines[1:] == [f'[calc(x="{item.key}")]', item.answer, item.answer]


def test_calculator_items() -> None:
    task = Calculator(steps=3, digits=3)
    for i in range(300):
        item = task.item(i, "train")
        assert eval(item.key) == int(item.answer)
        assert 1 <= len([s for s in item.key.split() if s in "+-*"]) <= 3
    with pytest.raises(ConfigError, match=r"steps is 0 and digits 2; use 1\.\.8 and 2\.\.9"):
        Calculator(steps=0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("-7", "-7"),
        ("7 - 10", "-3"),
        ("1/4", "0.25"),
        ("-1/4", "-0.25"),
        ("1/3", "0.3333333333"),
        ("2/3", "0.6666666667"),
        ("0.1 + 0.2", "0.3"),
        ("2**10", "1024"),
        ("2^-2", "0.25"),
        ("1_000 * 2", "2000"),
        ("0 ** 0", "1"),
        ("1e3", "1000"),
        ("-0.0", "0"),
        ("1/10**20", "0"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "x", "1 +", "__import__('os')", "9**9**9", "2**65", "1/0", "0**-1", "True", "1 if 1 else 2",
     "[1]", "1j", "1e999", "10**61", "'a'*9", "1\0", "\ud800", "1" * 201,
     "3 // 2", "5 % 3", "1 < 2", "f(1)", "1;2", "lambda: 1", "4**0.5"],
)  # fmt: skip
def test_what_the_calculator_refuses(expression: str) -> None:
    with pytest.raises(ValueError, match=r"^(not an expression|more than|division|a number is)"):
        evaluate(expression)
    assert CALC.run({"x": expression}).startswith("error: ")


@given(st.recursive(st.integers(0, 99).map(str), lambda e: st.tuples(e, st.sampled_from("+-*/"), e).map(lambda t: f"({t[0]} {t[1]} {t[2]})"), max_leaves=6))  # fmt: skip
def test_any_expression_has_the_value_of_fractions(expression: str) -> None:
    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        assert isinstance(node, ast.BinOp)
        a, b = value(node.left), value(node.right)
        return {"Add": a + b, "Sub": a - b, "Mult": a * b}.get(type(node.op).__name__) or (a / b if isinstance(node.op, ast.Div) else Fraction(0))  # fmt: skip

    try:
        want = value(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        assert CALC.run({"x": expression}) == "error: division by zero"
    else:
        assert abs(Fraction(evaluate(expression)) - want) <= Fraction(1, 2 * 10**10)


@given(st.text(st.characters(), max_size=300))
def test_tools_never_raise(text: str) -> None:
    assert isinstance(CALC.run({"x": text}), str)
    call = {"function": {"name": text, "arguments": text}}
    assert len(answer_calls([CALC], [{"role": "assistant", "tool_calls": [call]}])) == 1


def test_bad_calls_are_answered_with_what_is_wrong() -> None:
    def results(*calls: object) -> list[str]:
        turn = {"role": "assistant", "tool_calls": list(calls)}
        return [message["content"] for message in answer_calls([CALC], [turn])]

    def call(name: str, arguments: object) -> dict:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    assert results(call("calc", {"x": "1+1"}), call("calc", '{"x": "2+2"}')) == ["2", "4"]
    assert results(call("calc", {"x": 5})) == ["5"]
    assert results({"name": "calc", "arguments": {"x": "3"}}) == ["3"]
    for arguments in ({}, {"y": "1"}, {"x": "1", "y": "2"}, None, [], "{", '"x"', "[" * 10**5):
        assert results(call("calc", arguments)) == ["error: calc takes x"]
    assert results(call("weather", {})) == ["error: there is no weather, only calc"]
    assert results(7, None, "calc") == ["error: there is no , only calc"] * 3
    assert results(call("calc", {"x": "1" * 3000})) == ["error: the argument is too long"]
    assert results(call("calc", {"x": ["1"]}))[0].startswith("error: not an expression")
    deep: object = "1"
    for _ in range(10_000):
        deep = [deep]
    for argument in (deep, {"a": deep}, {1, 2}, b"1", 1j, object()):
        assert results(call("calc", {"x": argument})) == ["error: calc takes x as text"]
    assert results(*[call("calc", {"x": "1"})] * 9)[-1] == "error: at most 8 calls at once"
    with_id = [{"role": "assistant", "tool_calls": [{"id": "c1", **call("calc", {"x": "1"})}]}]
    assert answer_calls([CALC], with_id) == [{"role": "tool", "content": "1", "tool_call_id": "c1"}]
    assert answer_calls([CALC], []) == answer_calls([CALC], [{"role": "user", "content": ""}]) == []


def test_schemas_are_openai_s() -> None:
    tool = Tool("add", ("a", "b"), lambda a, b: a + b, "Adds.")
    assert json.loads(json.dumps(tool.schema)) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
                "required": ["a", "b"],
            },
        },
    }


def test_every_page_is_found_by_its_title() -> None:
    assert len(facts()) > 500
    for title in facts():
        found = library().find(title)
        assert found is not None
        assert found.startswith(f"{title}: ")
        assert len(found) <= 64


def test_search_prefers_titles_and_rare_words() -> None:
    shelf = Library(
        {"Cat": "Cat: a small dog eats it", "Dog": "Dog: barks", "Big dog": "Big dog: x"}
    )
    assert shelf.find("dog") == "Dog: barks"
    assert shelf.find("BIG DOG!") == "Big dog: x"
    assert shelf.find("small") == "Cat: a small dog eats it"
    assert shelf.find("") is shelf.find("zebra") is shelf.find("\0\ud800") is None


def test_search_chance_is_that_of_the_best_guesses() -> None:
    task = Search()
    assert task.chance < 0.12
    items = [task.item(i, "train") for i in range(3000)]
    by_kind: dict[str, list] = {}
    for item in items:
        kind = next(k for k, v in facts()[item.key].items() if v == item.answer)
        by_kind.setdefault(kind, []).append(item.answer)
    best = sum(max(map(a.count, set(a))) for a in by_kind.values()) / len(items)
    assert best == pytest.approx(task.chance, abs=0.03)
