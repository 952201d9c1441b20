"""Pages: counted exactly, shared by content, forgotten oldest first; tracks of both kinds."""

import pytest
import torch

from herdling.errors import ConfigError
from herdling.infer.pages import Layers, Pages, Store, Track
from herdling.model.config import preset


def test_pages_are_given_once_and_come_back():
    pages = Pages(5)
    taken = [pages.take() for _ in range(5)]
    assert sorted(taken) == [1, 2, 3, 4, 5]  # 0 is the page of zeros
    assert pages.available == 0
    pages.hold(taken[0])
    pages.release(taken)
    assert pages.available == 4
    pages.release(taken[:1])
    assert pages.available == 5


def test_the_two_kinds_keep_apart():
    """Local pages that come and go leave the others in a row."""
    pages = Pages(20)
    whole = []
    for _ in range(8):
        local = [pages.take(local=True) for _ in range(3)]
        whole.append(pages.take())
        pages.release(local, local=True)
        assert set(local) == {18, 19, 20}
    assert whole == list(range(1, 9))


def test_known_content_stays_until_the_room_is_needed():
    pages = Pages(3)
    first, second, third = (pages.take() for _ in range(3))
    pages.name(first, b"a")
    pages.name(second, b"b")
    pages.name(third, b"a")  # another page holds that already
    pages.release([second])
    pages.release([first, third])
    assert (pages.available, pages.cached) == (3, 2)
    assert pages.find(b"b") == second
    pages.hold(second)
    pages.release([second])  # used again, so `first` is the oldest now
    assert pages.take() == third
    assert pages.take() == first
    assert pages.find(b"a") is None
    assert pages.find(b"b") == second
    pages.forget()
    assert pages.find(b"b") is None
    assert (pages.available, pages.cached) == (1, 0)


def test_a_held_page_is_known_and_is_not_taken():
    pages = Pages(2)
    page = pages.take()
    pages.name(page, b"x")
    pages.hold(page)
    pages.release([page])
    assert pages.cached == 0
    pages.take()
    assert pages.available == 0
    assert pages.find(b"x") == page


def test_a_track_of_local_pages_forgets_from_the_front():
    track = Track(4, 3)  # 4 positions a page, a page is 12 slots
    assert track.missing(9) == 3
    for page in (5, 2, 7):
        track.add(page)
    assert track.missing(12) == 0
    assert track.missing(13) == 1
    assert track.slots(3, 9).tolist() == [63, 24, 25, 26, 27, 84]
    assert track.drop_before(7) == [5]
    assert track.drop_before(7) == []
    assert track.slots(4, 9).tolist() == [24, 25, 26, 27, 84]
    assert track.end == 12
    for page in range(30, 60):
        track.add(page)
    assert track.slots(4, 6).tolist() == [24, 25]
    assert track.slots(131, 132).tolist() == [59 * 12 + 3]
    assert track.clear()[-2:] == [7, 2]
    assert (track.first, track.end) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "units", "share", "local", "whole"),
    [
        ({}, 1, 3, 16, 48),  # 3 local layers and a global one
        (dict(num_hidden_layers=8, no_rope_layers=(1,) * 6 + (0,) * 2), 2, 3, 16, 48),
        (dict(num_hidden_layers=5, no_rope_layers=(1, 0, 1, 1, 1)), 1, 4, 16, 64),
        (dict(num_hidden_layers=3, no_rope_layers=(0, 0, 1)), 2, 1, 16, 16),
        (dict(no_rope_layers=(1,) * 4), 4, 1, 16, 16),
        (dict(no_rope_layers=(0,) * 4), 4, 1, 16, 16),
        (dict(attention_chunk_size=24), 1, 3, 8, 24),
        (dict(attention_chunk_size=None), 4, 1, 16, 16),
    ],
)
def test_layers_share_pages_without_overlap(fields, units, share, local, whole):
    config = preset("nano", **fields).text
    layers = Layers(config)
    assert (layers.units, layers.share) == (units, share)
    assert (layers.local_tokens, layers.global_tokens) == (local, whole)
    assert len(set(layers.places)) == config.num_hidden_layers
    assert all(unit < units and part < share for _, unit, part in layers.places)
    store = Store(config, 10 * layers.page_bytes(torch.float32), torch.float32, torch.device("cpu"))
    assert store.pages == 9
    held = sum(t.nbytes for t in [*store._keys, *store._values])
    assert held == 10 * store.page_bytes  # the budget, to the byte


def test_a_budget_without_room_is_refused():
    config = preset("nano").text
    with pytest.raises(ConfigError, match="memory is 100 bytes; the cache needs at least 36864"):
        Store(config, 100, torch.float32, torch.device("cpu"))
