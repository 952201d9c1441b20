"""A reply stays in its grammar whatever the model wants, and ends; control tokens are never inside."""

import json
import re
import sys

import pytest
import torch

from herdling.errors import Error, InputError, MissingExtra
from herdling.infer.grammar import Grammar, GrammarCompiler
from herdling.infer.sampler import Sampler, Sampling, choose
from herdling.inputs.tokenizer import Tokenizer

EXTRA = 24
"""Rows of the head beyond the tokenizer."""


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    text = '{"name": "Oslo", "days": [1, 2, true], "list": null}\n    \n\t  \t\n   '
    return Tokenizer.train([text * 4, "numbers 1 2 3, then 2024-01-31 " * 4], 345)


@pytest.fixture(scope="module")
def compiler(vocabulary: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(vocabulary, len(vocabulary) + EXTRA)


def play(
    compiler: GrammarCompiler,
    grammar: Grammar,
    *,
    seed: int = 0,
    most: int = 300,
    wish: list[int] | None = None,
    stop: bool = True,
) -> tuple[str, str]:
    """Text and finish reason of a random model that would always rather write one of `wish`."""
    tok = compiler.tokenizer
    matcher = compiler.matcher(grammar, [tok.eot, tok.eom] if stop else [])
    sampler, logits = Sampler(Sampling(1.0), seed), torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while not matcher.finished:
        if len(ids) == most:
            return tok.decode(ids), "length"
        row = torch.randn(1, compiler.vocab_size, generator=logits) * 2
        row[0, wish or []] += 100
        token = choose(row, [sampler], [matcher.apply])[0][0]
        matcher.advance(token)
        ids.append(token)
    inside = ids[:-1] if ids[-1] in (tok.eot, tok.eom) else ids
    assert not set(inside) & set(tok.specials.values())
    assert max(inside, default=0) < len(tok)
    return tok.decode(inside), "stop"


@pytest.mark.parametrize(
    "pattern",
    ["[0-9]{3}", "(ab|c)*d?", "[^a-z]{2,5}", "[0-9]+-[a-z]{1,3}", "(?i)yes|no", "é😀?", "x*"],
)
def test_replies_match_the_regular_expression(compiler, pattern):
    for seed in range(10):
        text, reason = play(
            compiler, Grammar("regex", pattern), seed=seed, wish=compiler.tokenizer.stop_ids
        )
        assert reason == "stop"
        assert re.fullmatch(pattern, text)


def test_replies_match_the_grammar(compiler):
    sums = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]?/'
    for seed in range(10):
        text, reason = play(compiler, Grammar("lark", sums), seed=seed)
        if reason == "stop":
            assert re.fullmatch(r"[0-9+()]+", text)
            assert eval(text) > 0


def test_json_mode_writes_an_object(compiler):
    ended = 0
    for seed in range(20):
        text, reason = play(compiler, Grammar("json"), seed=seed, wish=[ord("}") - 33])
        ended += reason == "stop"
        assert reason == "length" or isinstance(json.loads(text), dict)
    assert ended > 5


def spaces(tok: Tokenizer) -> list[int]:
    return [id for id in range(len(tok)) if not tok.to_bytes([id]).strip()]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"n": {"const": [1, {"a": None}]}}, "required": ["n"],
         "additionalProperties": False},
        {"patternProperties": {"^x$": {"const": 1}}, "type": "object", "additionalProperties": False,
         "maxProperties": 3},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 5},
    ],
)  # fmt: skip
def test_a_model_that_loves_white_space_still_ends(compiler, schema):
    assert len(spaces(compiler.tokenizer)) > 4
    grammar = Grammar("json_schema", json.dumps(schema))
    text, reason = play(compiler, grammar, wish=spaces(compiler.tokenizer), most=60)
    assert reason == "stop"
    assert re.search(r"\s\s|[\t\n]", text) is None
    json.loads(text)


def test_without_a_limit_of_its_own_a_reply_ends_by_length(compiler):
    letters = [id for id in range(256) if compiler.tokenizer.to_bytes([id]).isalpha()]
    text, reason = play(
        compiler, Grammar("json_schema", '{"type": "string"}'), wish=letters, most=50
    )
    assert reason == "length"
    assert text.startswith('"')


