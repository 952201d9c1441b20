"""Packed integer products: exact integers for every shape, and the quantized formula around them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.cpu import packed
from herdling.kernels.cpu.packed import pack

FORMATS = [0, 32, 128]  # int8, int4 in groups
ROWS = [1, 2, 3, 4, 5, 7, 16, 33]
MATRICES = [(16, 32), (1, 1), (33, 47), (17, 130), (40, 257), (20, 31), (48, 512), (16, 96)]


def random_codes(*shape: int, group: int, seed: int = 0) -> Tensor:
    low, high = (-8, 8) if group else (-128, 128)
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(*shape: int, group: int, seed: int = 0) -> tuple[packed.Packed, Tensor]:
    """A packed matrix (or several) and the same weights in float64."""
    codes = random_codes(*shape, group=group, seed=seed)
    groups = -(-shape[-1] // group) if group else 1
    scales = (random(*shape[:-1], groups, seed=seed + 1).abs() + 0.1) / (8 if group else 128)
    scales = scales.half() if group == 32 else scales
    wide = scales.double().repeat_interleave(group or shape[-1], -1)[..., : shape[-1]]
    return pack(codes, scales if group else scales[..., 0], group), codes.double() * wide


def rounded(x: Tensor) -> Tensor:
    """What int8 activations stand for, float64: scale max|x| / 127, codes to nearest even."""
    most = x.float().abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # `127 / most` would round a reciprocal first
    codes = torch.where(most > 0, x.float() * inverse, 0).round()
    return codes.double() * (most / 127)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (rounded(x) @ gate_up.T).chunk(2, -1)
    return rounded((F.silu(gate) * up).float()) @ down.T


@pytest.mark.parametrize("group", FORMATS)
def test_integers_are_exact_for_every_shape(native, group):
    for M in ROWS:
        for N, K in MATRICES:
            codes = random_codes(N, K, group=group, seed=N)
            a = torch.randint(-127, 128, (M, K), dtype=torch.int8)
            a[0] = 127  # the extremes, all at once
            codes[0] = -8 if group else -128
            groups = -(-K // group) if group else 1
            weight = pack(codes, torch.ones(N, groups) if group else torch.ones(N), group)
            got = torch.zeros(M, groups, N, dtype=torch.int32)
            native.herdling_packed_integers(a.data_ptr(), *weight.arguments, got.data_ptr(), M)
            span = group or K
            for g in range(groups):
                part = slice(g * span, (g + 1) * span)
                want = a.numpy()[:, part].astype(np.int64) @ codes.numpy()[:, part].T.astype(
                    np.int64
                )
                np.testing.assert_array_equal(got[:, g].numpy(), want, err_msg=f"{M} {N} {K}")


@pytest.mark.parametrize("group", FORMATS)
@pytest.mark.usefixtures("native")
def test_linear_is_the_formula_to_float32(group):
    for M in ROWS:
        for N, K in MATRICES:
            weight, wide = quantized(N, K, group=group, seed=K)
            x = random(M, K, seed=M)
            x[-1] = 0  # no scale at all
            exact = rounded(x) @ wide.T
            got = packed.linear(x, weight)
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6 * K**0.5)
            assert not got[-1].any()
            half = packed.linear(x.bfloat16(), weight)
            exact = (rounded(x.bfloat16()) @ wide.T).bfloat16()
            torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("native")
def test_a_linear_layer_keeps_its_meaning():
    """Real weights rounded to 8 and 4 bits by the usual formulas come near the float product."""
    w, x = random(64, 256), random(5, 256, seed=1)
    scale = w.abs().amax(-1) / 127
    got = packed.linear(x, pack((w / scale[:, None]).round().to(torch.int8), scale))
    assert (got - x @ w.T).norm() / (x @ w.T).norm() < 0.015
    groups = w.view(64, 8, 32)
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale[..., None]).round().to(torch.int8).view(64, 256)
    got = packed.linear(x, pack(codes, scale, 32))
    assert (got - x @ w.T).norm() / (x @ w.T).norm() < 0.12


@pytest.mark.parametrize("group", FORMATS)
@pytest.mark.usefixtures("native")
def test_swiglu_quantizes_its_inner_activation(group):
    for M, D, inner in ((1, 64, 32), (5, 70, 48), (9, 130, 33)):
        gate_up, wide = quantized(2 * inner, D, group=group)
        down, narrow = quantized(D, inner, group=group, seed=5)
        x = random(M, D, seed=3)
        got, want = packed.swiglu(x, gate_up, down), swiglu(x, wide, narrow)
        # A code may fall on the other side of a half, where float32 and float64 differ.
        assert (got - want).norm() / want.norm() < 2e-3


@pytest.mark.parametrize("group", FORMATS)
@pytest.mark.usefixtures("native")
def test_experts_quantize_rows_after_the_gate(group):
    for N, D, inner, E, k in ((1, 64, 32, 4, 1), (7, 70, 48, 3, 2), (40, 64, 33, 2, 1)):
        gate_up, wide = quantized(E, 2 * inner, D, group=group)
        down, narrow = quantized(E, D, inner, group=group, seed=5)
        x, gates = random(N, D, seed=3), random(N, k, seed=4).sigmoid()
        chosen = random(N, E, seed=6).topk(k).indices
        want = torch.stack([
            sum(swiglu((x[n] * gates[n, j])[None], wide[e], narrow[e])[0]
                for j, e in enumerate(chosen[n].tolist()))
            for n in range(N)
        ])  # fmt: skip
        got = packed.experts(x, chosen, gates, gate_up, down)
        assert (got - want).norm() / want.norm() < 2e-3


@pytest.mark.usefixtures("native")
def test_rows_do_not_depend_on_each_other_nor_on_threads():
    weight, _ = quantized(70, 130, group=32)
    x, before = random(9, 130), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = packed.linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat([packed.linear(row, weight) for row in x.split(1)]))


def test_bits_a_weight():
    weight = pack(random_codes(64, 256, group=32), torch.ones(64, 8).half(), 32)
    assert weight.nbytes * 8 / (64 * 256) == 4.5


def test_what_is_not_supported_is_refused_by_name(native):
    codes = random_codes(16, 64, group=32)
    with pytest.raises(InputError, match="multiple of 32"):
        pack(codes, torch.ones(16, 4), 16)
    with pytest.raises(InputError, match="int8"):
        pack(codes.int(), torch.ones(16))
    with pytest.raises(InputError, match=r"\(16, 2\)"):
        pack(codes, torch.ones(16), 32)
    with pytest.raises(InputError, match="outside"):
        pack(codes + 8, torch.ones(16, 2), 32)
    weight = pack(codes, torch.ones(16, 2), 32)
    with pytest.raises(InputError, match="63 wide"):
        packed.linear(torch.ones(1, 63), weight)
    with pytest.raises(InputError, match="experts"):
        packed.experts(torch.ones(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), weight, weight)  # fmt: skip
    with pytest.raises(InputError, match="belong"):
        packed.swiglu(torch.ones(1, 64), weight, weight)
