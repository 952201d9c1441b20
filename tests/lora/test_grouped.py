"""The low-rank paths of the experts against weights that were summed up beforehand.

python -m pytest tests/lora/test_grouped.py
"""

import pytest
import torch

from herdling.kernels.reference import experts_dense
from herdling.lora.grouped import adapted_experts
from herdling.lora.layers import Factors

N, E, D, F, R = 13, 5, 6, 7, 3


def toys(dtype=torch.float64, k=2):
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=dtype) * 0.5  # noqa: E731
    x, gate_up, down = make(N, D), make(E, D, 2 * F), make(E, F, D)
    chosen = torch.stack([torch.randperm(E - 1)[:k] for _ in range(N)])  # expert 4 gets no token
    scores = torch.rand(N, k, dtype=dtype)
    return x, chosen, scores, gate_up, down


def factors(seed: int, dtype=torch.float64) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator) * 0.5  # noqa: E731
    return {
        "gate_up_proj": Factors(make(E, D, R), make(E, R, 2 * F), alpha=5.0),
        "down_proj": Factors(make(E, F, R), make(E, R, D), alpha=5.0),
    }


def summed(weight, own: Factors):
    return weight + 5.0 / R * torch.einsum("eir,ero->eio", own.A, own.B)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("only", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])
def test_equal_to_the_dense_formula_forward_and_backward(k, only):
    x, chosen, scores, gate_up, down = toys(k=k)
    own = {name: f for name, f in factors(1).items() if name in only}
    leaves = [x.requires_grad_(), scores.requires_grad_()]
    leaves += [t for f in own.values() for t in (f.A, f.B)]
    ours = adapted_experts(x, chosen, scores, gate_up, down, [(own, None)])
    weights = [summed(w, own[n]) if n in own else w for n, w in (("gate_up_proj", gate_up), ("down_proj", down))]  # fmt: skip
    theirs = experts_dense(x, chosen, scores, *weights)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    seed = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, seed),
        torch.autograd.grad(theirs, leaves, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_gradients_by_finite_differences():
    x, chosen, scores, gate_up, down = toys()
    own = factors(1)
    leaves = [x.requires_grad_(), *(t for f in own.values() for t in (f.A, f.B))]

    def call(*_):
        return adapted_experts(x, chosen, scores, gate_up, down, [(own, None)])

    assert torch.autograd.gradcheck(call, leaves)


def test_each_token_has_its_own_adapter_or_none():
    x, chosen, scores, gate_up, down = toys()
    a, b = factors(1), factors(2)
    rows = {"a": torch.tensor([0, 3, 4, 12]), "b": torch.tensor([1, 2])}
    mixed = adapted_experts(x, chosen, scores, gate_up, down, [(a, rows["a"]), (b, rows["b"])])
    plain = experts_dense(x, chosen, scores, gate_up, down)
    for own, index in ((a, rows["a"]), (b, rows["b"])):
        weights = summed(gate_up, own["gate_up_proj"]), summed(down, own["down_proj"])
        alone = experts_dense(x, chosen, scores, *weights)
        torch.testing.assert_close(mixed[index], alone[index], atol=1e-12, rtol=0)
        assert (alone - plain)[index].abs().max() > 0.1
    others = torch.tensor([i for i in range(N) if i not in (0, 1, 2, 3, 4, 12)])
    torch.testing.assert_close(mixed[others], plain[others], atol=1e-12, rtol=0)
    nobody = adapted_experts(x, chosen, scores, gate_up, down, [(a, torch.tensor([], dtype=torch.long))])  # fmt: skip
    torch.testing.assert_close(nobody, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("few", [0, 10**6])
def test_few_rows_without_gradients_take_another_way_to_the_same_result(monkeypatch, few):
    monkeypatch.setattr("herdling.lora.grouped.FEW_ROWS", few)
    x, chosen, scores, gate_up, down = toys()
    a, b = factors(1), factors(2)
    parts = [(a, torch.tensor([0, 3, 4, 12])), (b, torch.tensor([1, 2]))]
    with_gradients = adapted_experts(x, chosen, scores, gate_up, down, parts).detach()
    with torch.no_grad():
        without = adapted_experts(x, chosen, scores, gate_up, down, parts)
    torch.testing.assert_close(without, with_gradients, atol=1e-12, rtol=0)


def test_a_frozen_weight_and_an_expert_without_rows_cost_no_gradient():
    x, chosen, scores, gate_up, down = toys()
    own = factors(1)
    adapted_experts(x, chosen, scores, gate_up, down, [(own, None)]).sum().backward()
    assert gate_up.grad is None
    for f in own.values():
        for grad in (f.A.grad, f.B.grad):
            assert grad is not None
            assert (grad[4] == 0).all()
            assert (grad[:4] != 0).all()


def test_under_autocast_products_are_in_bf16_and_gradients_in_the_factors_type():
    x, chosen, scores, gate_up, down = toys(torch.float32)
    own = factors(1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = adapted_experts(x, chosen, scores, gate_up, down, [(own, None)])
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    weights = summed(gate_up, own["gate_up_proj"]), summed(down, own["down_proj"])
    exact = experts_dense(x, chosen, scores, *weights)
    assert (out - exact).abs().max() < 0.02 * exact.abs().max()
    assert own["down_proj"].A.grad.dtype == torch.float32
