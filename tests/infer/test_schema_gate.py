"""What is refused is named; what passes is enforced, as `jsonschema` judges what random models write."""

import json
import random
import re

import jsonschema
import pytest
import torch

from herdling.errors import Error, InputError
from herdling.infer.grammar import Grammar, GrammarCompiler
from herdling.infer.schema_gate import ANNOTATIONS, FORMATS, REFUSED, enforceable
from herdling.inputs.tokenizer import Tokenizer

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
TAGGED = {
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    "$defs": {
        kind: {
            "type": "object",
            "properties": {"kind": {"const": kind}, "age": {"type": "integer", "minimum": 0}},
            "required": ["kind", "age"],
            "additionalProperties": False,
        }
        for kind in ("cat", "dog")
    },
}
# Closed, or short by nature, so that a random model comes to an end.
ENFORCED = [
    {"type": "integer", "minimum": 3, "maximum": 10},
    {"type": "integer", "exclusiveMinimum": -4, "multipleOf": 3, "maximum": 30},
    {"type": "number", "minimum": 0.5, "exclusiveMaximum": 1.5},
    {"type": ["number", "null"], "minimum": -2, "maximum": 2},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{2}x?$"},
    {"type": "string", "pattern": "b", "maxLength": 5},
    {"enum": [1, "a", None, {"x": [1, True]}, 2.5, "é\n/"]},
    {"const": {"a": [1.5, "ß"]}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": 1}], "items": False},
    {"type": "array", "uniqueItems": False, "items": {"const": 1}, "maxItems": 4},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a": {"const": 1}}, "additionalProperties": False,
     "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"a b": {"type": "boolean"}, 'q"': {"const": "\t"}},
     "required": ['q"'], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"],
     "additionalProperties": {"type": "null"}, "maxProperties": 3},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "anyOf": [
        {"required": ["a"]}, {"properties": {"b": {"const": 1}}, "required": ["b"]}],
     "additionalProperties": {"type": "null"}, "maxProperties": 2},
    {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "b$"}, {"maxLength": 5}]},
    {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "maximum": 9}], "minimum": 2},
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "string", "maxLength": 3}]},
    {"$ref": "#/properties/x", "properties": {"x": {"type": "integer", "minimum": 1, "maximum": 7}}},
    {"$defs": {"a/b~c": {"type": "boolean"}}, "$ref": "#/$defs/a~1b~0c"},
    TREE,
    TAGGED,
    *({"type": "string", "format": kind, "maxLength": 40} for kind in sorted(FORMATS)),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    text = '{"kind": "cat", "age": 12, "next": null, "value": [true, false], "2024-01-31": -0.5e1} '
    return GrammarCompiler(Tokenizer.train([text * 3, "the quick brown fox " * 9], 340), 352)


def reply(compiler: GrammarCompiler, schema: object, seed: int, most: int = 400) -> str | None:
    """What random logits write; None if they come to no end."""
    matcher = compiler.matcher(Grammar("json_schema", json.dumps(schema)))
    logits = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while not matcher.finished and len(ids) < most:
        row = torch.randn(compiler.vocab_size, generator=logits) * 2
        if matcher.accepting and seed % 2:
            break
        matcher.apply(row)
        ids.append(int(row.argmax()))
        matcher.advance(ids[-1])
    return compiler.tokenizer.decode(ids) if matcher.accepting else None


@pytest.mark.parametrize("schema", ENFORCED, ids=lambda schema: json.dumps(schema)[:60])
def test_what_random_models_write_is_valid(compiler, schema):
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    written = [reply(compiler, schema, seed) for seed in range(12)]
    ended = [text for text in written if text is not None]
    assert len(ended) >= 6
    for text in ended:
        validator.validate(json.loads(text))


def accepts(compiler: GrammarCompiler, schema: object, text: str) -> bool:
    """Whether the reply may be `text`, byte by byte, and may end with it."""
    matcher = compiler.matcher(Grammar("json_schema", json.dumps(schema)))
    tokens = {compiler.tokenizer.to_bytes([id]): id for id in range(len(compiler.tokenizer))}
    for byte in text.encode():
        try:
            matcher.advance(tokens[bytes([byte])])
        except Error:
            return False
    return matcher.accepting


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        # A second spelling of a key, or a second key, would win over the first.
        ({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, '{"a":1,"\\u0061":2}'),
        ({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, '{"a":1,"a":2}'),
        ({"type": "object", "properties": {"ab": {}}, "patternProperties": {"^a": {"const": 1}}}, '{"ab":2}'),
        ({"properties": {"a": {"const": 1}}, "allOf": [{"additionalProperties": False}]}, '{"a":1}'),
        ({"enum": [5, 20], "maximum": 10}, "20"),
        ({"type": "string", "enum": [1, "a"]}, "1"),
        ({"type": "integer"}, "1.5"),
        ({"type": "integer"}, "1" * 30),
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "date", "pattern": "^0"}, '"0000-01-01"'),
        ({"type": "string", "format": "date-time"}, '"1900-02-29T00:00:00Z"'),
        ({"type": "string", "format": "date-time"}, '"2023-02-28T10:00:60Z"'),
        ({"type": "string", "format": "time", "allOf": [{"maxLength": 9}]}, '"10:00:60Z"'),
        (True, '{"a" : 1}'),
        (True, '{"a":  1}'),
        (True, "[1,\n2]"),
        (True, " 1"),
    ],
)  # fmt: skip
def test_documents_that_must_not_pass(compiler, schema, document):
    assert not accepts(compiler, schema, document)


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        (True, '{"a": [1, 2.5e3, "\\n😀", {}], "b":null}'),
        ({"type": "object"}, "{}"),
        ({"type": "string", "maxLength": 1}, '"😀"'),
        ({"type": "string", "format": "date"}, '"2000-02-29"'),
        ({"type": "string", "format": "date-time"}, '"2024-02-29T23:59:59.5+01:00"'),
        (TREE, '{"value": 1, "next": {"value": 2, "next": null}}'),
        (TAGGED, '{"kind": "dog", "age": 3}'),
        ({"title": "t", "x-mine": 1, "unheard": [], "type": "boolean"}, "true"),
    ],
)
def test_documents_that_must_pass(compiler, schema, document):
    assert accepts(compiler, schema, document)


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_keywords_that_cannot_be_enforced_are_named_with_their_place(keyword):
    schema = {"type": "object", "properties": {"a/b": {"items": {keyword: {}}}}}
    path = rf"/properties/a~1b/items/{re.escape(keyword)} cannot"
    with pytest.raises(InputError, match=rf"json_schema: {re.escape(keyword)} at {path}"):
        enforceable(schema)


