"""What a reply must match: a JSON schema, a regular expression, or a grammar.

    compiler = GrammarCompiler(tokenizer, vocab_size)           # one an engine; cheap until used
    matcher = compiler.matcher(Grammar("regex", "[0-9]{3}"), stop_ids)
    matcher.apply(row)                                          # forbids logits (V,) in place
    matcher.advance(token)                                      # ... until matcher.finished

`llguidance` (extra `grammar`) says which tokens may follow. Control tokens never may; stop tokens may
where the grammar can end. JSON is written with at most one space after `,` and `:`, so a model that
loves white space cannot go on for ever, and schemas go through `schema_gate` first. Left out: text
before or after what the grammar describes, and tokens that follow by force (they are sampled too,
from a mask of one).
"""

import functools
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor

from herdling.errors import Error, InputError, require
from herdling.infer.sampler import Mask
from herdling.infer.schema_gate import enforceable
from herdling.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

JSON_STYLE: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # Without \u a key has one spelling only: "a" and "\u0061" would both be taken, and the last wins.
    "json_allowed_escapes": 'nrbtf\\"',
}
"""Options of llguidance's JSON; the separators are regular expressions."""

_NO_TOKEN = "\N{REPLACEMENT CHARACTER}".encode()
_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')


@dataclass(frozen=True)
class Grammar:
    """A language that the reply must belong to."""

    kind: Literal["json_schema", "json", "regex", "lark"]
    """`json` is any JSON object, and needs no text. `regex` must match the whole reply."""
    text: str = ""


class GrammarCompiler:
    """Compiles grammars for one vocabulary. `check` and `matcher` may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is that of the logits; ids from `len(tokenizer)` on are always forbidden.

        Raises nothing without llguidance: that is MissingExtra where a grammar is first used.
        """
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._prototype = functools.lru_cache(64)(self._compile)

    def check(self, grammar: Grammar) -> None:
        """Raise InputError unless the grammar can be enforced; MissingExtra without llguidance."""
        with self._lock:
            self._prototype(grammar)

    def matcher(self, grammar: Grammar, stop_ids: Sequence[int] = ()) -> "Matcher":
        """A matcher at the beginning of a reply. Compiling the same grammar again costs nothing."""
        with self._lock:
            prototype = self._prototype(grammar).deep_copy()
        return Matcher(prototype, stop_ids, min(len(self.tokenizer), self.vocab_size))

    @functools.cached_property
    def _words(self) -> "LLTokenizer":
        guidance = require("llguidance", "grammar")
        return guidance.LLTokenizer(guidance.TokenizerWrapper(_Words(self.tokenizer)))

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        guidance = require("llguidance", "grammar")
        matcher = guidance.LLMatcher(self._words, _source(grammar), log_level=0)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():  # the first mask may find the grammar too complex
            reason = " ".join(matcher.get_error().split("<state>")[0].split())
            raise InputError(f"{grammar.kind} cannot be enforced: {reason[:300]}")
        if not matcher.is_accepting() and not any(mask):
            raise InputError(f"{grammar.kind} cannot be enforced: no reply matches it")
        return matcher


