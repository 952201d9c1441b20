"""Products of few bits against the formula in float64: python -m pytest tests/quant/test_low_precision.py"""

import pytest
import torch
import torch.nn.functional as F

from herdling.errors import ConfigError
from herdling.model import init
from herdling.model.config import preset
from herdling.model.llama import Experts, build
from herdling.quant import low_precision
from herdling.quant.formats import round_trip
from herdling.quant.low_precision import RECIPES, LowExperts, LowLinear, apply, product, remove


def near(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def cast(x, form, dim):
    return round_trip(x.float(), form, dim).double()


@pytest.mark.parametrize("name", RECIPES)
def test_a_linears_three_products(name):
    """Each operand rounded along what its product sums over; sums in float64."""
    recipe, g = RECIPES[name], torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(70, 45)
    plain = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.__class__ = LowLinear
    layer.recipe = recipe
    x = torch.randn(3, 11, 70, generator=g, requires_grad=True)
    weight = torch.randn(3, 11, 45, generator=g)
    out = layer(x)
    d_x, d_w, d_b = torch.autograd.grad((out * weight).sum(), [x, layer.weight, layer.bias])
    flat, grad, w = x.detach().view(-1, 70), weight.view(-1, 45), plain["weight"]
    want = cast(flat, recipe.inputs, 1) @ cast(w, recipe.weights, 1).t() + plain["bias"].double()
    near(out.detach().view(-1, 45), want)
    near(d_x.view(-1, 70), cast(grad, recipe.gradients, 1) @ cast(w, recipe.weights, 0))
    if recipe.exact_weight_gradient:
        near(d_w, grad.double().t() @ flat.double())
    else:
        near(d_w, cast(grad, recipe.gradients, 0).t() @ cast(flat, recipe.inputs, 0))
    near(d_b, grad.double().sum(0))
    assert (out.view(-1, 45) - F.linear(flat, w, plain["bias"])).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["fp8", "fp8_rowwise", "mxfp4w_mxfp6"])
def test_experts_are_linears_of_their_rows(name):
    recipe, g = RECIPES[name], torch.Generator().manual_seed(1)
    config = preset("nano", vision=False, hidden_size=40, intermediate_size=24).text
    experts = Experts(config)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=g)
    experts.__class__ = LowExperts
    experts.recipe = recipe
    x = torch.randn(30, 40, generator=g, requires_grad=True)
    chosen = torch.randint(0, 3, (30, 1), generator=g)  # the last of four gets none
    gates = torch.rand(30, 1, generator=g, requires_grad=True)
    weight = torch.randn(30, 40, generator=g)
    leaves = [x, gates, experts.gate_up_proj, experts.down_proj]
    out = experts(x, chosen, gates)
    got = [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    def linear(rows, matrix):
        layer = torch.nn.Linear(*matrix.shape, bias=False)
        layer.__class__ = LowLinear
        layer.recipe = recipe
        del layer.weight
        layer.weight = matrix.t()
        return layer(rows)

    want = torch.zeros_like(out)
    for e in range(3):
        mine = chosen[:, 0] == e
        gate, up = linear((x * gates)[mine], experts.gate_up_proj[e]).chunk(2, -1)
        want = want.index_put((mine,), linear(F.silu(gate) * up, experts.down_proj[e]))
    wanted = [want, *torch.autograd.grad((want * weight).sum(), leaves)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not got[3][3].any()


def test_bf16_emulation_is_as_exact_as_float32():
    """Operands of few bits are bfloat16 numbers: only the result is rounded."""
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(16, 64, generator=g).bfloat16(), torch.randn(8, 64, generator=g)
    for recipe in RECIPES.values():
        wide = product(a.float(), b, recipe.inputs, recipe.weights)
        low = product(a, b, recipe.inputs, recipe.weights)
        torch.testing.assert_close(low.float(), wide, rtol=2**-8, atol=0.02)
        assert torch.equal(
            round_trip(a, recipe.inputs).float(), round_trip(a.float(), recipe.inputs)
        )


def test_one_outlier_spoils_a_tensor_but_only_its_own_row():
    """Gradients as they are, over decades, and one 1e4 times the largest: E4M3 with one scale flushes
    most of the rest to zero, rowwise does not."""
    g = torch.Generator().manual_seed(3)
    grad, weight = torch.randn(64, 32, generator=g), torch.randn(48, 32, generator=g)
    grad = grad * (2 * torch.randn(64, 1, generator=g)).exp()
    grad[5, 7] = 1e4 * grad.abs().max()
    exact = grad.double() @ weight.double().t()
    error = {}
    for name, form in (("tensor", RECIPES["fp8"].inputs), ("row", RECIPES["fp8_rowwise"].inputs)):
        others = torch.arange(64) != 5
        out = product(grad, weight, form, RECIPES["fp8_rowwise"].weights)
        relative = (out.double() - exact).norm(dim=1) / exact.norm(dim=1)
        error[name] = float(relative[others].mean())
    assert error["row"] < 0.06
    assert error["tensor"] > 5 * error["row"]


def test_a_models_layers_and_back():
    model = init.initialize(build(preset("nano", vision=False)), 0)
    classes = {n: type(m) for n, m in model.named_modules()}
    names = list(model.state_dict())
    ids = torch.randint(0, 1024, (2, 20), generator=torch.Generator().manual_seed(0))
    before = model(ids)
    count = apply(model, "mxfp4")
    changed = {n for n, m in model.named_modules() if type(m) is not classes[n]}
    assert len(changed) == count == 4 * (4 + 3 + 1)  # attention, shared expert, experts
    assert not any("router" in n or "lm_head" in n for n in changed)
    assert list(model.state_dict()) == names
    assert (model(ids) - before).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="is a LowLinear, which cannot train in fp8"):
        apply(model, "fp8")
    remove(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert torch.equal(model(ids), before)
    assert apply(model, "fp8", ("experts",)) == 4
    with pytest.raises(ConfigError, match="no low precision 'fp9'"):
        low_precision.apply(model, "fp9")
