"""Fake quantization: python -m pytest tests/quant/test_qat.py"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from herdling import lora
from herdling.errors import ConfigError
from herdling.lora import LoraConfig
from herdling.model import init
from herdling.model.config import preset
from herdling.model.llama import LanguageModel, build
from herdling.quant import qat
from herdling.quant.formats import format_of, quantize
from herdling.quant.modules import Matrix, QuantExperts, QuantLinear
from herdling.quant.schemes import SCHEMES, scheme
from herdling.quant.swap import swap

ALL = [n for n in SCHEMES if n != "meta-fp8"] + ["int3_g32", "int2_g32", "nf4"]


def model_of(seed: int = 0) -> LanguageModel:
    # 40 and 72 are no multiples of 32: the last group of an input is shorter.
    made = build(preset("nano", vision=False, vocab_size=64, hidden_size=40, intermediate_size=72,
                        num_hidden_layers=2, num_attention_heads=2, head_dim=16))  # fmt: skip
    return init.initialize(made, seed)


IDS = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ALL)
def test_what_is_trained_with_is_what_a_file_holds(name):
    """fake(w) = decode(encode(w)), bit for bit, of linears and of every expert; and so the logits."""
    model, chosen = model_of(), scheme(name)
    sites = qat.prepare(model, chosen)
    experts = model.get_submodule("model.layers.1.feed_forward.experts")
    rounded = qat.fake(experts.down_proj, replace(chosen.weights, per="expert") if chosen.weights.per == "tensor" else chosen.weights, 1)  # fmt: skip
    one_by_one = [quantize(w.T, chosen.weights).dequantize().T for w in experts.down_proj.detach()]
    assert torch.equal(rounded.detach(), torch.stack(one_by_one))
    trained = model(IDS)
    report = qat.convert(model)
    assert isinstance(model.get_submodule("model.layers.1.feed_forward.experts"), QuantExperts)
    assert {s.module for s in sites} == {n for n, m in model.named_modules() if isinstance(m, QuantLinear | QuantExperts)}  # fmt: skip
    assert report.share > 0.3
    leaf = torch.nn.Parameter(torch.zeros(()))
    assert torch.equal(model(IDS + 0 * leaf.long()), trained)


def test_gradients_pass_where_the_format_reaches():
    form = format_of("int4_g32", divisor=6.0)  # cuts off what is beyond 7.5 / 6 of the rest
    weight = torch.linspace(-1, 1, 32).repeat(2, 1).requires_grad_()
    incoming = torch.randn(2, 32)
    out = qat.fake(weight, form)
    (grad,) = torch.autograd.grad((out * incoming).sum(), weight)
    scale = torch.tensor(1 / 6).bfloat16().float()
    inside = (weight.detach() / scale >= -8.5) & (weight.detach() / scale <= 7.5)
    assert torch.equal(grad, incoming * inside)
    assert torch.equal(out.detach()[inside], ((weight / scale).round() * scale).detach()[inside])
    default = torch.autograd.grad((qat.fake(weight, format_of("nf4")) * incoming).sum(), weight)[0]
    assert torch.equal(default, incoming)  # nothing is beyond the largest number


def test_ternary_lets_every_weight_learn():
    weight = torch.randn(3, 32, 20).requires_grad_()
    out = qat.fake(weight, format_of("ternary"), 1)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(grad, torch.ones_like(weight))
    for w, q in zip(weight.detach(), out.detach(), strict=True):
        scale = w.abs().mean()
        torch.testing.assert_close(q, (w / scale).round().clamp(-1, 1) * scale)


def test_activations_get_a_scale_a_token_after_dispatch():
    """An outlier in one token leaves the others' rounding alone; gates are in what is rounded."""
    model = model_of()
    qat.prepare(model, scheme("w4a8"), ("experts",))
    experts = model.get_submodule("model.layers.0.feed_forward.experts")
    g = torch.Generator().manual_seed(0)
    x, gates = torch.randn(6, 40, generator=g), torch.rand(6, 1, generator=g)
    chosen = torch.tensor([[0], [1], [0], [1], [2], [2]])
    before = experts(x, chosen, gates)
    louder = x.clone()
    louder[0] *= 1000
    after = experts(louder, chosen, gates)
    assert torch.equal(before[1:], after[1:])
    form = scheme("w4a8").weights
    weights = [qat.fake(t, form, 1).detach() for t in (experts.gate_up_proj, experts.down_proj)]

    def int8(row):
        scale = row.abs().amax(-1, keepdim=True) / 127
        return (row / scale).round() * scale

    for n, e in enumerate(chosen[:, 0]):
        gate, up = (int8(x[n] * gates[n]) @ weights[0][e]).chunk(2)
        want = int8(torch.nn.functional.silu(gate) * up) @ weights[1][e]
        torch.testing.assert_close(before[n], want, rtol=1e-4, atol=1e-5)


