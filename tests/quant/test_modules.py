"""Quantized layers against the same layers with dequantized weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from herdling.kernels import cpu
from herdling.kernels.reference import experts_dense
from herdling.quant import modules
from herdling.quant.formats import FORMATS, format_of, quantize, round_trip
from herdling.quant.modules import MOST_ROWS, Matrix, QuantExperts, QuantLinear, rounded
from herdling.quant.schemes import scheme

INT8 = scheme("w8a8").activations
E, D, WIDTH = 4, 96, 64  # 96 inputs: shorter last groups of 64 and 128


def linear(name: str, activations=None, bias=True) -> tuple[nn.Linear, QuantLinear]:
    plain = nn.Linear(D, 40, bias=bias)
    plain.weight.data.normal_()
    matrix = Matrix.of(plain.weight, FORMATS[name])
    return plain, QuantLinear(matrix, plain.bias, activations)


def experts(name: str, activations=None) -> tuple[torch.Tensor, torch.Tensor, QuantExperts]:
    gate_up, down = torch.randn(E, D, 2 * WIDTH), torch.randn(E, WIDTH, D)
    gate_up *= 0.2 * torch.arange(1, E + 1)[:, None, None]
    down *= 0.2
    form = FORMATS[name]
    return gate_up, down, QuantExperts(Matrix.of(gate_up, form), Matrix.of(down, form), activations)


@pytest.mark.parametrize("name", FORMATS)
def test_linear_is_the_product_with_dequantized_weights(name):
    plain, quant = linear(name)
    wanted = quantize(plain.weight, name).dequantize()
    assert torch.equal(quant.weight, wanted)
    x = torch.randn(2, 5, D, requires_grad=True)
    out = quant(x)
    torch.testing.assert_close(out, F.linear(x, wanted, plain.bias))
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, quant.bias], grad)
    assert torch.allclose(got[0], grad @ wanted, atol=1e-5)
    assert torch.allclose(got[1], grad.sum((0, 1)), atol=1e-5)
    assert [p.shape for p in quant.parameters()] == [quant.bias.shape]


@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_those_with_dequantized_weights(name):
    gate_up, down, quant = experts(name)
    plain = [quantize(w, name, dim=1).dequantize() for w in (gate_up, down)]
    if name == "ternary":  # a mean, summed in another order
        plain = [
            torch.stack([w[e] for e in range(E)]) for w in (quant.gate_up_proj, quant.down_proj)
        ]
    for wanted, matrix in zip(plain, (quant.gate_up_proj, quant.down_proj), strict=True):
        assert matrix.shape == wanted.shape
        for e in range(E):
            assert torch.equal(matrix[e], wanted[e])
    x = torch.randn(9, D, requires_grad=True)
    chosen, gates = torch.randint(E, (9, 1)), torch.rand(9, 1, requires_grad=True)
    out = quant(x, chosen, gates)
    same = experts_dense(x, chosen, gates, *plain)
    torch.testing.assert_close(out, same, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, [x, gates], grad),
                         torch.autograd.grad(same, [x, gates], grad), strict=True):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_only_chosen_experts_become_numbers(monkeypatch):
    _, _, quant = experts("int4_g32")
    asked = []
    dense = Matrix.dense
    monkeypatch.setattr(Matrix, "dense", lambda self, dtype=None, expert=None: asked.append(expert) or dense(self, dtype, expert))  # fmt: skip
    x = torch.randn(7, D, requires_grad=True)
    quant(x, torch.tensor([[2], [0]]).repeat(4, 1)[:7], torch.ones(7, 1)).sum().backward()
    assert set(asked) == {0, 2}
    assert len(asked) == 8  # two matrices, forward and backward


def test_bf16_weights_are_rounded_to_bf16_as_a_file_would_have_them():
    weight = torch.randn(8, 64, dtype=torch.bfloat16)
    matrix = Matrix.of(weight, FORMATS["int8"])
    assert matrix.dense().dtype == torch.bfloat16
    assert torch.equal(matrix.dense(torch.float32), matrix.dense().float())


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "fp8"])
def test_activations_have_one_scale_a_token(name):
    found = scheme(name)
    plain, quant = linear(found.weights.name, found.activations, bias=False)
    x = torch.randn(6, D) * torch.logspace(-3, 3, 6)[:, None]
    wanted = round_trip(x, found.activations) @ quantize(plain.weight, found.weights).dequantize().T
    x.requires_grad_()
    out = quant(x)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    out.sum().backward()  # straight through the rounding
    torch.testing.assert_close(x.grad, quant.weight.sum(0).expand(6, D))


def test_straight_through_keeps_the_rounded_value_in_bf16():
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(rounded(x.clone().requires_grad_(), INT8), rounded(x, INT8))


@pytest.mark.skipif(not cpu.available(), reason="no native kernels on this machine")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "int8", "int4", "int4_g128", "mxfp4", "ternary"])
def test_the_native_kernels_say_the_same(name, kind):
    found = scheme(name)
    quant = linear(found.weights.name, found.activations)[1]
    routed = experts(found.weights.name, found.activations)[2]
    x, chosen, gates = torch.randn(9, D).to(kind), torch.randint(E, (9, 1)), torch.rand(9, 1)
    with torch.no_grad():
        assert quant.packed(x) is not None
        assert routed.packed(x) is not None
        fast = quant(x), routed(x, chosen, gates.to(kind))
    assert quant.packed(x) is None, "kernels have no gradient"
    slow = quant(x), routed(x, chosen, gates.to(kind))
    for got, want in zip(fast, slow, strict=True):
        # The kernels round less often: activations once, in bf16 no dequantized number at all.
        assert (got - want).norm() < (1e-5 if kind == torch.float32 else 2e-2) * want.norm()


def test_what_the_kernels_do_not_take():
    x = torch.randn(3, D)
    with torch.no_grad():
        for name, acts in (
            ("int3_g32", INT8),
            ("mxint8", INT8),
            ("nf4", None),
            ("mxfp8_e4m3", None),
        ):
            assert linear(name, acts)[1].packed(x) is None
        assert linear("int8", format_of("fp8_e4m3"))[1].packed(x) is None
        assert linear("int8", INT8)[1].packed(torch.randn(MOST_ROWS + 1, D)) is None
        assert linear("int8", INT8)[1].packed(x.half()) is None


def test_a_scale_for_the_whole_becomes_one_an_expert():
    form = format_of("fp8_e4m3", per="tensor")
    weight = torch.randn(E, D, 32) * torch.tensor([1.0, 10.0, 100.0, 1e3])[:, None, None]
    matrix = Matrix.of(weight, form)
    assert matrix.scales.shape == (E, 1, 1)
    assert torch.equal(matrix[3], quantize(weight[3].T, form).dequantize().T)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_in_parts_is_rounding_at_once(name, monkeypatch):
    weight = torch.randn(E, D, 40)
    whole = Matrix.of(weight, FORMATS[name])
    monkeypatch.setattr(modules, "SLAB", 7 * D)
    parts = Matrix.of(weight, FORMATS[name])
    assert torch.equal(parts.stored(), whole.stored())
    assert torch.equal(parts.scales.float(), whole.scales.float())


@pytest.mark.skipif(not cpu.available(), reason="no native kernels on this machine")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_call_the_native_kernels(backend):
    """One graph, no break, with the kernels' own result; packed by a first call without it."""
    quant, routed = linear("int4_g32", INT8)[1], experts("int4_g32", INT8)[2]
    x, chosen, gates = torch.randn(9, D), torch.randint(E, (9, 1)), torch.rand(9, 1)
    with torch.no_grad():
        plain = quant(x), routed(x, chosen, gates)
        for layer, arguments, want in (
            (quant, (x,), plain[0]),
            (routed, (x, chosen, gates), plain[1]),
        ):
            traced = torch.compile(layer, backend=backend, fullgraph=True)
            assert torch.equal(traced(*arguments), want)


