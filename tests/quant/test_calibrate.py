"""GPTQ against the formula it speeds up, scaling that changes nothing but errors, and what experts see."""

from dataclasses import replace

import pytest
import torch

from herdling.errors import ConfigError
from herdling.model.llama import Layout
from herdling.quant.calibrate import DAMP, capture, gptq, gptq_fill, gram, smooth
from herdling.quant.formats import format_of, quantize, round_trip, wide
from herdling.quant.modules import Matrix
from herdling.quant.schemes import scheme
from herdling.quant.swap import chosen, place


def correlated(rows: int, n: int) -> torch.Tensor:
    """Inputs whose channels depend on each other, some of them large."""
    mixed = torch.randn(rows, n // 4) @ torch.randn(n // 4, n) + 0.3 * torch.randn(rows, n)
    return mixed * torch.logspace(-1, 1, n)[torch.randperm(n)]


def by_elimination(weight, H, form):
    """One column after the other, its row and column then taken out of the inverse (OBQ)."""
    W, n = weight.double().clone(), weight.shape[1]
    H = H + torch.eye(n).double() * DAMP * H.diagonal().mean()
    inverse, out = torch.linalg.inv(H), torch.empty_like(weight)
    size = form.group if form.per == "group" else n
    for i in range(n):
        if i % size == 0:
            scale = wide(quantize(W[:, i : i + size].float(), form).scales)
        column = W[:, i, None].float()
        ratio = column / scale if form.rule == "power" else column * (1 / scale)
        out[:, i] = (form.element.snap(ratio) * scale)[:, 0]
        error = (W[:, i] - out[:, i].double()) / inverse[i, i]
        W -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


@pytest.mark.parametrize(
    ("name", "options"),
    [("int4_g32", {}), ("int4_g32", {"group": 96}), ("int8", {}), ("mxfp4_e2m1", {}), ("nf4", {})],
)
def test_gptq_is_column_by_column_elimination(name, options):
    torch.manual_seed(0)
    form = format_of(name, scale_dtype=torch.float32, **options) if "mx" not in name else format_of(name)  # fmt: skip
    weight, H = torch.randn(24, 192), gram(correlated(800, 192))
    got = gptq(weight, H, form)
    back = got.dequantize()
    # A number at a tie may go the other way, and all that follow it in its row.
    same = torch.isclose(back, by_elimination(weight, H, form), atol=1e-4).all(1)
    assert same.float().mean() > 0.8
    plain = round_trip(weight, form)
    error = lambda w: torch.einsum("oi,ij,oj->", (w - weight).double(), H, (w - weight).double())  # noqa: E731
    assert error(back) < 0.5 * error(plain)


def test_gptq_of_independent_inputs_is_plain_rounding():
    weight = torch.randn(16, 64)
    q = gptq(weight, torch.eye(64).double(), format_of("int4_g32"))
    plain = quantize(weight, "int4_g32")
    assert torch.equal(q.codes, plain.codes)
    assert torch.equal(q.scales, plain.scales)


def test_inputs_that_never_came_and_no_number():
    weight, rows = torch.randn(8, 64), torch.randn(200, 64)
    rows[:, 5] = 0
    back = gptq(weight, gram(rows), format_of("int4_g32")).dequantize()
    assert (back[:, 5] - weight[:, 5]).abs().max() < 0.6
    assert back.isfinite().all()
    rows[3, 3] = torch.nan
    with pytest.raises(ConfigError, match="not positive; are there inf or NaN"):
        gptq(weight, gram(rows), format_of("int4_g32"))
    with pytest.raises(ConfigError, match="one scale for each expert"):
        gptq(weight, torch.eye(64).double(), format_of("ternary"))


@pytest.fixture
def block(make_model):
    """A MoE block, hidden states with some large channels, and what they look like to it."""
    model = make_model(interleave_moe_layer_step=1, num_experts_per_tok=2)
    layer = model.model.layers[1].requires_grad_(False)
    x = torch.randn(4, 24, 96)
    layer.input_layernorm.weight[[3, 50]] = 20.0
    layer.post_attention_layernorm.weight[[7, 60]] = 20.0
    return layer, x, Layout(model.config.text, x, None, None, None), model


@pytest.mark.parametrize("every", [False, True])
def test_experts_see_rows_times_their_gate(block, every):
    layer, x, at, _ = block
    inputs = capture(layer, x, at, every)
    hidden = x + layer.self_attn(layer.input_layernorm(x), at, None)
    flat = layer.post_attention_layernorm(hidden).flatten(0, 1)
    picked, gates, logits = layer.feed_forward.router(flat)
    for e, rows in enumerate(inputs.rows):
        if every:
            wanted = flat * torch.sigmoid(logits[:, e, None])
        else:
            mine = picked == e
            wanted = flat[mine.any(1)] * gates[mine][:, None]
        torch.testing.assert_close(rows, wanted)
    assert sum(inputs.seen) == 2 * len(flat)
    assert inputs.seen == [int((picked == e).sum()) for e in range(4)]
    torch.testing.assert_close(inputs.linears["feed_forward.shared_expert.up_proj"], flat)
    assert not any(h for m in layer.modules() for h in m._forward_pre_hooks)


def own_sites(model, name):
    prefix = "model.layers.1."
    found = [s for s in chosen(model, scheme(name)) if s.path.startswith(prefix)]
    return [replace(s, path=s.path.removeprefix(prefix), module=s.module.removeprefix(prefix)) for s in found]  # fmt: skip


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_block_comes_out_closer_than_by_rounding(block, method):
    layer, x, at, model = block
    before = layer(x, at, None)
    found, how = own_sites(model, "int3_g32"), replace(scheme("int3_g32"), activations=None)
    inputs = capture(layer, x, at, every=False)
    assert len(found) == 4 + 3 + 2

    def error(block) -> float:
        return float((block(x, at, None) - before).norm())

    import copy

    plain = copy.deepcopy(layer)
    place(plain, how, found, lambda _, w, form: Matrix.of(w, form))
    if method == "awq":
        smooth(layer, inputs, how.weights, found)
        torch.testing.assert_close(layer(x, at, None), before, rtol=1e-3, atol=1e-3)
        place(layer, how, found, lambda _, w, form: Matrix.of(w, form))
    else:
        place(layer, how, found, gptq_fill(inputs))
    assert error(layer) < 0.9 * error(plain)