def test_ends_are_int8_and_convert_like_the_rest():
    model = model_of()
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    qat.prepare(model, scheme("w4a8"), ends=True)
    assert list(dict(model.named_parameters())) == list(plain)  # names and weights stay
    head = model.get_submodule("lm_head")
    rounded = Matrix.of(plain["lm_head.weight"], qat.ENDS.weights).dense()
    assert torch.equal(head.weight.detach(), rounded)
    loss = model(IDS, readout=lambda hidden, head: (hidden @ head.weight.T).float().logsumexp(-1).sum())  # fmt: skip
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    qat.convert(model)
    assert isinstance(model.get_submodule("lm_head"), QuantLinear)
    table = model.get_submodule("model.embed_tokens").weight.detach()
    assert torch.equal(table, quantize(plain["model.embed_tokens.weight"], "int8").dequantize())


def test_it_trains_and_comes_off():
    torch.manual_seed(0)
    model = model_of()
    qat.prepare(model, scheme("int2_g32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        logits = model(IDS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    qat.remove(model)
    assert not list(qat.prepared(model))
    with pytest.raises(ConfigError, match="nothing to convert"):
        qat.convert(model)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", ["w4a8", "nf4"])
def test_adapters_lie_over_it(name, converted):
    """LoRA on fake-quantized and on quantized layers, every expert's included: the plain result plus
    scale * x A B, gradients those of the dequantized formula, nothing of the base moves."""
    model = model_of()
    qat.prepare(model, scheme(name), ends=True)
    if converted:
        qat.convert(model)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    plain = model(IDS)
    adapters = lora.attach(model, LoraConfig(r=3, targets=("all",)))
    assert torch.equal(model(IDS), plain)
    with torch.no_grad():
        for _, factors in adapters.factors().values():
            factors.B.normal_(std=0.1)
    assert "experts" in lora.table(model)
    module = model.get_submodule("model.layers.0.feed_forward.experts")
    x = torch.randn(7, 40, requires_grad=True)
    chosen, gates = torch.randint(0, 4, (7, 1)), torch.rand(7, 1)
    factors = module.lora["0"]
    leaves = [x, *factors.parameters()]
    incoming = torch.randn(7, 40)
    got = torch.autograd.grad((module(x, chosen, gates) * incoming).sum(), leaves)
    dense = [
        t.dense().mT if isinstance(t, Matrix) else qat.fake(t, scheme(name).weights, 1).detach()
        for t in (module.gate_up_proj, module.down_proj)
    ]
    acts = scheme(name).activations

    def through(row):  # rounded, the gradient as if it were not
        return row if acts is None else row + (quantize(row.detach(), acts).dequantize() - row.detach())  # fmt: skip

    rows = []
    for n, e in enumerate(chosen[:, 0]):
        row = x[n] * gates[n]
        up = factors["gate_up_proj"]
        hidden = through(row) @ dense[0][e] + up.scale * (row @ up.A[e] @ up.B[e])
        gate, value = hidden.chunk(2)
        act, down = torch.nn.functional.silu(gate) * value, factors["down_proj"]
        rows.append(through(act) @ dense[1][e] + down.scale * (act @ down.A[e] @ down.B[e]))
    want = torch.autograd.grad((torch.stack(rows) * incoming).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    (model(IDS).square().mean()).backward()
    assert all(f.A.grad is not None for _, f in adapters.factors().values())
    lora.detach(model)
    assert torch.equal(model(IDS), plain)
    assert all(torch.equal(base[n], t) for n, t in model.state_dict().items())


class Largest(TorchDispatchMode):
    """The most numbers that any float tensor made in here holds."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.most = max(self.most, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("name", ["int4_g32", "nf4"])
def test_qlora_holds_codes_and_one_expert_at_a_time(name):
    """Bytes as predicted; no float tensor, forward or backward, as large as all experts of a layer."""
    model = build(
        preset("nano", vision=False, vocab_size=64, num_local_experts=16, num_hidden_layers=2,
               hidden_size=128, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    )  # fmt: skip
    init.initialize(model, 0)
    report = swap(model, scheme(name))
    numbers = sum(r.parameters for r in report.rows if not r.why)
    extra = 2 * 8 / 32 if name == "int4_g32" else 4 * 8 / 64  # a scale for each group
    assert sum(r.nbytes for r in report.rows if not r.why) == numbers * (4 + extra) / 8
    lora.attach(model, LoraConfig(r=2, targets=("attention", "shared", "experts")))
    assert all(".lora." in n for n, p in model.named_parameters() if p.requires_grad)
    with Largest() as seen:
        model(IDS[:, :16]).square().mean().backward()
    of_a_layer = 16 * 128 * 2 * 64
    assert seen.most <= of_a_layer / 4
    assert of_a_layer / 16 <= seen.most  # it does see an expert being made
