"""python -m pytest tests/infer/test_drafts.py: prompt lookup against a search from the front."""

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import ConfigError
from herdling.infer import drafts
from herdling.infer.drafts import FirstDraft, NgramDraft, Ngrams
from herdling.infer.sampler import Sampler, Sampling

SAMPLER = Sampler(Sampling())


def search(ids: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """The same by definition: the latest earlier copy of as many last tokens as possible."""
    for n in range(min(longest, len(ids) - 1), shortest - 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                out = list(ids)
                for i in range(count):
                    out.append(out[end + i])
                return out[len(ids) :]
    return []


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    commits=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=12),
    longest=st.integers(1, 4),
    count=st.integers(0, 6),
)
def test_it_finds_what_a_search_finds(prompt, commits, longest, count):
    shortest = min(2, longest)
    with mock.patch.object(drafts, "SLOTS", 2**20):
        draft = NgramDraft(longest, shortest).begin(prompt)
    text = list(prompt)
    for tokens in [[], *commits]:
        draft.commit(tokens)
        text += tokens
        got = draft.propose(count, SAMPLER)
        want = search(text, count, longest, shortest)
        assert got.q is None
        assert got.tokens == want or collide(draft, text, longest, shortest)


def collide(draft: Ngrams, text: list[int], longest: int, shortest: int) -> bool:
    """Whether two n-grams share a slot, as may happen even in a large table."""
    spans = [(i, n) for n in range(shortest, longest + 1) for i in range(n, len(text))]
    slots = {tuple(text[i - n : i]): draft._slot(i, n) for i, n in spans}
    return len(set(slots.values())) < len(slots)


def test_a_copied_passage_is_proposed_and_longer_matches_come_first():
    draft = NgramDraft().begin([5, 1, 2, 3, 7, 8, 9, 2, 3, 6, 1, 2, 3])
    assert draft.propose(3, SAMPLER).tokens == [7, 8, 9]  # 1 2 3, not the later 2 3
    assert NgramDraft().begin([1, 2, 3, 4]).propose(3, SAMPLER).tokens == []


def test_a_repeat_is_continued_round_and_round():
    draft = NgramDraft().begin([9, 1, 2, 3, 1, 2, 3])
    assert draft.propose(7, SAMPLER).tokens == [1, 2, 3, 1, 2, 3, 1]


def test_memory_is_a_few_dozen_bytes_a_token_and_grows_with_the_text():
    draft = NgramDraft().begin(range(1000))
    start = draft.nbytes
    draft.commit(range(1000, 50_000))
    assert start < draft.nbytes <= 50_000 * (4 + 4 * 4 * 2 * 3)
    draft.commit([7, 8])
    assert draft.propose(2, SAMPLER).tokens == [9, 10]


def test_lengths_out_of_order_are_refused():
    for longest, shortest in ((2, 3), (2, 0)):
        with pytest.raises(ConfigError, match="n-grams of"):
            NgramDraft(longest, shortest)


def test_the_first_draft_with_a_guess_is_heard_and_all_go_on_with_the_text():
    draft = FirstDraft(NgramDraft(4, 4), NgramDraft(2, 2)).begin([1, 2, 3, 4, 5, 9, 3, 4, 6])
    assert draft.propose(2, SAMPLER).tokens == []
    draft.commit([3, 4])
    assert draft.propose(2, SAMPLER).tokens == [6, 3]  # of two tokens
    draft.commit([5, 1, 2, 3, 4])
    assert draft.propose(2, SAMPLER).tokens == [5, 9]  # of four, where two would say 5, 1
    assert draft.nbytes > NgramDraft().begin([1]).nbytes
    with pytest.raises(ConfigError, match="at least one"):
        FirstDraft()
