"""Sparse experts against the dense formula, forward and backward, in every type."""

import pytest
import torch

from herdling.kernels.grouped_matmul import Groups, dispatched, grouped_matmul, routed_experts
from herdling.kernels.reference import experts_dense

# Largest difference over the largest value. bf16 keeps 8 bits and the two orders of rounding
# differ (dense sums E terms, most of them zero); fp16 keeps 11.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def operands(tokens: int, experts: int, k: int, dtype: torch.dtype, only: int | None = None):
    g = torch.Generator().manual_seed(tokens * 100 + experts + k)
    D, width = 24, 40
    x = torch.randn(tokens, D, generator=g)
    pool = experts if only is None else only
    chosen = torch.stack([torch.randperm(pool, generator=g)[:k] for _ in range(tokens)])
    scores = torch.rand(tokens, k, generator=g)
    gate_up = torch.randn(experts, D, 2 * width, generator=g) * D**-0.5
    down = torch.randn(experts, width, D, generator=g) * width**-0.5
    leaves = [t.to(dtype).requires_grad_() for t in (x, scores, gate_up, down)]
    return leaves, chosen, torch.randn(tokens, D, generator=g).to(dtype)


def both(leaves, chosen, weight):
    results = []
    for form in (routed_experts, experts_dense):
        x, scores, gate_up, down = leaves
        out = form(x, chosen, scores, gate_up, down)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    return results


def assert_near(got, want, dtype):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 4, 1), (37, 4, 1), (37, 8, 2), (64, 16, 3)]
)
def test_equal_to_the_dense_formula(dtype, tokens, experts, k):
    leaves, chosen, weight = operands(tokens, experts, k, dtype)
    got, want = both(leaves, chosen, weight)
    assert_near(got, want, dtype)


def test_experts_without_tokens_get_zero_gradient():
    leaves, chosen, weight = operands(20, 8, 1, torch.float32, only=3)
    got, want = both(leaves, chosen, weight)
    assert_near(got, want, torch.float32)
    for grad in got[3:]:
        assert not grad[3:].any()
        assert grad[:3].flatten(1).any(1).all()


def test_gradcheck_in_float64():
    leaves, chosen, _ = operands(5, 3, 2, torch.float64)
    x, scores, gate_up, down = leaves
    assert torch.autograd.gradcheck(
        lambda *t: routed_experts(t[0], chosen, t[1], t[2], t[3]), (x, scores, gate_up, down)
    )


def test_frozen_experts_get_no_gradient_but_pass_it_on():
    leaves, chosen, weight = operands(20, 4, 1, torch.float32)
    x, scores, gate_up, down = leaves
    out = routed_experts(x, chosen, scores, gate_up.detach(), down.detach())
    got = torch.autograd.grad((out * weight).sum(), (x, scores))
    _, want = both(leaves, chosen, weight)
    torch.testing.assert_close(got, tuple(want[1:3]))


def test_no_zero_gradient_the_size_of_all_experts_per_expert():
    """Backward may allocate one gradient per parameter, not one per expert (as `w[e]` would)."""
    leaves, chosen, weight = operands(64, 32, 1, torch.float32)
    x, scores, gate_up, down = leaves
    out = routed_experts(x, chosen, scores, gate_up, down)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad((out * weight).sum(), (gate_up, down))
    allocated = sum(
        e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0
    )
    assert allocated < 2 * (gate_up.nbytes + down.nbytes), allocated


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2])
def test_grouped_launch_on_cuda(k):
    """bf16 on CUDA: two grouped products, no wait for the device, equal to the dense formula."""
    g = torch.Generator().manual_seed(0)
    D, width, experts, tokens = 64, 128, 8, 300
    x, scores = torch.randn(tokens, D, generator=g), torch.rand(tokens, k, generator=g)
    chosen = torch.stack([torch.randperm(6, generator=g)[:k] for _ in range(tokens)]).cuda()
    gate_up = torch.randn(experts, D, 2 * width, generator=g) * D**-0.5
    down = torch.randn(experts, width, D, generator=g) * width**-0.5
    leaves = [t.cuda().bfloat16().requires_grad_() for t in (x, scores, gate_up, down)]
    weight = torch.randn(tokens, D, generator=g).cuda().bfloat16()
    got, want = both(leaves, chosen, weight)
    assert_near(got, want, torch.bfloat16)
    assert not got[3][6:].any(), "experts without tokens"
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, scores, gate_up, down = leaves
        out = routed_experts(x, chosen, scores, gate_up, down)
        torch.autograd.grad((out * weight).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class OneByOne:
    """A matrix for each expert, made when asked for; counts how many are asked for."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.made = weight, 0

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def __getitem__(self, expert: int) -> torch.Tensor:
        self.made += 1
        return self.weight[expert].detach().clone()


def test_the_steps_one_by_one_are_the_whole():
    """`dispatched` around two `grouped_matmul`, of tensors and of matrices made when asked for."""
    leaves, chosen, weight = operands(37, 8, 2, torch.float64, only=5)
    x, scores, gate_up, down = leaves
    want = both(leaves, chosen, weight)[0]

    def swiglu(first, second):
        def body(rows: torch.Tensor, groups: Groups) -> torch.Tensor:
            gate, up = grouped_matmul(rows, groups, first).chunk(2, -1)
            return grouped_matmul(torch.nn.functional.silu(gate) * up, groups, second)

        return dispatched(x, chosen, scores, 8, body)

    out = swiglu(gate_up, down)
    got = [out, *torch.autograd.grad((out * weight).sum(), leaves)]
    assert_near(got, want, torch.float64)
    lazy = OneByOne(gate_up), OneByOne(down)
    out = swiglu(*lazy)
    got = [out, *torch.autograd.grad((out * weight).sum(), [x, scores])]
    assert_near(got, want[:3], torch.float64)
    assert [m.made for m in lazy] == [10, 10]  # five experts with rows, forward and backward
