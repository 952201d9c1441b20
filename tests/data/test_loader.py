"""Batches: exact resume at any place, shares, fill, and pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from herdling.data import loader as loader_module
from herdling.data.loader import Batch, Loader
from herdling.data.mixture import Mixture
from herdling.data.sources import Example, InMemory, TextSource
from herdling.data.spec import Opening, open_sources
from herdling.errors import ConfigError, DataError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer

TOK = Tokenizer.train(["the quick brown fox jumps over the lazy dog\n"] * 3, 320)
PROCESSOR = ImageProcessor(size=32, patch_size=8)


def make(length: int = 64, batch_size: int = 3, **settings: Any) -> Loader:
    """Two text sources and pictures, in windows so small that every batch is near a border."""
    texts = [f"the lazy dog {i} " * (1 + i * 13 % 17) for i in range(50)]
    others = [f"fox {i}\n" for i in range(200)]
    opening = Opening(TOK, processor=PROCESSOR)
    mixture = Mixture(
        [
            (TextSource("dogs", InMemory(texts), TOK, cache_bytes=2000), 3),
            (TextSource("foxes", InMemory(others), TOK), 1),
            (open_sources("picture/number", opening)[0][0], 1),
        ],
        rank=settings.pop("rank", 0),
        world=settings.pop("world", 1),
    )
    return Loader(mixture, length=length, batch_size=batch_size, pad=TOK.pad, **{"window_rows": 8, **settings})  # fmt: skip


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("prefetch", [False, True])
def test_killed_after_any_batch_it_continues_as_if_not(prefetch: bool) -> None:
    through = make()
    states, batches = [json.dumps(through.state_dict())], []
    for _ in range(24):
        batches.append(next(through))
        states.append(json.dumps(through.state_dict()))
    assert len(set(states)) == 25
    for start, state in enumerate(states[:-3]):
        resumed = make(prefetch=prefetch)
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        for n in range(start, start + 3):
            assert same(next(resumed), batches[n]), f"resumed at {start}, batch {n}"
            assert json.dumps(resumed.state_dict()) == states[n + 1]
        resumed.close()


def test_a_loader_that_has_run_can_be_set_back() -> None:
    loader = make(prefetch=True)
    first = [next(loader) for _ in range(5)]
    state = loader.state_dict()
    second = [next(loader) for _ in range(5)]
    for _ in range(2):
        loader.load_state_dict(state)
        assert all(same(next(loader), batch) for batch in second)
    fresh = make()
    assert all(same(next(fresh), batch) for batch in [*first, *second])
    loader.close()


def test_resuming_reads_one_window_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    long = make(window_rows=16)
    for _ in range(60):
        next(long)
    state, reads = long.state_dict(), 0
    resumed = make(window_rows=16)
    inner = resumed._mixture.next

    def counted() -> tuple[int, int, Example]:
        nonlocal reads
        reads += 1
        return inner()

    monkeypatch.setattr(resumed._mixture, "next", counted)
    resumed.load_state_dict(state)
    taken = sum(state["window"]["taken"])
    assert 0 < reads < taken / 3


def test_processes_hand_out_different_rows() -> None:
    rows = []
    for rank in range(2):
        loader = make(rank=rank, world=2)
        rows.append({tuple(row) for _ in range(8) for row in next(loader)["input_ids"].tolist()})
    assert not rows[0] & rows[1]


def test_rows_are_full_and_shares_kept() -> None:
    # No English here: parsing the whole library costs seconds.
    sources = open_sources("code:2,multilingual:1", Opening(TOK, length=256))
    loader = Loader(Mixture(sources), length=256, batch_size=64, pad=TOK.pad, prefetch=True)
    while loader.state_dict()["counts"]["tokens"] < 1_000_000:
        batch = next(loader)
    numbers = loader.numbers()
    assert numbers["fill"] >= 0.97
    assert numbers["share/code"] == pytest.approx(2 / 3, abs=0.01)
    assert numbers["skipped"] == 0
    assert numbers["tokens"] <= loader.state_dict()["counts"]["rows"] * 256
    assert batch["input_ids"].shape == (64, 256)
    loader.close()


def test_each_patch_token_has_its_tile() -> None:
    loader = make()
    seen = 0
    for _ in range(20):
        batch = next(loader)
        patches = int((batch["input_ids"] == TOK.patch).sum())
        tiles = len(batch["pixel_values"]) if "pixel_values" in batch else 0
        assert patches == tiles * PROCESSOR.tokens_per_tile
        seen += tiles
        assert not (batch["labels"] == TOK.patch).any()
    assert seen > 10


def test_tiles_beyond_the_budget_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make()
    want = [next(plain) for _ in range(10)]
    monkeypatch.setattr(loader_module, "TILE_BYTES", 2 * 3 * 32 * 32 * 4)
    frugal = make()
    assert all(same(next(frugal), batch) for batch in want)
    assert sum(p.tiles is not None for row in frugal._rows for p in row) <= 2


def test_examples_too_long_for_a_row_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Pictures:
        name, size = "pictures", None

        def example(self, index: int) -> Example:
            n = 10 + index % 2
            return Example([5] * n, [True] * n, torch.zeros(1, 3, 2, 2), "pictures")

    loader = Loader(Mixture([(Pictures(), 1)]), length=10, batch_size=2, pad=0, window_rows=4)
    states = [loader.state_dict()]
    for _ in range(6):
        next(loader)
        states.append(loader.state_dict())
    assert loader.numbers()["skipped"] == 11  # three windows, in which every other one is too long
    assert len(caplog.records) == 1
    assert "pictures: an example with images has 11 tokens; rows hold 10" in caplog.text
    for start, state in enumerate(states[:-1]):
        again = Loader(Mixture([(Pictures(), 1)]), length=10, batch_size=2, pad=0, window_rows=4)
        again.load_state_dict(state)
        next(again)
        assert again.state_dict() == states[start + 1]
    with pytest.raises(DataError, match="as have 1000 in a row; rows hold 9; remedy"):
        next(Loader(Mixture([(Pictures(), 1)]), length=9, batch_size=2, pad=0))


def test_pieces_of_which_nothing_is_learnt_are_no_rows() -> None:
    class Long:
        """A question of three rows and more, and an answer of two tokens."""

        name, size = "long", None

        def example(self, index: int) -> Example:
            return Example([*range(35)], [i >= 33 for i in range(35)], None, "long")

    class Mute(Long):
        def example(self, index: int) -> Example:
            return Example([*range(35)], [False] * 35, None, "mute")

    loader = Loader(Mixture([(Long(), 1)]), length=10, batch_size=1, pad=0, window_rows=4)
    for _ in range(10):
        row = next(loader)
        learnt = row["labels"] != -100
        assert row["labels"][learnt].tolist() in ([33, 34], [33, 34] * 2)
    assert loader.numbers()["skipped"] == 0
    with pytest.raises(DataError, match="mute: an example has no token to be learnt, as have 1000"):
        next(Loader(Mixture([(Mute(), 1)]), length=10, batch_size=1, pad=0, window_rows=4))


def test_data_that_changed_or_settings_that_differ_are_errors(tmp_path: Path) -> None:
    def open_file() -> Loader:
        path = str(tmp_path / "a.txt")
        sources = open_sources(path, Opening(TOK, split="all"))
        return Loader(Mixture(sources), length=16, batch_size=1, pad=TOK.pad, seed=3)

    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 9)
    loader = open_file()
    next(loader)
    state = loader.state_dict()
    open_file().load_state_dict(state)
    for key, value in (("length", 8), ("seed", 4)):
        with pytest.raises(DataError, match=f"saved with data {key} {value}, this one has"):
            open_file().load_state_dict({**state, key: value})
    (tmp_path / "a.txt").write_text("the quick brown dog\n" * 9)
    with pytest.raises(DataError, match="the data reads differently from when the run was saved"):
        open_file().load_state_dict(state)


def test_an_error_in_the_thread_reaches_the_loop() -> None:
    class Broken:
        name, size = "broken", None

        def example(self, index: int) -> Example:
            if index == 20:
                raise DataError("b.jsonl:21: broken")
            return Example([1] * 8, [True] * 8, None, "broken")

    loader = Loader(
        Mixture([(Broken(), 1)]), length=8, batch_size=1, pad=0, window_rows=4, prefetch=True
    )
    for _ in range(20):
        next(loader)
    with pytest.raises(DataError, match=r"b.jsonl:21: broken"):
        next(loader)
    loader.close()
    with pytest.raises(ConfigError, match="batch_size is 0; it must be at least 1"):
        Loader(Mixture([(Broken(), 1)]), length=8, batch_size=0, pad=0)
