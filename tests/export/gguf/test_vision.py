"""The projector file: every tensor under the name that llama.cpp's loader asks for.

Run: python -m pytest tests/export/gguf/test_vision.py
"""

import pytest
import torch

from herdling.errors import ConfigError
from herdling.export.gguf import vision, writing


def test_every_tensor_and_field(make, read, tmp_path):
    model, folder = make(vision=True)
    writing.write(tmp_path / "mmproj.gguf", *vision.projector(folder))
    file, encoder = read(tmp_path / "mmproj.gguf"), model.vision_model
    wanted = {
        "v.patch_embd.weight": encoder.patch_embedding.linear.weight,
        "v.class_embd": encoder.class_embedding,
        "v.position_embd.weight": encoder.positional_embedding_vlm,
        "mm.model.mlp.1.weight": encoder.vision_adapter.mlp.fc1.weight,
        "mm.model.mlp.2.weight": encoder.vision_adapter.mlp.fc2.weight,
        "mm.model.fc.weight": model.multi_modal_projector.linear_1.weight,
    }
    for leaf in ("weight", "bias"):
        wanted[f"v.pre_ln.{leaf}"] = getattr(encoder.layernorm_pre, leaf)
        wanted[f"v.post_ln.{leaf}"] = getattr(encoder.layernorm_post, leaf)
        for i, layer in enumerate(encoder.model.layers):
            modules = {
                "attn_q": layer.self_attn.q_proj,
                "attn_k": layer.self_attn.k_proj,
                "attn_v": layer.self_attn.v_proj,
                "attn_out": layer.self_attn.o_proj,
                "ffn_up": layer.mlp.fc1,
                "ffn_down": layer.mlp.fc2,
                "ln1": layer.input_layernorm,
                "ln2": layer.post_attention_layernorm,
            }
            for name, module in modules.items():
                wanted[f"v.blk.{i}.{name}.{leaf}"] = getattr(module, leaf)
    assert file.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(file.tensors[name], tensor.detach()), name
    config = folder.config.vision
    fields = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "llama4",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": folder.config.text.hidden_size,
        "clip.vision.image_size": config.image_size,
        "clip.vision.patch_size": config.patch_size,
        "clip.vision.embedding_length": config.hidden_size,
        "clip.vision.feed_forward_length": config.intermediate_size,
        "clip.vision.block_count": config.num_hidden_layers,
        "clip.vision.attention.head_count": config.num_attention_heads,
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
        "clip.vision.projector.scale_factor": 2,
    }
    assert {key: file.fields[key] for key in fields} == fields


def test_matrices_may_be_smaller_but_never_the_positions(make, read, tmp_path):
    _, folder = make(vision=True)
    writing.write(tmp_path / "mmproj.gguf", *vision.projector(folder, "f16"))
    kinds = read(tmp_path / "mmproj.gguf").kinds
    assert kinds["v.blk.0.ffn_up.weight"] == "f16"
    assert {kinds["v.position_embd.weight"], kinds["v.class_embd"], kinds["v.blk.0.ln1.bias"]} == {"f32"}  # fmt: skip


def test_a_text_model_has_none(make):
    _, folder = make()
    with pytest.raises(ConfigError, match="is a text model"):
        vision.projector(folder)
