"""The decoder as a GGUF file of architecture `llama4`: names, layouts and metadata.

A matrix is stored as here, (out, in); a fused expert tensor (E, in, out) becomes (E, out, in), gate and
up apart. RoPE pairs neighbours in both, so nothing is permuted. Router and norms stay in float32; in a
q4_0 file embedding and head are q8_0, since their errors are not averaged over a sum.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from herdling.checkpoint.card import LICENCE_URL, Card
from herdling.checkpoint.folder import Folder
from herdling.export.gguf import limits
from herdling.export.gguf.vocabulary import vocabulary
from herdling.export.gguf.writing import Entry, Fields, file_type, kind_for
from herdling.model import weights
from herdling.model.config import TextConfig
from herdling.model.llama import rope_frequencies

# Ours within a layer -> theirs, for what is stored as it is.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GATE_UP, DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"


def model(source: Folder, kind: str) -> tuple[Fields, list[Entry]]:
    """Metadata and tensors of a folder's decoder, its matrices in type `kind` (one of `TYPES`).

    Raises ConfigError for a model that llama.cpp would compute differently (see `limits`).
    """
    config = source.config.text
    limits.check_text(config)
    fields = {
        "general.architecture": "llama4",
        "general.type": "model",
        "general.file_type": file_type(kind),
        "general.quantization_version": 2,
        **about(Card.open(source.path, source.config)),
        **shape(config),
        **vocabulary(source.path, config.vocab_size),
    }
    return fields, list(_entries(source, kind))


def about(card: Card) -> Fields:
    """Name and licence of a model, and with Llama in it what its licence asks to be said."""
    if not card.llama:
        licence = {"general.license": card.license} if card.license else {}
        return {"general.name": card.title, **licence}
    return {
        "general.name": card.title,
        "general.license": "other",
        "general.license.name": "llama4",
        "general.license.link": LICENCE_URL,
        "general.description": f"Built with Llama. {card.duties()}",
    }


def shape(config: TextConfig) -> Fields:
    """The `llama4.*` fields. The context is what llama.cpp computes exactly, at most the model's."""
    d = config.head_dim
    values = {
        "vocab_size": config.vocab_size,
        "context_length": limits.exact_tokens(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size_mlp,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "interleave_moe_layer_step": limits.moe_step(config),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": d,
        "attention.value_length": d,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": d,
        "rope.freq_base": config.rope_theta,
    }
    return {f"llama4.{key}": value for key, value in values.items()}


def tensor_names(name: str) -> tuple[str, ...]:
    """GGUF names of one of our parameters, `language_model.` or not: one, or gate and up."""
    name = name.removeprefix("language_model.")
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return (f"{WHOLE[stem]}.weight",)
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    if part == GATE_UP:
        return tuple(f"blk.{layer}.ffn_{half}_exps.weight" for half in ("gate", "up"))
    theirs = "ffn_down_exps" if part == DOWN else LAYER[part]
    return (f"blk.{layer}.{theirs}.weight",)


def _entries(source: Folder, kind: str) -> Iterator[Entry]:
    config, coded = source.config.text, source.plan is not None
    for name, shape in weights.shapes(source.config).items():
        if name.startswith(("vision_model.", "multi_modal_projector.")):
            continue
        names = tensor_names(name)
        if name.endswith((GATE_UP, DOWN)):
            E, inner, out = shape
            size = (E, out // len(names), inner)
            for half, theirs in enumerate(names):
                read = _experts(source, name, half, size[1])
                yield Entry(theirs, size, kind_for(size, kind), read, coded)
        elif len(shape) == 1 or name.endswith("router.weight"):
            yield Entry(names[0], shape, "f32", plain(source, name))
        else:
            whole = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            wanted = "q8_0" if whole and kind == "q4_0" else kind
            yield Entry(names[0], shape, kind_for(shape, wanted), plain(source, name), coded)
    if config.rope_scaling is not None:
        yield Entry("rope_freqs.weight", (config.head_dim // 2,), "f32", lambda: _factors(config))


def plain(source: Folder, name: str) -> Callable[[], Tensor]:
    """Reads a parameter as it is stored; codes as the numbers they stand for, without rounding."""
    return lambda: source.read(name, torch.float32 if source.plan else None)


def _experts(source: Folder, name: str, half: int, out: int) -> Callable[[], Tensor]:
    read = plain(source, name)
    return lambda: read()[:, :, half * out : (half + 1) * out].transpose(1, 2)


def _factors(config: TextConfig) -> Tensor:
    """What llama.cpp divides each RoPE frequency by."""
    cpu = torch.device("cpu")
    return rope_frequencies(replace(config, rope_scaling=None), cpu) / rope_frequencies(config, cpu)
