"""Initial weights: reproducible by name, scaled as documented, none left unset."""

import torch

from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build


def fresh(seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(initialize(build(preset("tiny")), seed).named_parameters())


def test_same_seed_same_weights_other_seed_other():
    a, b, c = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a if a[n].dim() > 1)


def test_scales():
    weights, std = fresh(), preset("tiny").text.initializer_range
    layer = "language_model.model.layers.1"
    want = {
        f"{layer}.self_attn.q_proj.weight": std,
        f"{layer}.self_attn.o_proj.weight": std / 8**0.5,
        f"{layer}.feed_forward.experts.gate_up_proj": 2 * std,
        f"{layer}.feed_forward.experts.down_proj": std / 8**0.5,
        "vision_model.patch_embedding.linear.weight": 48**-0.5,
        "vision_model.model.layers.0.mlp.fc2.weight": 384**-0.5,
        "multi_modal_projector.linear_1.weight": 192**-0.5,
        "vision_model.positional_embedding_vlm": 96**-0.5,
    }
    for name, scale in want.items():
        assert abs(weights[name].std().item() / scale - 1) < 0.05, name
    assert torch.equal(weights[f"{layer}.input_layernorm.weight"], torch.ones(192))
    assert not weights["vision_model.layernorm_pre.bias"].any()


def test_first_pass_is_finite_and_near_uniform():
    model = initialize(build(preset("nano")), 0)
    with torch.no_grad():
        logits = model(torch.randint(0, 1000, (2, 64)))
    assert logits.isfinite().all()
    assert abs(logits.log_softmax(-1).mean().item() + torch.tensor(1024.0).log().item()) < 0.3
