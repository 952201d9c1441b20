"""Packed integer products: exact integers for every shape, and the quantized formula around them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.cpu import packed
from herdling.kernels.cpu.packed import Packed, pack, pack_mxfp4, pack_ternary

FORMATS = ["int8", "int4-g32", "int4-g128", "mxfp4", "ternary"]
ROWS = [1, 2, 3, 4, 5, 7, 16, 33, 70]
MATRICES = [(16, 32), (1, 1), (33, 47), (17, 130), (40, 257), (20, 31), (48, 512), (16, 96)]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)  # fmt: skip
LEAST = {"int8": -128, "int4-g32": -8, "int4-g128": -8, "mxfp4": 0, "ternary": -1}


def group_of(form: str) -> int:
    return {"int4-g32": 32, "int4-g128": 128, "mxfp4": 32}.get(form, 0)


def random_codes(*shape: int, form: str, seed: int = 0) -> Tensor:
    low = LEAST[form]
    high = {"mxfp4": 16, "ternary": 2}.get(form, -low)
    dtype = torch.uint8 if form == "mxfp4" else torch.int8
    return torch.randint(low, high, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_of(codes: Tensor, scales: Tensor, form: str, floats: bool = False) -> Packed:
    """scales (..., N, groups)"""
    if form == "mxfp4":
        return pack_mxfp4(codes, scales, floats)
    if form == "ternary":
        return pack_ternary(codes, scales[..., 0], floats)
    group = group_of(form)
    return pack(codes, scales if group else scales[..., 0], group, floats)


def quantized(*shape: int, form: str, seed: int = 0, floats: bool = False) -> tuple[Packed, Tensor]:
    """A packed matrix (or several) and the same weights in float64."""
    codes, group = random_codes(*shape, form=form, seed=seed), group_of(form)
    groups = -(-shape[-1] // group) if group else 1
    if form == "mxfp4":
        exponents = 118 + random_codes(*shape[:-1], groups, form=form, seed=seed + 1) // 2
        scales, numbers = torch.exp2(exponents.double() - 127), E2M1[codes.long()]
        made = packed_of(codes, exponents, form, floats)
    else:
        scales = (random(*shape[:-1], groups, seed=seed + 1).abs() + 0.1) / -LEAST[form]
        scales = scales.half() if form == "int4-g32" else scales
        made, numbers = packed_of(codes, scales, form, floats), codes.double()
    wide = scales.double().repeat_interleave(group or shape[-1], -1)[..., : shape[-1]]
    return made, numbers * wide


def rounded(x: Tensor) -> Tensor:
    """What int8 activations stand for, float64: scale max|x| / 127, codes to nearest even."""
    most = x.float().abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # `127 / most` would round a reciprocal first
    codes = torch.where(most > 0, x.float() * inverse, 0).round()
    return codes.double() * (most / 127)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (rounded(x) @ gate_up.T).chunk(2, -1)
    return rounded((F.silu(gate) * up).float()) @ down.T


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("floats", [False, True])
def test_unpacked_is_what_was_packed(form, floats):
    for N, K in MATRICES:
        for lead in ((), (3,)):
            codes, group = random_codes(*lead, N, K, form=form, seed=N), group_of(form)
            groups = -(-K // group) if group else 1
            scales = torch.ones(*lead, N, groups, dtype=torch.uint8 if form == "mxfp4" else None)
            made = packed_of(codes, scales, form, floats)
            found = packed.unpack(made)
            assert found.dtype == codes.dtype
            assert torch.equal(found, codes)
            for e in range(made.experts):
                assert torch.equal(packed.unpack(made, e), codes[e])


@pytest.mark.parametrize("form", FORMATS)
def test_integers_are_exact_for_every_shape(native, form):
    group = group_of(form)
    for M in ROWS:
        for N, K in MATRICES:
            codes = random_codes(N, K, form=form, seed=N)
            a = torch.randint(-127, 128, (M, K), dtype=torch.int8)
            a[0] = 127  # the extremes, all at once
            codes[0] = 15 if form == "mxfp4" else LEAST[form]
            groups = -(-K // group) if group else 1
            ones = torch.ones(N, groups, dtype=torch.uint8 if form == "mxfp4" else torch.float32)
            weight = packed_of(codes, ones, form)
            integers = (E2M1[codes.long()] * 2).numpy() if form == "mxfp4" else codes.numpy()
            for many in (0, 1):
                got = torch.zeros(M, groups, N, dtype=torch.int32)
                native.herdling_packed_integers(a.data_ptr(), weight.at, got.data_ptr(), M, many)
                span = group or K
                for g in range(groups):
                    part = slice(g * span, (g + 1) * span)
                    b = integers[:, part].T.astype(np.int64)
                    want = a.numpy()[:, part].astype(np.int64) @ b
                    np.testing.assert_array_equal(got[:, g].numpy(), want, f"{M} {N} {K} {many}")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("native")
def test_floats_are_multiplied_as_they_are(form):
    """Weight-only: the product of x itself, no further off than float32 sums are."""
    for M in (1, 2, 5, 33):
        for N, K in MATRICES:
            weight, wide = quantized(N, K, form=form, seed=K, floats=True)
            x = random(M, K, seed=M)
            got, size = packed.linear(x, weight), (x.abs().double() @ wide.abs().T)
            assert ((got - x.double() @ wide.T).abs() <= 1e-6 * size + 1e-30).all()
            half = packed.linear(x.bfloat16(), weight)
            exact = (x.bfloat16().double() @ wide.T).bfloat16()
            torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("native")
def test_the_least_scale_of_mxfp4_is_a_number():
    codes, scales = torch.full((1, 32), 2, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)
    got = packed.linear(torch.full((1, 32), 2.0**100), pack_mxfp4(codes, scales, floats=True))
    assert got.item() == 32 * 2.0**-27


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("native")
def test_linear_is_the_formula_to_float32(form):
    for M in ROWS:
        for N, K in MATRICES:
            weight, wide = quantized(N, K, form=form, seed=K)
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


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("native")
def test_swiglu_quantizes_its_inner_activation(form):
    for M, D, inner in ((1, 64, 32), (5, 70, 48), (9, 130, 33)):
        gate_up, wide = quantized(2 * inner, D, form=form)
        down, narrow = quantized(D, inner, form=form, seed=5)
        x = random(M, D, seed=3)
        got, want = packed.swiglu(x, gate_up, down), swiglu(x, wide, narrow)
        # A code may fall on the other side of a half, where float32 and float64 differ.
        assert (got - want).norm() / want.norm() < 2e-3


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("native")
def test_experts_quantize_rows_after_the_gate(form):
    for N, D, inner, E, k in ((1, 64, 32, 4, 1), (7, 70, 48, 3, 2), (40, 64, 33, 2, 1)):
        gate_up, wide = quantized(E, 2 * inner, D, form=form)
        down, narrow = quantized(E, D, inner, form=form, seed=5)
        x, gates = random(N, D, seed=3), random(N, k, seed=4).sigmoid()
        chosen = random(N, E, seed=6).topk(k).indices
        want = torch.stack([
            sum(swiglu((x[n] * gates[n, j])[None], wide[e], narrow[e])[0]
                for j, e in enumerate(chosen[n].tolist()))
            for n in range(N)
        ])  # fmt: skip
        got = packed.experts(x, chosen, gates, gate_up, down)
        assert (got - want).norm() / want.norm() < 2e-3


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("native")
def test_rows_do_not_depend_on_each_other_nor_on_threads(form, floats):
    weight, _ = quantized(70, 130, form=form, floats=floats)
    x, before = random(9, 130), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = packed.linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat([packed.linear(row, weight) for row in x.split(1)]))


def test_bits_a_weight():
    weight = pack(random_codes(64, 256, form="int4-g32"), torch.ones(64, 8).half(), 32)
    assert weight.nbytes * 8 / (64 * 256) == 4.5


def test_what_is_not_supported_is_refused_by_name(native):
    codes = random_codes(16, 64, form="int4-g32")
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


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("native")
def test_custom_ops_agree_with_their_fakes_and_the_calls(form, floats):
    gate_up, _ = quantized(96, 64, form=form, floats=floats)
    down, _ = quantized(64, 48, form=form, seed=1, floats=floats)
    routed_up, _ = quantized(3, 96, 64, form=form, floats=floats)
    routed_down, _ = quantized(3, 64, 48, form=form, seed=1, floats=floats)
    x, chosen, gates = (
        random(5, 64),
        torch.tensor([[0], [2], [1], [0], [2]]),
        random(5, 1).sigmoid(),
    )
    made = torch.ops.herdling
    for op, call, before, matrices in (
        (made.packed_linear, packed.linear, (x,), (gate_up,)),
        (made.packed_swiglu, packed.swiglu, (x,), (gate_up, down)),
        (made.packed_experts, packed.experts, (x, chosen, gates), (routed_up, routed_down)),
    ):
        arguments = (*before, *(part for m in matrices for part in m.parts))
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(op(*arguments), call(*before, *matrices))


@pytest.mark.usefixtures("native")
def test_dynamo_traces_through_packed_products_without_a_break():
    gate_up, _ = quantized(96, 64, form="int4-g32")
    down, _ = quantized(64, 48, form="int4-g32", seed=1)

    def block(x: Tensor) -> Tensor:
        return packed.linear(packed.swiglu(x, gate_up, down), gate_up) + 1

    x = random(3, 64)
    traced = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(traced(x), block(x))
