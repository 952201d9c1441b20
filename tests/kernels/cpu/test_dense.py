"""Native products against float64: no further off than torch's own, for every shape, type and variant."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels import cpu
from herdling.kernels.cpu import ops
from herdling.kernels.cpu.threads import threads
from herdling.kernels.grouped_matmul import routed_experts
from herdling.kernels.reference import experts_dense
from herdling.model.llama import rms_norm

DTYPES = [torch.float32, torch.bfloat16]
# (M, N, K): rows of every tile height, K below, at and beyond a vector, odd sizes, N of a part of a tile.
SHAPES = [(1, 1, 1), (1, 40, 64), (2, 33, 47), (3, 8, 130), (5, 100, 31), (7, 17, 96), (16, 70, 257), (33, 24, 32)]  # fmt: skip
ROUTED = [(1, 64, 64, 4, 1), (8, 64, 96, 4, 1), (5, 48, 40, 3, 2), (40, 66, 72, 2, 1), (17, 70, 33, 4, 3)]  # fmt: skip


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def close(got: Tensor, torchs: Tensor, exact: Tensor) -> bool:
    """As near to the exact result as torch is, or within a few roundings of float32."""
    assert got.dtype == torchs.dtype
    assert got.shape == torchs.shape
    return off(got, exact) <= max(1.05 * off(torchs, exact), 5e-7)


@pytest.fixture
def _native(native):
    assert cpu.available()
    with torch.no_grad():
        yield


def routed(N: int, D: int, inner: int, E: int, k: int, dtype: torch.dtype):
    x, gates = random(N, D, dtype=dtype), random(N, k, seed=1).sigmoid().to(dtype)
    gate_up = (random(E, D, 2 * inner, seed=2) * 0.2).to(dtype)
    down = (random(E, inner, D, seed=3) * 0.2).to(dtype)
    chosen = random(N, E, seed=4).topk(k).indices
    return x, chosen, gates, gate_up, down


def exact_experts(x, chosen, gates, gate_up, down):
    scaled = (x[:, None] * gates[..., None]).double()  # rounded as torch rounds it
    gate, up = torch.einsum("nkd,nkdf->nkf", scaled, gate_up[chosen].double()).chunk(2, -1)
    return torch.einsum("nkf,nkfd->nd", F.silu(gate) * up, down[chosen].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_native")
def test_linear(dtype):
    for M, N, K in SHAPES:
        x, w = random(M, K, dtype=dtype), random(N, K, dtype=dtype, seed=1)
        assert close(cpu.linear(x, w), F.linear(x, w), x.double() @ w.double().T), (M, N, K)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_native")
def test_swiglu(dtype):
    for M, inner, D in SHAPES:
        x, gate, up = (random(n, D, dtype=dtype, seed=n) for n in (M, inner, inner + 1))
        up, down = up[:inner], random(D, inner, dtype=dtype, seed=5)
        torchs = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        g, u, d, wide = gate.double(), up.double(), down.double(), x.double()
        exact = (F.silu(wide @ g.T) * (wide @ u.T)) @ d.T
        assert close(cpu.swiglu(x, gate, up, down), torchs, exact), (M, inner, D)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROUTED)
@pytest.mark.usefixtures("_native")
def test_experts(dtype, shape):
    arguments = routed(*shape, dtype=dtype)
    got, torchs = cpu.experts(*arguments), routed_experts(*arguments)
    assert close(got, torchs, exact_experts(*arguments))
    if dtype == torch.float32:
        torch.testing.assert_close(got, experts_dense(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_native")
def test_one_expert_a_token_may_come_without_its_dimension():
    x, chosen, gates, gate_up, down = routed(3, 32, 32, 4, 1, torch.float32)
    flat = cpu.experts(x, chosen[:, 0], gates[:, 0], gate_up, down)
    torch.testing.assert_close(flat, cpu.experts(x, chosen, gates, gate_up, down), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_native")
def test_rms_norm_rounds_where_the_model_does(dtype):
    for D in (1, 7, 64, 130):
        x, gain = random(3, D, dtype=dtype), random(D, dtype=dtype, seed=1)
        want = rms_norm(x, 1e-5)
        tolerance = (
            dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.01, atol=0)
        )
        torch.testing.assert_close(cpu.rms_norm(x, None, 1e-5), want, **tolerance)
        torch.testing.assert_close(cpu.rms_norm(x, gain, 1e-5), want * gain, **tolerance)
        assert (cpu.rms_norm(x, None, 1e-5) != want).float().mean() < 0.05 or dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_native")
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_threads(dtype):
    x, chosen, gates, gate_up, down = routed(9, 96, 160, 2, 1, dtype)
    weight, before = random(200, 96, dtype=dtype, seed=7), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((cpu.linear(x, weight), cpu.experts(x, chosen, gates, gate_up, down)))
    finally:
        torch.set_num_threads(before)
    for i in range(9):
        row = slice(i, i + 1)
        alone = (
            cpu.linear(x[row], weight),
            cpu.experts(x[row], chosen[row], gates[row], gate_up, down),
        )
        for a, b, c in zip(alone, *results, strict=True):
            assert torch.equal(a, b[row])
            assert torch.equal(a, c[row])


@pytest.mark.usefixtures("_native")
def test_leading_dimensions_and_strides_of_x():
    x, w = random(2, 3, 80), random(10, 40, seed=1)
    torch.testing.assert_close(cpu.linear(x[..., ::2], w), F.linear(x[..., ::2], w))
    assert cpu.linear(x[:0, :, :40], w).shape == (0, 3, 10)


@pytest.mark.usefixtures("_native")
def test_what_is_not_supported_is_refused_by_name():
    x, w = random(2, 8), random(4, 8)
    with pytest.raises(InputError, match="float16"):
        cpu.linear(x.half(), w.half())
    with pytest.raises(InputError, match=r"bfloat16.*float32"):
        cpu.linear(x.bfloat16(), w)
    with pytest.raises(InputError, match="contiguous"):
        cpu.linear(x, random(8, 4).T)
    with pytest.raises(InputError, match="7 wide"):
        cpu.linear(x[:, :7], w)
    with pytest.raises(InputError, match="down"):
        cpu.swiglu(x, w, w, w)
    with torch.enable_grad(), pytest.raises(InputError, match="no_grad"):
        cpu.linear(x, w.requires_grad_())
    x, chosen, gates, gate_up, down = routed(3, 32, 32, 4, 1, torch.float32)
    with pytest.raises(InputError, match=r"0\.\.3"):
        cpu.experts(x, chosen + 4, gates, gate_up, down)
    with pytest.raises(InputError, match="int64"):
        cpu.experts(x, chosen.int(), gates, gate_up, down)


@pytest.mark.usefixtures("_native")
def test_custom_ops_agree_with_their_fakes():
    x, chosen, gates, gate_up, down = routed(3, 32, 16, 4, 1, torch.float32)
    gate, w = random(16, 32), random(32, 16)
    for op, arguments in (
        (ops.linear_small, (x, gate)),
        (ops.swiglu_small, (x, gate, gate, w)),
        (ops.experts_small, (x, chosen, gates, gate_up, down)),
        (ops.rms_norm_small, (x, random(32), 1e-5)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("_native")
def test_dynamo_traces_through_without_a_break():
    x, w = random(2, 32), random(8, 32, seed=1)
    traced = torch.compile(lambda x: cpu.linear(x, w) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), F.linear(x, w) + 1)


def test_torch_rests_while_native_kernels_are_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with cpu.alone():
            assert (torch.get_num_threads(), threads()) == (1, 3)
            with cpu.alone():
                assert (torch.get_num_threads(), threads()) == (1, 3)
            assert threads() == 3
        assert (torch.get_num_threads(), threads()) == (3, 3)
        with pytest.raises(KeyError), cpu.alone():
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