def test_the_reply_ends_with_a_stop_token_only_where_the_grammar_does(compiler):
    tok = compiler.tokenizer
    matcher = compiler.matcher(Grammar("regex", "ab?"), [tok.eot, tok.encode("b")[0]])
    a, b = tok.encode("a")[0], tok.encode("b")[0]

    def allowed() -> set[int]:
        row = torch.zeros(compiler.vocab_size)
        matcher.apply(row)
        assert set(row.tolist()) <= {0.0, -torch.inf}
        return set((row == 0).nonzero()[:, 0].tolist())

    assert allowed() == {a}
    with pytest.raises(Error, match="ends the reply before"):
        matcher.advance(tok.eot)
    matcher.advance(a)
    assert matcher.accepting
    assert not matcher.finished
    assert allowed() == {tok.eot, b}  # as a stop token b ends the reply, though the grammar goes on
    matcher.advance(b)
    assert matcher.finished


def test_forbidden_tokens_are_errors(compiler):
    tok = compiler.tokenizer
    for token in (tok.encode("7")[0], tok.bos, tok.eot, len(tok) + 3):
        with pytest.raises(Error, match="does not follow"):
            compiler.matcher(Grammar("regex", "[ab]*")).advance(token)


def test_rollback_copy_and_masks_along_a_draft(compiler):
    tok = compiler.tokenizer
    a, b, nine = (tok.encode(text)[0] for text in "ab9")
    matcher = compiler.matcher(Grammar("regex", "a{2}[0-9]?"), [tok.eot])

    def row(mask) -> list[float]:
        logits = torch.zeros(compiler.vocab_size)
        mask(logits)
        return logits.tolist()

    draft = [a, a, nine, tok.eot]
    masks = matcher.along(draft)
    for token, mask in zip(draft[:3], masks, strict=False):
        assert mask is not None
        assert row(mask) == row(matcher.apply)
        matcher.advance(token)
    assert matcher.finished  # nothing can follow, so no mask is needed
    assert masks[3:] == [None, None]
    twin = matcher.copy()
    matcher.rollback(2)
    assert row(matcher.apply) == row(masks[1])
    assert twin.finished
    matcher.advance(a)
    matcher.advance(tok.eot)
    matcher.rollback(1)
    assert row(matcher.apply) == row(masks[2])
    assert [mask is None for mask in matcher.along([b, nine])] == [False, True, True]


def test_stop_tokens_in_a_draft_end_its_masks(compiler):
    tok = compiler.tokenizer
    nine = tok.encode("9")[0]
    matcher = compiler.matcher(Grammar("regex", "[0-9]*"), [tok.eot])
    masks = matcher.along([nine, tok.eot, nine])
    assert [mask is None for mask in masks] == [False, False, True, True]
    assert not matcher.finished


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "(?=a)b"), "regex cannot be enforced: .*look-around"),
        (Grammar("regex", "a("), "unclosed group"),
        (Grammar("lark", "start: thing"), 'lark cannot be enforced: .*unknown name: "thing"'),
        (Grammar("lark", 'start: "a" <|eot|>'), "names a control token"),
        (Grammar("lark", 'start: "a" <[3-9]>'), "names a control token"),
        (Grammar("json_schema", "{"), "json_schema is not JSON"),
        (Grammar("json_schema", "[" * 10**5), "json_schema is not JSON"),
        (Grammar("json_schema", '{"uniqueItems": true}'), "uniqueItems at /uniqueItems"),
        (Grammar("json_schema", '{"type": "string", "pattern": "("}'), "regex parse error"),
        (
            Grammar("json_schema", '{"type": "string", "pattern": "^a$", "minLength": 2}'),
            "Unsatisfiable",
        ),
        (Grammar("yaml"), "grammar kind is 'yaml'"),  # type: ignore[arg-type]
    ],
)
def test_grammars_that_cannot_be_enforced_are_refused(compiler, grammar, words):
    with pytest.raises(InputError, match=words):
        compiler.check(grammar)
    with pytest.raises(InputError, match=words):
        compiler.matcher(grammar)


def test_texts_that_look_like_control_tokens_are_letters(compiler):
    text, reason = play(compiler, Grammar("lark", r'start: "<|eot|>" /<[a]>/'))
    assert (text, reason) == ("<|eot|><a>", "stop")


def test_without_the_library_using_a_grammar_says_what_to_install(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(vocabulary, len(vocabulary))
    with pytest.raises(MissingExtra, match=r"herdling\[grammar\]"):
        compiler.check(Grammar("json"))