class Matcher:
    """Where a reply stands in its grammar."""

    def __init__(self, state: "LLMatcher", stop_ids: Sequence[int], size: int) -> None:
        """`size` counts the ids that a token may have."""
        self._state, self._size = state, size
        self._stops = [id for id in dict.fromkeys(stop_ids) if 0 <= id < size]
        self._ended = 0
        """Tokens since the reply ended, the stop token among them."""
        self._allowed: Tensor | None = None

    @property
    def finished(self) -> bool:
        """Nothing may follow: a stop token came, or the grammar is complete and cannot go on."""
        return bool(self._ended) or (self._state.is_stopped() and not self._state.is_error())

    @property
    def accepting(self) -> bool:
        """Whether the reply may end here."""
        return self._state.is_accepting()

    def prepare(self) -> None:
        """Compute the mask of the next token, which `apply` then only uses.

        Raises Error where nothing may follow and the reply cannot end either, and where the grammar
        proves too complex; so one request can fail by itself.
        """
        if self._allowed is not None:
            return
        allowed = np.zeros(self._size, dtype=np.uint8)
        if not self.finished:
            packed = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(packed, count=self._size, bitorder="little")
            if self._state.is_error():
                raise Error(f"the grammar failed: {self._state.get_error()[:300]}")
        if self._stops:
            allowed[self._stops] = self.accepting or bool(self._ended)
        if not allowed.any():
            raise Error("the grammar allows no token here, and the reply must end")
        self._allowed = torch.from_numpy(allowed).bool()

    def apply(self, row: Tensor) -> None:
        """Set what may not follow to -inf, in place, in logits (V,)."""
        self.prepare()
        assert self._allowed is not None
        row[: self._size].masked_fill_(~self._allowed.to(row.device), -torch.inf)
        row[self._size :] = -torch.inf

    def advance(self, token: int) -> None:
        """Take the chosen token. Raises Error for one that the grammar forbids."""
        self._allowed = None
        if self._ended:
            self._ended += 1
        elif token in self._stops:
            if not self.accepting:
                raise Error(f"token {token} ends the reply before its grammar is complete")
            self._ended = 1
        elif token >= self._size or not self._state.try_consume_tokens([token]):
            raise Error(f"token {token} does not follow in the grammar")

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        self._allowed = None
        back = min(count, self._ended)
        self._ended -= back
        if count > back and not self._state.rollback(count - back):
            raise Error(f"the grammar cannot go back {count} tokens")

    def along(self, draft: Sequence[int]) -> list[Mask | None]:
        """The masks before each drafted token and after the last, this state left as it was.

        Behind a token that the grammar forbids, or that ends the reply, there is None: such a token
        is never accepted, or nothing follows it.
        """
        masks: list[Mask | None] = []
        taken = 0
        for token in [*draft, None]:
            if self.finished:
                break
            self.prepare()
            allowed = self._allowed
            assert allowed is not None
            masks.append(functools.partial(_forbid, allowed))
            if token is None or token >= self._size or not allowed[token]:
                break
            self.advance(token)
            taken += 1
        self.rollback(taken)
        return masks + [None] * (len(draft) + 1 - len(masks))

    def copy(self) -> Self:
        """The same place, to go on from independently."""
        twin = type(self)(self._state.deep_copy(), self._stops, self._size)
        twin._ended = self._ended
        return twin


def _forbid(allowed: Tensor, row: Tensor) -> None:
    size = len(allowed)
    row[:size].masked_fill_(~allowed.to(row.device), -torch.inf)
    row[size:] = -torch.inf


def _source(grammar: Grammar) -> str:
    """llguidance's form of the grammar."""
    from llguidance import LLMatcher

    if grammar.kind == "json":
        return _from_schema({"type": "object"})
    if grammar.kind == "json_schema":
        try:
            schema = json.loads(grammar.text)
        except (ValueError, RecursionError) as problem:
            raise InputError(f"json_schema is not JSON: {problem}") from None
        return _from_schema(enforceable(schema))
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind != "lark":
        raise InputError(f"grammar kind is {grammar.kind!r}; use json_schema, json, regex or lark")
    if "<" in _LITERALS.sub("", grammar.text):
        raise InputError("the lark grammar names a control token (<...>); those are never written")
    return LLMatcher.grammar_from_lark(grammar.text)


def _from_schema(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides=cast(Any, JSON_STYLE)
        )
    except ValueError as problem:
        raise InputError(f"json_schema cannot be enforced: {problem}") from None


class _Words:
    """Our vocabulary as llguidance asks for it, with an end token of its own after the last id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = len(tokenizer)
        self.tokens = [tokenizer.to_bytes([id]) for id in range(size)] + [b"<end of the grammar>"]
        unused = {id for id in range(size) if self.tokens[id] == _NO_TOKEN}
        self.special_token_ids = sorted({size, *unused, *tokenizer.specials.values()})
        self.eos_token_id, self.bos_token_id = size, None
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
