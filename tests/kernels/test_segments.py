"""Packed rows taken apart, against a mask and the float32 formula."""

import pytest
import torch

from herdling.kernels import segments as module
from herdling.kernels.reference import attention, visible
from herdling.kernels.segments import attend_segments, find_segments


def packed(*rows: list[int], start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """positions and documents of rows that hold documents of these lengths."""
    positions = [torch.cat([torch.arange(start, start + n) for n in row]) for row in rows]
    documents = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    return torch.stack(positions), torch.stack(documents)


ROWS = {
    "one": packed([24]),
    "short and long": packed([1, 20, 3], [7, 7, 10], [22, 1, 1]),
    "later positions": packed([9, 15], [24], start=5),
    "padding": (
        torch.cat([torch.arange(14), torch.arange(10)])[None],
        torch.tensor([[3] * 14 + [-1] * 10]),
    ),
    "beyond what is short": packed([70, 5, 21], [16, 17, 63]),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("chunk", [None, 8, 1000])
@pytest.mark.parametrize(("H", "KV"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_masked_formula_with_gradients(rows, chunk, H, KV, dtype):
    positions, documents = ROWS[rows]
    B, T = positions.shape
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, T, h, 16, generator=g).to(dtype).requires_grad_() for h in (H, KV, KV))  # fmt: skip
    weight = torch.randn(B, T, H, 16, generator=g)
    segments = find_segments(positions, documents, chunk)
    assert segments is not None
    mask = visible(positions, documents, positions, documents, chunk)
    results = []
    for out in (attend_segments(q, k, v, segments), attention(q, k, v, mask)):
        grads = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
        results.append([out, *grads])
    tolerance = 3e-6 if dtype == torch.float32 else 4e-2
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_sequences_of_like_length_share_a_batch():
    segments = find_segments(*packed([1, 20, 3], [7, 7, 10], [22, 1, 1]), None)
    assert segments is not None
    assert segments.batches == [(7, 10), (2, 22)]  # up to 16, and up to 32
    assert sorted(segments.source[segments.place].tolist()) == list(range(72))


@pytest.mark.parametrize(
    ("positions", "documents"),
    [
        ([0, 1, 0, 2], [0, 0, 1, 0]),  # a document goes on behind another
        ([0, 2, 3, 4], [0, 0, 0, 0]),  # a position is left out
        ([1, 0, 2, 3], [0, 0, 0, 0]),  # not in order
        ([0, 0, 1, 2], [0, 0, 0, 0]),  # one twice
        ([0, 1, 0, 1], [-1, -1, -1, -1]),  # padding in two pieces
    ],
)
def test_what_only_a_mask_can_say(positions, documents):
    assert find_segments(torch.tensor([positions]), torch.tensor([documents]), None) is None


def test_the_same_id_in_two_rows_is_two_documents():
    positions, documents = torch.arange(4).expand(2, 4), torch.zeros(2, 4, dtype=torch.int64)
    segments = find_segments(positions, documents, None)
    assert segments is not None
    assert segments.batches == [(2, 4)]


@pytest.mark.parametrize("short", [0, 64])
def test_both_ways_of_attending(monkeypatch, short):
    monkeypatch.setattr(module, "SHORT", short)
    test_equals_the_masked_formula_with_gradients("short and long", 8, 6, 2, torch.float32)