def test_annotations_and_unknown_words_are_no_constraints():
    schema = {name: "x" for name in ANNOTATIONS} | {"x-y": 1, "colour": 2, "type": "boolean"}
    assert enforceable(schema) == {"type": "boolean"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([1], "json_schema is list"),
        (False, "nothing is valid"),
        ({"properties": {"a": {"maxLenght": 3}}}, "maxLenght at /properties/a/maxLenght .* maxLength"),
        ({"type": "string", "format": "iri"}, "format at /format .*'iri' is none of date, date-time"),
        ({"type": "sting"}, "type at /type"),
        ({"type": []}, "type at /type"),
        ({"items": [{"type": "integer"}]}, "/items is no schema"),
        ({"minItems": -1}, "minItems at /minItems"),
        ({"maximum": "3"}, "maximum at /maximum .* a number"),
        ({"exclusiveMinimum": True, "minimum": 3}, "exclusiveMinimum at"),
        ({"enum": []}, "enum at /enum"),
        ({"const": ["a\0"]}, "const at /const .* control character"),
        ({"anyOf": []}, "anyOf at /anyOf"),
        ({"minProperties": 2}, "minProperties at .* required"),
        ({"properties": {f"p{i}": {} for i in range(300)}}, "properties at .* 256"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf at /oneOf .* branches 0 and 1"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "oneOf at"),
        ({"$ref": "https://example.com/x"}, r"\$ref at /\$ref .* is outside"),
        ({"$ref": "#/$defs/a"}, r"\$ref at /\$ref .* no schema at #/\$defs/a"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "back to itself"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "leads back to itself"),
        ({"description": "x" * 2**18}, "bytes; at most"),
        ({"default": float("nan")}, "is not JSON"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_used_are_refused(schema, words):
    with pytest.raises(InputError, match=words):
        enforceable(schema)


def test_a_branch_of_one_of_may_be_told_apart_by_type_constant_or_tag():
    for branches in (
        [{"type": "string"}, {"type": ["number", "null"]}],
        [{"enum": ["a", "b"]}, {"const": "c"}, {"type": "boolean"}],
        TAGGED["oneOf"],
    ):
        assert "anyOf" in enforceable({"$defs": TAGGED["$defs"], "oneOf": branches})
    both = {"anyOf": [{"maximum": 3}, {"type": "null"}], "oneOf": [{"const": 1}, {"const": 2}]}
    assert enforceable(both)["allOf"] == [{"anyOf": [{"const": 1}, {"const": 2}]}]


@pytest.mark.parametrize("depth", [100, 5000])
def test_deep_schemas_are_refused(depth):
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(InputError, match="nests more than 64 levels"):
        enforceable(schema)


def test_strict_narrows_and_never_contradicts():
    schema = {
        "type": "object",
        "properties": {"n": {"type": "number"}, "free": {"type": "object"}, "s": {"$ref": "#/$defs/s"}},
        "required": ["n"],
        "$defs": {"s": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0}}}},
    }  # fmt: skip
    strict = enforceable(schema, strict=True)
    assert strict["additionalProperties"] is False
    assert strict["$defs"]["s"]["additionalProperties"] is False
    assert strict["properties"]["free"]["additionalProperties"] == {"$ref": "#/$defs/any-json"}
    assert strict["properties"]["n"]["maximum"] == 10**18 - 1
    assert strict["$defs"]["s"]["properties"]["x"]["minimum"] == 0
    assert "additionalProperties" not in enforceable(schema)
    b = {"properties": {"b": {"const": 1}}, "required": ["b"]}
    joined = {"allOf": [{"properties": {"a": {"const": 1}}}, b]}
    assert enforceable(joined, strict=True)["allOf"] == joined["allOf"]
    beside = {"properties": {"a": {}}, "anyOf": [b]}
    assert enforceable(beside, strict=True)["anyOf"] == beside["anyOf"]


def test_hostile_schemas_end_quickly(compiler):
    """Each ends in an error or a grammar; what would hang would run into the suite's patience."""
    words = [f"w{i}" for i in range(3000)]
    random.Random(0).shuffle(words)
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(25)}
    hostile = [
        {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]},
        {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
        {"type": "string", "pattern": "(.*a){30}"},
        {"type": "string", "maxLength": 10**8},
        {"type": "array", "minItems": 10**9},
        {"enum": words},
        {"$defs": {**doubling, "d25": {"type": "integer"}}, "$ref": "#/$defs/d0"},
    ]  # fmt: skip
    for schema in hostile:
        try:
            matcher = compiler.matcher(Grammar("json_schema", json.dumps(schema)))
        except InputError:
            continue
        matcher.apply(torch.zeros(compiler.vocab_size))
