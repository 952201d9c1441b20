"""The chunked loss against the plain one: values, gradients, and the memory it is for."""

import pytest
import torch
from torch import nn

from herdling.kernels import cross_entropy, reference


@pytest.fixture(params=[None, 3], ids=["one block", "blocks of 3 rows"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", request.param * 4 * 50)


def operands(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 12, generator=g).to(dtype).requires_grad_()
    head = nn.Linear(12, 50, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(50, 12, generator=g))
    labels = torch.randint(0, 50, (2, 7), generator=g)
    weights = torch.rand(2, 7, generator=g)
    labels[0, 3], weights[0, 3] = -100, 0.0
    return hidden, head, labels, weights


def plain(hidden, head, labels, weights):
    return reference.cross_entropy(
        hidden.flatten(0, 1), head.weight, labels.flatten().clamp(min=0), weights.flatten()
    )


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_weighted_nll(dtype, tolerance):
    hidden, head, labels, weights = operands(dtype)
    results = []
    for form in (cross_entropy.weighted_nll, plain):
        loss = 3 * form(hidden, head, labels, weights)  # an upstream factor must reach the gradient
        results.append((loss, *torch.autograd.grad(loss, (hidden, head.weight))))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.usefixtures("blocks")
def test_log_probs():
    hidden, head, labels, weights = operands()
    got = cross_entropy.log_probs(hidden, head, labels)
    want = head(hidden).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    want = torch.where(labels == -100, 0.0, want)
    torch.testing.assert_close(got, want)
    a = torch.autograd.grad((got * weights).sum(), (hidden, head.weight))
    b = torch.autograd.grad((want * weights).sum(), (hidden, head.weight))
    torch.testing.assert_close(a, b)


def test_nothing_to_score():
    hidden, head, labels, weights = operands()
    loss = cross_entropy.weighted_nll(hidden, head, torch.full_like(labels, -100), weights * 0)
    loss.backward()
    assert loss.item() == 0
    assert not head.weight.grad.any()


def test_huge_logits_stay_finite():
    hidden, head, labels, weights = operands()
    loss = cross_entropy.weighted_nll(hidden * 1e4, head, labels, weights)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_full_logits_of_a_large_vocabulary_never_exist():
    rows, vocabulary = 512, 202048
    hidden = torch.randn(rows, 8).requires_grad_()
    head = nn.Linear(8, vocabulary, bias=False)
    labels = torch.randint(0, vocabulary, (rows,))
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_entropy.weighted_nll(hidden, head, labels, torch.ones(rows)).backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= cross_entropy.BLOCK_BYTES + 2 * head.weight.nbytes
    assert largest < rows * vocabulary * 4 / 2, "all logits at once would be 414 MB"
