"""Stop strings are found wherever tokens cut them, and no text comes too early or too late."""

from hypothesis import given
from hypothesis import strategies as st

from herdling.infer.stopping import StoppingText


def run(tok, ids: list[int], stops: list[str]) -> tuple[list[str], bool]:
    text = StoppingText(tok, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, True
    pieces.append(text.flush())
    return pieces, text.stopped


@given(
    text=st.text("ab\u00e9\U0001f411 ", max_size=30),
    stops=st.lists(st.text("ab\u00e9 ", min_size=1, max_size=4), max_size=3),
    whole_words=st.booleans(),
)
def test_the_text_ends_before_the_first_stop(tok, text, stops, whole_words):
    ids = tok.encode(text)
    if not whole_words:  # byte by byte, so that stops and characters are cut everywhere
        ids = [i for byte in text.encode() for i in tok._byte_ids[byte : byte + 1]]
    pieces, stopped = run(tok, ids, stops)
    places = [p for p in map(text.find, stops) if p >= 0]
    assert stopped == bool(places)
    got = "".join(pieces)
    if not places:
        assert got == text
    else:
        # A longer stop that begins earlier may end later: the first to be complete decides.
        assert any(text[len(got) :].startswith(stop) for stop in stops)
        assert text.startswith(got)
        assert not any(stop in got for stop in stops)


def test_only_what_may_become_a_stop_is_held_back(tok):
    text = StoppingText(tok, ["abc", "\n\n"])
    ids = [i for byte in b"xababd\ny" for i in tok._byte_ids[byte : byte + 1]]
    assert [text.push(i) for i in ids] == ["x", "", "", "ab", "", "abd", "", "\ny"]


def test_flush_gives_what_was_held_and_unfinished_characters(tok):
    pieces, stopped = run(tok, tok.encode("so ab"), ["abc"])
    assert ("".join(pieces), stopped) == ("so ab", False)
    first_byte = tok._byte_ids[0xC3]
    assert run(tok, [first_byte], ["abc"]) == (["", "\ufffd"], False)
    assert run(tok, [first_byte], ["\ufffd"]) == (["", ""], True)
