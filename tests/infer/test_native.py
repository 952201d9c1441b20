"""Native leaves: the same logits, only inside a step, only where they fit."""

import pytest
import torch
from torch import nn

from herdling.infer import native
from herdling.infer.engine import Engine
from herdling.infer.native import MOST_TOKENS, Native
from herdling.kernels import cpu
from herdling.model.llama import MLP, Experts, RMSNorm, Router, decoder_of
from tests.infer.test_engine import mixed

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_logits_as_without(make_lm, dtype, monkeypatch):
    lm = make_lm(num_experts_per_tok=2, interleave_moe_layer_step=2)
    lm.model.to(dtype)
    decoder = decoder_of(lm.model)
    ids = torch.arange(MOST_TOKENS)[None]
    with torch.inference_mode():
        want = decoder(ids)
        exact = decoder.double()(ids).float()
        decoder.to(dtype)
        with Native(decoder).leaves(MOST_TOKENS):
            got = decoder(ids)
    size = exact.abs().max()
    if dtype == torch.float32:
        assert (got - want).abs().max() <= 1e-5 * size
    else:  # no further from the exact result than torch's own kernels, give or take
        assert (got - exact).abs().mean() <= 1.2 * (want - exact).abs().mean()


@needs_compiler
def test_every_leaf_is_swapped_for_a_short_step_and_only_then(plain_lm):
    decoder = decoder_of(plain_lm.model)
    leaves = [m for m in decoder.modules() if isinstance(m, nn.Linear | Experts | MLP | RMSNorm)]
    inside_mlp = {child for m in leaves if isinstance(m, MLP) for child in m.children()}
    swap = Native(decoder)
    with swap.leaves(1):
        for module in leaves:
            assert ("forward" in module.__dict__) == (module not in inside_mlp)
    with swap.leaves(MOST_TOKENS + 1):
        assert not any("forward" in m.__dict__ for m in decoder.modules())
    with pytest.raises(KeyError), swap.leaves(1):
        raise KeyError
    assert not any("forward" in m.__dict__ for m in decoder.modules())
    assert any(isinstance(m, Router) for m in leaves)


def test_what_is_altered_already_is_left_alone(make_lm):
    decoder = decoder_of(make_lm().model)
    layer = decoder.model.layers[0]
    own = layer.self_attn.q_proj.forward
    layer.self_attn.q_proj.forward = own

    class Other(nn.Linear):
        pass

    layer.self_attn.k_proj.__class__ = Other
    layer.feed_forward.shared_expert.up_proj.__class__ = Other
    with Native(decoder).leaves(1):
        assert layer.self_attn.q_proj.forward is own
        assert "forward" not in layer.self_attn.k_proj.__dict__
        assert "forward" not in layer.feed_forward.shared_expert.__dict__
        assert "forward" not in layer.feed_forward.shared_expert.up_proj.__dict__


def test_without_a_compiler_torch_does_it(plain_lm, monkeypatch):
    want = plain_lm.engine.run(mixed(plain_lm))
    monkeypatch.setattr(cpu, "available", lambda: False)
    engine = Engine(plain_lm.model, plain_lm.tokenizer)
    monkeypatch.setattr(native.cpu, "linear", None)
    assert [r.ids for r in engine.run(mixed(plain_lm))] == [r.ids for r in want]
