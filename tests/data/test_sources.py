"""The order of a text source, its parts, and its cache."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.data.sources import InMemory, TextSource, document, shuffled
from herdling.errors import DataError
from herdling.inputs.tokenizer import Tokenizer

TOK = Tokenizer.train(["the quick brown fox jumps over the lazy dog\n"] * 3, 300)


@given(st.integers(1, 300), st.integers(0, 5), st.text(max_size=5))
def test_every_round_is_a_permutation(count: int, round_: int, key: str) -> None:
    places = [shuffled(round_ * count + i, count, key) for i in range(count)]
    assert sorted(places) == list(range(count))


def test_rounds_keys_and_neighbours_differ() -> None:
    first = [shuffled(i, 1000, "a") for i in range(1000)]
    assert first != [shuffled(1000 + i, 1000, "a") for i in range(1000)]
    assert first != [shuffled(i, 1000, "b") for i in range(1000)]
    # As many neighbours stay neighbours as in a random order: about 2.
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < 12
    # Known values: another order would break the exact resume of saved runs.
    assert [shuffled(i, 10, "key") for i in range(20)] == KNOWN


KNOWN = [1, 0, 3, 2, 9, 7, 5, 8, 4, 6, 1, 4, 7, 5, 3, 6, 2, 9, 0, 8]


texts = st.lists(st.text(alphabet="ab \n\u00e9\U0001f600", min_size=1, max_size=120), min_size=1, max_size=6)  # fmt: skip


@settings(deadline=None)
@given(texts, st.one_of(st.none(), st.integers(1, 50)))
def test_parts_of_a_round_hold_every_text_once(given_texts: list[str], cut: int | None) -> None:
    source = TextSource("t", InMemory(given_texts), TOK, cut=cut)
    assert source.size is not None
    places = [shuffled(i, source.size, "t/0") for i in range(source.size)]
    examples = [source.example(i) for i in range(source.size)]
    ids = [token for _, e in sorted(zip(places, examples, strict=True), key=lambda x: x[0]) for token in e.tokens]  # fmt: skip
    assert ids.count(TOK.bos) == ids.count(TOK.end_of_text) == len(given_texts)
    read = [TOK.decode(piece[1:]) for piece in _split(ids, TOK.end_of_text)]
    assert read == given_texts
    again = [source.example(source.size + i).tokens for i in range(source.size)]
    assert sorted(again) == sorted(e.tokens for e in examples)


def _split(ids: list[int], end: int) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in ids:
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == []
    return found


def test_parts_end_with_a_line_where_one_is_near() -> None:
    text = "".join(f"{'x' * 30}{i:03}\n" for i in range(30))
    source = TextSource("t", InMemory([text]), TOK, cut=300)
    parts = [TOK.decode(source.example(i).tokens) for i in range(source.size or 0)]
    assert sum(part.endswith("\n") for part in parts) == len(parts) - 1  # the last: end_of_text


def test_cache_forgets_and_reads_again() -> None:
    given_texts = [f"text number {i} " * 20 for i in range(50)]
    plain = TextSource("t", InMemory(given_texts), TOK)
    small = TextSource("t", InMemory(given_texts), TOK, cache_bytes=2000)
    for i in [*range(100), *range(0, 100, 7)]:
        assert small.example(i) == plain.example(i)
    assert small._cache._held <= 2000
    assert small._cache._held == sum(a.nbytes for a in small._cache._arrays.values())


def test_document_puts_images_first_and_asks_for_text_alone() -> None:
    example = document([10, 11], TOK, "d", image_ids=[7, 8, 9])
    assert example.tokens == [TOK.bos, 7, 8, 9, 10, 11, TOK.end_of_text]
    assert example.loss_mask == [False] * 4 + [True] * 3


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="t: no text; remedy"):
        TextSource("t", InMemory([]), TOK)
