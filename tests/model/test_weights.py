"""Names and shapes against transformers; the per-expert layout against the fused one.

Run: python -m pytest tests/model/test_weights.py
"""

import pytest
import torch
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration

from herdling.model import weights
from herdling.model.config import preset


@pytest.mark.parametrize("name", ["nano", "scout", "maverick"])
def test_names_and_shapes_are_transformers(name):
    config = preset(name)
    raw = config.to_hf()
    raw.pop("architectures"), raw.pop("model_type")
    theirs = Llama4Config(**raw)
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(theirs)
        text_model = Llama4ForCausalLM(theirs.text_config)
    assert weights.shapes(config) == {n: tuple(p.shape) for n, p in model.state_dict().items()}
    text = weights.shapes(preset(name, vision=False))
    assert text == {n: tuple(p.shape) for n, p in text_model.state_dict().items()}


@pytest.mark.parametrize("vision", [True, False])
def test_per_expert_parts_are_linears_and_cover_the_fused_tensors_once(vision):
    config = preset("nano", vision=vision, interleave_moe_layer_step=2)
    E, D, F = 4, 96, 96
    fused = {n: torch.zeros(s) for n, s in weights.shapes(config).items() if ".experts." in n}
    slots = weights.per_expert(config)
    assert len(slots) == 2 * E * 3
    for slot in slots.values():
        slot.view(fused[slot.parameter]).add_(1)
    assert all(tensor.eq(1).all() for tensor in fused.values())

    # By hand: a linear of expert 2 computes x @ its slice of the fused tensor.
    prefix = "language_model." if vision else ""
    layer = f"{prefix}model.layers.3.feed_forward.experts"
    gate_up, down, x = torch.randn(E, D, 2 * F), torch.randn(E, F, D), torch.randn(5, D)
    up = slots[f"{layer}.2.up_proj.weight"].view(gate_up)
    gate = slots[f"{layer}.2.gate_proj.weight"].view(gate_up)
    back = slots[f"{layer}.2.down_proj.weight"].view(down)
    torch.testing.assert_close(torch.nn.functional.linear(x, gate), x @ gate_up[2, :, :F])
    torch.testing.assert_close(torch.nn.functional.linear(x, up), x @ gate_up[2, :, F:])
    torch.testing.assert_close(torch.nn.functional.linear(x, back), x @ down[2])


def test_unequal_widths_have_their_shapes_the_right_way_round():
    config = preset("nano", vision=False, hidden_size=96, intermediate_size=64)
    slots = weights.slots(config)
    experts = "model.layers.0.feed_forward.experts"
    assert slots[f"{experts}.0.gate_proj.weight"].shape == (64, 96)
    assert slots[f"{experts}.0.down_proj.weight"].shape == (96, 64)
    assert slots[f"{experts}.gate_up_proj"].shape == (4, 96, 128)