@pytest.mark.skipif(not cpu.available(), reason="no native kernels on this machine")
@pytest.mark.parametrize("name", ["int8", "int4_g32", "mxfp4_e2m1", "ternary"])
@pytest.mark.parametrize("activations", [INT8, None], ids=["int8", "plain"])
def test_the_kernels_layout_takes_the_place_of_the_codes(name, activations):
    quant, routed = linear(name, activations)[1], experts(name, activations)[2]
    matrices = quant.matrix, routed.gate_up_proj, routed.down_proj
    before = [(m.stored().clone(), m.dense().clone(), m[1].clone() if m.experts else None)
              for m in matrices]  # fmt: skip
    sizes = [m.nbytes for m in matrices]
    saved = {n: t.clone() for n, t in routed.state_dict().items()}
    x, chosen, gates = torch.randn(9, D), torch.randint(E, (9, 1)), torch.rand(9, 1)
    with torch.no_grad():
        wanted = quant(x), routed(x, chosen, gates)
    assert [m.codes.numel() for m in matrices] == [0, 0, 0]
    assert [m.nbytes for m in matrices] == sizes
    for matrix, (codes, dense, one) in zip(matrices, before, strict=True):
        assert torch.equal(matrix.stored(), codes)
        assert torch.equal(matrix.dense(), dense)
        if one is not None:
            assert torch.equal(matrix[1], one)
            assert torch.equal(matrix.stored(1), codes[1])
    twin = copy.deepcopy(routed)
    assert all(torch.equal(t, saved[n]) for n, t in twin.state_dict().items())
    with torch.no_grad():
        assert torch.equal(routed(x, chosen, gates), wanted[1])  # packs again
        twin.load_state_dict(routed.state_dict())
        assert torch.equal(twin.to("cpu")(x, chosen, gates), wanted[1])
        assert torch.equal(quant(x), wanted[0])
        # Other activations need no other layout.
        other = QuantLinear(quant.matrix, quant.bias, None if activations else INT8)
        fresh = QuantLinear(copy.deepcopy(quant.matrix), quant.bias, other.activations)
        assert torch.equal(other(x), fresh(x))


def test_codes_put_into_a_packed_matrix_are_the_ones_used():
    one, other = torch.randn(40, D), torch.randn(40, D)
    quant = QuantLinear(Matrix.of(one, FORMATS["int8"]), None, INT8)
    x = torch.randn(3, D)
    with torch.no_grad():
        quant(x)
        quant.matrix.put(quantize(other, "int8"))
        fresh = QuantLinear(Matrix.of(other, FORMATS["int8"]), None, INT8)
        assert torch.equal(quant(x), fresh(x))
