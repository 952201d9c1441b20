"""The vision encoder with its adapter and projector as llama.cpp's multimodal projector file.

Weights go over exactly, but llama.cpp reads pictures more coarsely than Llama 4 does: it approximates
GELU by tanh, leaves out the tokens between tiles and before the global tile, and cuts at most 3 x 3
tiles (`docs/export.md` has what that costs). Matrices are stored in float32 unless asked otherwise.
"""

from herdling.checkpoint.card import Card
from herdling.checkpoint.folder import Folder
from herdling.errors import ConfigError
from herdling.export.gguf import limits
from herdling.export.gguf.text import about, plain
from herdling.export.gguf.writing import Entry, Fields, file_type, kind_for
from herdling.inputs.image_processor import ImageProcessor
from herdling.model import weights

# Ours within a layer -> theirs.
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
}
WHOLE = {
    "vision_model.patch_embedding.linear.weight": "v.patch_embd.weight",
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.layernorm_pre.weight": "v.pre_ln.weight",
    "vision_model.layernorm_pre.bias": "v.pre_ln.bias",
    "vision_model.layernorm_post.weight": "v.post_ln.weight",
    "vision_model.layernorm_post.bias": "v.post_ln.bias",
    "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
    "multi_modal_projector.linear_1.weight": "mm.model.fc.weight",
}


def projector(source: Folder, kind: str = "f32") -> tuple[Fields, list[Entry]]:
    """Metadata and tensors of a folder's vision part. Raises ConfigError for a model without one."""
    config, text = source.config.vision, source.config.text
    if config is None:
        raise ConfigError(f"{source.path}: is a text model; there is no projector to write")
    limits.check_vision(config)
    processor = ImageProcessor.open(source.path)
    values = {
        "projection_dim": text.hidden_size,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": config.norm_eps,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
        "projector.scale_factor": config.shuffle,
    }
    fields = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": file_type(kind),
        "general.quantization_version": 2,
        **about(Card.open(source.path, source.config)),
        "clip.has_vision_encoder": True,
        "clip.projector_type": "llama4",
        "clip.use_gelu": True,
        **{f"clip.vision.{key}": value for key, value in values.items()},
    }
    entries = []
    for name, shape in weights.shapes(source.config).items():
        if name.startswith(("vision_model.", "multi_modal_projector.")):
            # The table of positions is added to float32 sums, and llama.cpp adds floats only.
            matrix = len(shape) == 2 and "positional" not in name
            stored = kind_for(shape, kind) if matrix else "f32"
            entries.append(Entry(tensor_name(name), shape, stored, plain(source, name)))
    return fields, entries


def tensor_name(name: str) -> str:
    """The GGUF name of one of our vision parameters."""
    if name in WHOLE:
        return WHOLE[name]
    layer, rest = name.removeprefix("vision_model.model.layers.").split(".", 1)
    part, leaf = rest.rsplit(".", 1)
    return f"v.blk.{layer}.{LAYER[part]}.{leaf}"
