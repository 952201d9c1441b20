"""Who guesses the next tokens. Here: what a draft is, prompt lookup, several in turn.

    drafter = NgramDraft()                                      # one for an engine
    draft = drafter.begin(prompt_ids)                           # one for a sequence
    guess = draft.propose(4, sampler)                           # tokens, and what they were drawn from
    draft.commit(tokens)                                        # what the sequence really went on with

Models that guess are in `draft_models`. No proposal can change what is generated (`speculative.accept`
sees to that), only how fast.

Shape letters: g proposed tokens, V vocabulary.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from herdling.errors import ConfigError
from herdling.infer.sampler import Sampler

SLOTS = 256
"""Size of a new n-gram table, a power of two."""


@dataclass(frozen=True)
class Proposal:
    """Guessed tokens, and the distributions (g, V) float64 they were drawn from (None: certain)."""

    tokens: list[int]
    q: Tensor | None = None


class Draft(Protocol):
    """Guesses for one sequence."""

    @property
    def nbytes(self) -> int:
        """Memory of its own: index, or keys and values."""
        ...

    def propose(self, count: int, sampler: Sampler) -> Proposal:
        """At most `count` tokens to come; random numbers are the request's own."""
        ...

    def commit(self, tokens: Sequence[int]) -> None:
        """Go on with `tokens`, whatever was proposed."""
        ...


Asked = tuple[Draft, int, Sampler]
"""One sequence's draft, how many tokens it is to propose at most, and the request's random numbers."""


class Drafter(Protocol):
    """Makes drafts; shared by all sequences."""

    cost: float
    """Of a proposed token, in steps of the target, by the bytes they read."""
    sampled: bool
    """Whether proposals are drawn, so that their number is part of what a seed reproduces."""

    def begin(self, ids: Sequence[int]) -> Draft: ...

    def propose(self, asked: Sequence[Asked]) -> list[Proposal]:
        """What the drafts that this one began propose, for the sequences of a step together."""
        ...


class OneByOne:
    """`Drafter.propose` for those that gain nothing from several sequences at once."""

    sampled = False

    def propose(self, asked: Sequence[Asked]) -> list[Proposal]:
        return [draft.propose(count, sampler) for draft, count, sampler in asked]


class NgramDraft(OneByOne):
    """Prompt lookup: what followed the last tokens when they came before, in prompt or reply.

    Source: Saxena, prompt-lookup-decoding (2023); repeats are continued as LZ77 does.
    """

    cost = 0.0

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """The last `longest` tokens are looked up first, then fewer, down to `shortest`."""
        if not 1 <= shortest <= longest:
            raise ConfigError(f"n-grams of {shortest} to {longest} tokens; use 1 <= shortest <= longest")  # fmt: skip
        self.longest, self.shortest = longest, shortest

    def begin(self, ids: Sequence[int]) -> "Ngrams":
        return Ngrams(ids, self.longest, self.shortest)


class Ngrams:
    """The latest place behind every n-gram of one sequence; constant time and memory a token.

    One table for all lengths, open to collisions: what it finds is compared with the text, so that
    at worst a match is missed.
    """

    def __init__(self, ids: Sequence[int], longest: int, shortest: int) -> None:
        self._ids = array("i")
        self._sizes = range(longest, shortest - 1, -1)
        self._places = array("i", bytes(4 * SLOTS))
        self.commit(ids)

    @property
    def nbytes(self) -> int:
        return self._ids.itemsize * len(self._ids) + self._places.itemsize * len(self._places)

    def propose(self, count: int, sampler: Sampler) -> Proposal:
        place = self._find()
        if not place or count < 1:
            return Proposal([])
        # Where the match overlaps the end, what was copied is copied on.
        known = self._ids[place : place + count]
        return Proposal([known[i % len(known)] for i in range(count)])

    def commit(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # Only now does something follow the last n-grams, so none ever finds itself.
            self._insert(len(self._ids))
            self._ids.append(token)
        if 2 * len(self._sizes) * len(self._ids) > len(self._places):
            self._grow()

    def _find(self) -> int:
        """The place behind an earlier copy of the last tokens, as many as possible; 0 if none."""
        ids = self._ids
        for n in self._sizes:
            place = self._places[self._slot(len(ids), n)] if n <= len(ids) else 0
            if place and ids[place - n : place] == ids[len(ids) - n :]:
                return place
        return 0

    def _slot(self, end: int, n: int) -> int:
        return hash(tuple(self._ids[end - n : end])) & (len(self._places) - 1)

    def _insert(self, end: int) -> None:
        for n in self._sizes:
            if n <= end:
                self._places[self._slot(end, n)] = end

    def _grow(self) -> None:
        slots = len(self._places)
        while slots < 4 * len(self._sizes) * len(self._ids):
            slots *= 2
        self._places = array("i", bytes(4 * slots))
        for end in range(len(self._ids)):
            self._insert(end)


class FirstDraft:
    """Several drafts in turn: the first that has a guess. N-grams where they match, else a model."""

    def __init__(self, *drafters: Drafter) -> None:
        if not drafters:
            raise ConfigError("FirstDraft has no drafts; give at least one")
        self._drafters = drafters
        self.cost = max(drafter.cost for drafter in drafters)
        self.sampled = any(drafter.sampled for drafter in drafters)

    def begin(self, ids: Sequence[int]) -> "FirstGuess":
        return FirstGuess([drafter.begin(ids) for drafter in self._drafters])

    def propose(self, asked: Sequence[Asked]) -> list[Proposal]:
        out = [Proposal([])] * len(asked)
        left = list(range(len(asked)))
        for n, drafter in enumerate(self._drafters):
            inner = [(_part(asked[i][0], n), *asked[i][1:]) for i in left]
            for i, proposal in zip(left, drafter.propose(inner), strict=True):
                out[i] = proposal
            left = [i for i in left if not out[i].tokens]
        return out


def _part(draft: Draft, n: int) -> Draft:
    assert isinstance(draft, FirstGuess)
    return draft.drafts[n]


class FirstGuess:
    """Guesses for one sequence, by the first of these drafts that has any."""

    def __init__(self, drafts: Sequence[Draft]) -> None:
        self.drafts = drafts

    @property
    def nbytes(self) -> int:
        return sum(draft.nbytes for draft in self.drafts)

    def propose(self, count: int, sampler: Sampler) -> Proposal:
        guesses = (draft.propose(count, sampler) for draft in self.drafts)
        return next((guess for guess in guesses if guess.tokens), Proposal([]))

    def commit(self, tokens: Sequence[int]) -> None:
        for draft in self.drafts:
            draft.commit(tokens)
