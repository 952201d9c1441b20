"""A forced call is read back by `chat.parse`, with arguments that are valid for the tool's schema."""

import json

import jsonschema
import pytest
import torch

from herdling.errors import ConfigError, InputError
from herdling.infer.grammar import GrammarCompiler
from herdling.infer.tool_grammar import tool_grammar
from herdling.inputs import chat
from herdling.inputs.tokenizer import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 6},
                    "days": {"type": ["integer", "null"], "minimum": 0},
                    "hot": {"type": "boolean"},
                    "at": {
                        "type": "object",
                        "properties": {"x": {"type": "number"}, "ok": {"type": "boolean"}},
                        "required": ["x"],
                    },
                    "unit": {"enum": ["celsius", "fahrenheit", None]},
                    "from": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
                },
                "required": ["hot", "city"],
            },
        },
    },
    {"name": "now"},
    {
        "name": "a.b/c-d",
        "parameters": {
            "type": "object",
            "properties": {"pets": {"type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2}},
            "required": ["pets"],
            "$defs": {"p": {"type": "object", "properties": {"k": {"enum": ['"', "\\", "\n"]}}}},
        },
    },
    {
        "name": "either",
        "parameters": {
            "type": "object",
            "anyOf": [
                {"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False},
                {"properties": {"b": {"type": "number"}}, "required": ["b"]},
            ],
        },
    },
    {
        "name": "free",
        "parameters": {
            "type": "object",
            "properties": {
                "any": {},
                "map": {"type": "object", "maxProperties": 2},
                "list": {"type": ["array", "number"], "maxItems": 2},
            },
            "required": ["any", "map", "list"],
        },
    },
    {
        "name": "odd",
        "parameters": {"properties": {"a key": {"type": "boolean"}}, "required": ["a key"]},
    },
]  # fmt: skip
SCHEMAS = {
    tool.get("function", tool)["name"]: tool.get("function", tool).get("parameters", {})
    for tool in TOOLS
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    text = '[get_weather(city="Oslo", hot=True)] {"type": "function", "name": "now", "parameters": {}} '
    tok = Tokenizer.train([text * 4], 320)
    return GrammarCompiler(tok, len(tok))


def calls(
    compiler: GrammarCompiler, seed: int, *what, haste: float = 6, **options
) -> list[tuple[str, dict]] | None:
    """What `chat.parse` finds in a reply of a random model; None for one that ran out of tokens."""
    tok = compiler.tokenizer
    matcher = compiler.matcher(tool_grammar(*what, **options), [tok.eom])
    logits = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while not matcher.finished:
        if len(ids) == 400:
            return None
        row = torch.randn(compiler.vocab_size, generator=logits) * 2
        row[tok.eom] += haste
        matcher.apply(row)
        ids.append(int(row.argmax()))
        matcher.advance(ids[-1])
    message = chat.parse(ids, tok)
    assert message["content"] == ""
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]


@pytest.mark.parametrize("dialect", ["pythonic", "json"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called_with_valid_arguments(compiler, dialect, name):
    choice = {"type": "function", "function": {"name": name}}
    ended = 0
    for seed in range(15):
        found = calls(compiler, seed, TOOLS, choice, dialect)
        if found is not None:
            ended += 1
            ((called, arguments),) = found
            assert called == name
            jsonschema.validate(arguments, SCHEMAS[name])
            json.dumps(arguments, allow_nan=False)
    assert ended >= 8


@pytest.mark.parametrize("dialect", ["pythonic", "json"])
def test_required_calls_some_function_and_parallel_calls_several(compiler, dialect):
    names, most = set(), 0
    for seed in range(40):
        one = calls(compiler, seed, TOOLS, "required", dialect)
        assert one is None or len(one) == 1
        names |= {name for name, _ in one or []}
        several = (
            calls(compiler, seed, TOOLS[1:3], "required", dialect, parallel=True, haste=0) or []
        )
        most = max(most, len(several))
        for name, arguments in several:
            jsonschema.validate(arguments, SCHEMAS[name])
    assert len(names) >= 3
    assert most > 1


def test_the_form_of_a_forced_call():
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "boolean"}}}}]
    pythonic = tool_grammar(tools, "f").text
    assert '"f("' in pythonic
    assert '("True" | "False")' in pythonic
    assert r"{\"type\": \"function\", \"name\": \"f\"" in tool_grammar(tools, "f", "json").text


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        ([], "required", "there are no tools"),
        (TOOLS, "later", "tool_choice names 'later'; use required, or one of get_weather, now"),
        (TOOLS, {"type": "function"}, "tool_choice names ''"),
        ([{"name": "a b"}], "required", r"tools\[0\] has no usable name"),
        ([{"name": "f"}, {"name": "f"}], "f", r"tools\[1\] is named 'f'"),
        ([{"name": "f", "parameters": []}, {"name": "f", "parameters": 3}], "f", r"tools\[1\]"),
        ([{"name": "f", "parameters": {"type": "string"}}], "f", "type 'string'; arguments are"),
        (
            [{"name": "f", "parameters": {"properties": {"x": {"uniqueItems": True}}}}],
            "f",
            r"tools\[0\]\.parameters: uniqueItems at /properties/x/uniqueItems",
        ),
    ],
)
def test_choices_and_tools_that_cannot_be_forced_are_refused(tools, choice, words):
    with pytest.raises(InputError, match=words):
        tool_grammar(tools, choice)


def test_an_unknown_dialect_is_refused():
    with pytest.raises(ConfigError, match="dialect is 'xml'"):
        tool_grammar(TOOLS, "required", "xml")
