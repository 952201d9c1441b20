"""Every attention path against the masked float32 formula."""

import pytest
import torch

from herdling.kernels.attention import (
    attend,
    attend_causal,
    attend_chunked,
    attend_last,
    attend_past,
)
from herdling.kernels.reference import attention, visible

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def qkv(B, Tq, Tk, H, KV, dtype):
    g = torch.Generator().manual_seed(Tq * 1000 + Tk)
    make = lambda t, h: torch.randn(B, t, h, 16, generator=g).to(dtype)  # noqa: E731
    return make(Tq, H), make(Tk, KV), make(Tk, KV)


def mask_of(B, Tq, Tk, chunk=None):
    keys = torch.arange(Tk).expand(B, Tk)
    zeros = torch.zeros_like(keys)
    return visible(keys[:, Tk - Tq :], zeros[:, Tk - Tq :], keys, zeros, chunk)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("H", "KV"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (1, 9), (9, 9), (4, 9)])
def test_causal(dtype, H, KV, Tq, Tk):
    q, k, v = qkv(2, Tq, Tk, H, KV, dtype)
    want = attention(q, k, v, mask_of(2, Tq, Tk))
    assert (attend_causal(q, k, v) - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("new", [1, 3, 5, 8, 13, 24])
@pytest.mark.parametrize("cached", [0, 1, 4, 7])
def test_chunked(dtype, new, cached):
    chunk = 8
    q, k, v = qkv(2, new, cached + new, 4, 2, dtype)
    want = attention(q, k, v, mask_of(2, new, cached + new, chunk))
    got = attend_chunked(q, k, v, chunk)
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_masked_with_gradients(dtype):
    q, k, v = (t.requires_grad_() for t in qkv(2, 12, 12, 4, 2, dtype))
    documents = torch.tensor([[0] * 5 + [1] * 7, [-1] * 3 + [0] * 9])
    at = torch.arange(12).expand(2, 12)
    mask = visible(at, documents, at, documents, 4)
    weight = torch.randn(2, 12, 4, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for out in (attend(q, k, v, mask), attention(q, k, v, mask)):
        grads = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
        results.append([out, *grads])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 2 * TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("small", [True, False], ids=["fits", "does not fit"])
def test_chunked_and_causal_gradients(monkeypatch, dtype, small):
    """Both ways of attention in bf16, whatever the size decides."""
    monkeypatch.setattr("herdling.kernels.attention._by_bmm", lambda q, k: small)
    q, k, v = (t.requires_grad_() for t in qkv(2, 21, 21, 4, 2, dtype))
    weight = torch.randn(2, 21, 4, 16, generator=torch.Generator().manual_seed(0))
    for got, chunk in ((attend_chunked(q, k, v, 8), 8), (attend_causal(q, k, v), None)):
        want = attention(q, k, v, mask_of(2, 21, 21, chunk))
        grads = [torch.autograd.grad((o.float() * weight).sum(), (q, k, v)) for o in (got, want)]
        assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() <= 2 * TOLERANCE[dtype] * b.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("H", "KV"), [(4, 4), (4, 2), (6, 1)])
def test_one_query_a_row_over_keys_of_unequal_number(dtype, H, KV):
    q, k, v = qkv(3, 1, 11, H, KV, dtype)
    seen = torch.arange(11)[None] < torch.tensor([[11], [4], [1]])
    want = attention(q, k, v, seen[:, None])
    got = attend_last(q, k, v, seen)
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    plain = attend_last(q, k, v)
    want = attention(q, k, v, torch.ones(3, 1, 11, dtype=torch.bool))
    assert (plain - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("H", "KV"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("new", "past"), [(1, 1), (5, 3), (3, 40), (16, 129)])
def test_new_tokens_behind_a_past(dtype, H, KV, new, past):
    q, k, v = qkv(1, new, past + new, H, KV, dtype)
    want = attention(q, k, v, mask_of(1, new, past + new))
    got = attend_past(q, (k[:, :past], v[:, :past]), k[:, past:], v[:, past:])
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
