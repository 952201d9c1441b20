"""Moving weights onto large pages: the same numbers, only where the system can."""

import torch

from herdling.kernels.cpu import pages


def test_numbers_stay():
    tensors = [torch.randn(700, 1000) for _ in range(8)]  # 22 MB, each off a large page's edge
    before = [t.clone() for t in tensors]
    moved = pages.collapse(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert moved % pages.PAGE == 0
    assert moved <= sum(t.nbytes for t in tensors)


def test_small_other_and_no_tensors_are_left_alone(monkeypatch):
    assert pages.collapse([torch.randn(10), torch.empty(0), torch.empty(3, device="meta")]) == 0
    monkeypatch.setattr(pages, "_advise", lambda: None)
    assert pages.collapse([torch.randn(4096, 1024)]) == 0
