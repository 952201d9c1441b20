"""Reading tool calls: every dialect that models write, and text that is none."""

import time

import pytest

from herdling.errors import ConfigError
from herdling.inputs import tool_calls
from herdling.inputs.tool_calls import Reading

OSLO = [("get_weather", {"city": "Oslo"})]
BOTH = [*OSLO, ("now", {})]
JSON = '{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[get_weather(city="Oslo")]', OSLO),
        ("[get_weather(city='Oslo')]", OSLO),
        (' \n[ get_weather ( city = "Oslo" , ) , ]\n', OSLO),
        ('[get_weather(city="Oslo"), now()]', BOTH),
        (JSON, OSLO),
        ('{"name": "get_weather", "parameters": {"city": "Oslo"}}', OSLO),
        ('{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}', OSLO),
        ('{"type": "function", "function": {"name": "now", "arguments": {}}}', [("now", {})]),
        ('{"type": "function", "name": "now"}', [("now", {})]),
        ('{"name": "now", "parameters": null}', [("now", {})]),
        (JSON + '; {"name": "now", "parameters": {}}', BOTH),
        (JSON + '{"name": "now", "parameters": {}}', BOTH),
        (JSON + '\n{"name": "now", "parameters": {}}\n', BOTH),
        ("[" + JSON + ', {"name": "now", "parameters": {}}]', BOTH),
        ('<function=get_weather>{"city": "Oslo"}</function>', OSLO),
        ('<function=get_weather>{"city": "Oslo"}</function>\n<function=now>{}</function>', BOTH),
        ('<|python_start|>[get_weather(city="Oslo")]<|python_end|>', OSLO),
        ("<|python_start|>" + JSON + "<|python_end|>", OSLO),
        ("<|python_start|><|python_end|>" + JSON, OSLO),
        ("<|python_start|>" + JSON, OSLO),
        ("<|python_start|>1 + 1<|python_end|>", [("code_interpreter", {"code": "1 + 1"})]),
    ],
)
def test_calls_are_read(text, calls):
    assert tool_calls.read(text) == Reading("", calls)


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("-1", -1),
        ("+2.5e-3", 2.5e-3),
        ("[1, [True, None], {'a': {'b': ()}}]", [1, [True, None], {"a": {"b": []}}]),
        ("[true, false, null]", [True, False, None]),
        (r'"a\"b\\c\u00e9\n"', 'a"b\\c\u00e9\n'),
        (r'"\d+\."', r"\d+\."),
        (r'r"\d\n"', r"\d\n"),
        ('"two\nlines"', "two\nlines"),
        ('"""say "hi",\n(ok)]"""', 'say "hi",\n(ok)]'),
        ("'it' 'self'", "itself"),
        ('"\U0001f411\u2028"', "\U0001f411\u2028"),
        ('"), g(y=1"', "), g(y=1"),
        ("1_000", 1000),
    ],
)
def test_pythonic_values(source, value):
    assert tool_calls.read(f"[f(x={source}, from='me')]").calls == [
        ("f", {"x": value, "from": "me"})
    ]


def test_names_beyond_python():
    text = '[mcp.server/get-it:2(my-key=1, class="a", **{"a b": 2})]'
    arguments = {"my-key": 1, "class": "a", "a b": 2}
    assert tool_calls.read(text).calls == [("mcp.server/get-it:2", arguments)]
    assert tool_calls.write([("mcp.server/get-it:2", arguments)], "pythonic") == text


def test_content_before_calls_is_kept():
    assert tool_calls.read("See [1]:\n[now()]") == Reading("See [1]:\n", [("now", {})])
    assert tool_calls.read("One moment. " + JSON) == Reading("One moment. ", OSLO)
    hf = f"<|python_start|>Thinking<|python_end|>{JSON}"
    assert tool_calls.read(hf) == Reading("Thinking", OSLO)


@pytest.mark.parametrize(
    "text",
    [
        '[get_weather(city="Oslo"',
        "[get_weather(city=Oslo)]",
        "[get_weather(city=f'{x}')]",
        "[get_weather(city=__import__('os').getcwd())]",
        "[get_weather(city=1+1)]",
        "[get_weather(city=b'x')]",
        "[get_weather(city={1, 2})]",
        "[get_weather(city={1: 2})]",
        "[get_weather(city=1j)]",
        "[get_weather(city=1e999)]",
        "[get_weather(city=" + "9" * 5000 + ")]",
        "[get_weather(city=" + "[" * 5000 + "]" * 5000 + ")]",
        "[get_weather(city=" + "-" * 100_000 + "1)]",
        "[get_weather(city=1, city=2)]",
        "[get_weather(**[1])]",
        '[get_weather("Oslo"), now(x=1)] and then?',
        'get_weather(city="Oslo")',
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Os',
        '{"name": "get_weather", "parameters": [1]}',
        '{"name": "get weather", "parameters": {}}',
        '{"name": "f", "parameters": {"x": NaN}}',
        '{"name": "f", "parameters": {"x": 1e999}}',
        '{"name": "f", "parameters": ' + '{"x": [' * 9000 + "}",
        "<function=f>{'x': 1}</function>",
        '<function=f>{"x": 1}',
        "<function=f>[]</function>",
        "<|python_start|>[f(x=]<|python_end|>",
        "before <|python_start|>1 + 1<|python_end|>",
    ],
)
def test_what_looks_like_a_call_stays_content_and_is_flagged(text):
    assert tool_calls.read(text) == Reading(text, suspect=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Plain words.",
        "[1, 2, 3]",
        "[f(x) for x in xs]",
        "print('hello')",
        '{"name": "Ada", "age": 36}',
        '{"type": "object", "properties": {}}',
        "{}",
        "a < b",
        "\ud800",
    ],
)
def test_other_text_is_content(text):
    assert tool_calls.read(text) == Reading(text)


@pytest.mark.parametrize(
    "unit",
    [
        *("[", "[f(", "[f(a=", "[f(a=[f(a=", '[f(a="', '[f(a="""', "[f(),", "[ ", "f.(", "((("),
        *('{"name":', '{"name": {', '{"type": "function", ', "<function=f>", "<|python_start|>"),
        *("\\", "'", '"""'),
    ],
)
def test_hostile_text_takes_linear_time(unit):
    def seconds(count: int) -> float:
        text = unit * count + ")]"
        start = time.perf_counter()
        tool_calls.read(text)
        return time.perf_counter() - start

    short = min(seconds(2_000) for _ in range(2))
    assert min(seconds(16_000) for _ in range(2)) < 24 * max(short, 0.01)


def test_unknown_dialect_is_an_error():
    with pytest.raises(ConfigError, match="'yaml'; use pythonic or json"):
        tool_calls.write(OSLO, "yaml")
