"""Packed rows: every token once, in order, each document alone; and the loss of each as if alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herdling.data.packing import IGNORE, NO_DOCUMENT, best_fit, cut, fill_row, stack
from herdling.data.sources import Example
from herdling.kernels.cross_entropy import log_probs
from herdling.model import llama
from herdling.model.config import preset
from herdling.model.init import initialize

PAD = 0


def example(tokens: list[int], mask: list[bool] | None = None) -> Example:
    return Example(tokens, mask or [True] * len(tokens), None, "d")


documents = st.lists(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=40), min_size=1, max_size=15)  # fmt: skip


@given(documents, st.integers(1, 32))
def test_every_token_appears_once_in_order(docs: list[list[tuple[int, bool]]], length: int) -> None:
    examples = [example([t for t, _ in doc], [m for _, m in doc]) for doc in docs]
    pieces = [piece for i, e in enumerate(examples) for piece in cut(e, length, index=i) or []]
    rows = best_fit([len(piece.tokens) for piece in pieces], length)
    assert sorted(i for row in rows for i in row) == list(range(len(pieces)))

    tokens_of: dict[int, list[int]] = {}
    labels_of: dict[int, list[int]] = {}
    for row in rows:
        filled = fill_row([pieces[i] for i in row], length, PAD)
        assert all(
            array.shape == (length,) and array.dtype == np.int64 for array in filled.values()
        )
        for number, i in enumerate(row):
            here = filled["documents"] == number
            assert filled["positions"][here].tolist() == list(range(len(pieces[i].tokens)))
            assert np.flatnonzero(np.diff(here.astype(int))).size <= 2  # one stretch
            tokens_of[i] = filled["input_ids"][here].tolist()
            labels_of[i] = filled["labels"][here].tolist()
        padding = filled["documents"] == NO_DOCUMENT
        assert (filled["input_ids"][padding] == PAD).all()
        assert (filled["labels"][padding] == IGNORE).all()
        assert padding.sum() == length - sum(len(pieces[i].tokens) for i in row)

    for n, doc in enumerate(docs):
        mine = [i for i, piece in enumerate(pieces) if piece.index == n]
        assert [t for i in mine for t in tokens_of[i]] == [t for t, _ in doc]
        labels = [t for i in mine for t in labels_of[i]]
        assert labels == [t if m else IGNORE for t, m in doc[1:]] + [IGNORE]


@given(st.lists(st.integers(1, 64), max_size=80))
def test_rows_are_best_fit(lengths: list[int]) -> None:
    rows = best_fit(lengths, 64)
    fills = [sum(lengths[i] for i in row) for row in rows]
    assert all(fill <= 64 for fill in fills)
    # Best fit never opens a row while another has room, so at most one row is half empty or more.
    assert sum(fill <= 32 for fill in fills) <= 1


def test_rows_fill_up_with_documents_of_mixed_length() -> None:
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(5, 400, 600)]
    rows = best_fit(lengths, 512)
    assert sum(lengths) / (512 * len(rows)) > 0.98
    with pytest.raises(ValueError, match=r"item 0 has 513 tokens; rows hold 1..512"):
        best_fit([513], 512)


def test_images_are_not_cut() -> None:
    seen = Example([1] * 10, [True] * 10, torch.zeros(1, 3, 4, 4), "d")
    assert cut(seen, 9) is None
    pieces = cut(seen, 10)
    assert pieces is not None
    assert len(pieces) == 1
    assert pieces[0].has_tiles


def test_tiles_of_a_batch_stand_in_row_order() -> None:
    pieces = [piece for piece in cut(example([1, 2, 3]), 4) or []]
    row = fill_row(pieces, 4, PAD)
    tiles = [torch.full((n, 3, 2, 2), float(n)) for n in (1, 2)]
    batch = stack([row, row], tiles)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 2.0, 2.0]
    assert "pixel_values" not in stack([row], [])


def test_a_packed_document_has_the_loss_it_has_alone() -> None:
    """The real decoder, over chunk borders and temperature steps: 1e-5 in float32."""
    config = preset("nano", vision=False, vocab_size=100)
    model = llama.build(config).eval()
    initialize(model, seed=0)
    with (
        torch.no_grad()
    ):  # initial weights are small; larger ones let every part of the model speak
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            )
    rng = np.random.default_rng(0)
    docs = [example(rng.integers(1, 100, n).tolist()) for n in (70, 33, 20, 5, 1, 50, 77)]
    pieces = [piece for doc in docs for piece in cut(doc, 128) or []]
    rows = best_fit([len(piece.tokens) for piece in pieces], 128)
    batch = stack([fill_row([pieces[i] for i in row], 128, PAD) for row in rows], [])
    assert len(rows) == 2

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return -model(
                batch["input_ids"],
                positions=batch["positions"],
                documents=batch["documents"],
                readout=lambda hidden, head: log_probs(hidden, head, batch["labels"]),
            )

    packed = losses(batch)
    for r, row in enumerate(rows):
        for number, i in enumerate(row):
            alone = losses(stack([fill_row([pieces[i]], len(pieces[i].tokens), PAD)], []))[0]
            together = packed[r][batch["documents"][r] == number]
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    # The comparison can fail: without documents and positions the losses are others.
    flat = losses({**batch, "documents": torch.zeros_like(batch["documents"])})
    assert (flat - packed).abs().max() > 1e-2
