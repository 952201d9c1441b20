"""Fields of bodies: python -m pytest tests/serve/dialects/test_fields.py"""

import json

import pytest

from herdling.serve.dialects import fields
from herdling.serve.errors import ApiError
from herdling.serve.protocol import Format


def refused(call, *arguments, **named) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **named)
    assert caught.value.status == 400
    return caught.value


def test_null_is_absent():
    assert fields.get({"a": None}, "a", int) is None
    assert fields.get({}, "a", int) is None
    error = refused(fields.need, {"a": None}, "a", int, "x[0].")
    assert (error.param, error.message) == ("x[0].a", "x[0].a is missing; it must be an integer")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, int),
        (True, float),
        (1, bool),
        ("1", int),
        (1.0, int),
        ([], dict),
        ({}, list),
        (1, str),
    ],
)
def test_types_are_kept_apart(value, kind):
    assert refused(fields.get, {"a": value}, "a", kind).param == "a"


def test_integers_are_numbers():
    assert fields.get({"a": 1}, "a", float) == 1


def test_ranges_of_settings_are_checked_and_unknown_ones_ignored():
    options = fields.options({"temperature": 0, "new": 1, "stop": "x"}, max_tokens=3)
    assert (options.temperature, options.stop, options.max_tokens) == (0, ("x",), 3)
    assert refused(fields.options, {"top_p": 1.5}).param == "top_p"
    assert refused(fields.options, {"temperature": "hot"}).param == "temperature"
    assert refused(fields.options, {"stop": [1]}).message


def test_limits_and_alternatives():
    assert fields.limit({"n": 1}, "n") == 1
    assert refused(fields.limit, {"n": 0}, "n").param == "n"
    assert fields.top_logprobs({}) == 0
    assert refused(fields.top_logprobs, {"top_logprobs": 21})


def test_schemas():
    made = fields.schema_format({"type": "string"}, "s")
    assert (made.kind, json.loads(made.text)) == ("json_schema", {"type": "string"})
    assert fields.schema_format(True, "s") == Format("json_schema", "true")
    assert refused(fields.schema_format, "x", "s").param == "s"


def test_errors_do_not_repeat_long_values():
    assert len(refused(fields.get, {"a": "x" * 10_000}, "a", int).message) < 120
