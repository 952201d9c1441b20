"""Meta's `consolidated.NN.pth` files: their tensor names beside ours, and how files cut tensors.

The table is the mapping, in both directions. A row says which stored tensor holds which of our
parameters: `parts` are stacked in that order along the cut axis *within each file* (so a file's
wqkv is its q rows, its k rows, its v rows). Sources: Meta `llama4/model.py`, `llama4/moe.py`,
`llama4/ffn.py` (load hooks), `checkpoint.py` (cut axes); transformers' conversion script (names).

Names may come fused, as released, or plain, as the modules have them after the load hooks; both are
read, the fused ones are written. {l} counts decoder layers, {i} vision layers.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from herdling.model.config import ModelConfig


@dataclass(frozen=True)
class Row:
    """One stored tensor and the parameters inside it."""

    stored: str
    parts: tuple[str, ...]
    cut: int | None = None
    """Axis that is cut over files; None: every file holds the whole tensor."""
    half: int | None = None
    """Which half of the part's last axis (0 gate, 1 up); None: all of it."""
    transposed: bool = False
    flat: bool = False
    """Stored with its first two axes (expert, input) merged into one."""
    layers: str = ""
    """Only "moe" or only "dense" layers; empty: all."""


def _text(stored: str, *parts: str, **how: int | str | bool) -> Row:
    """A row of one decoder layer; names are completed with the layer prefix."""
    inner = tuple(f"model.layers.{{l}}.{part}" for part in parts)
    return Row(f"layers.{{l}}.{stored}", inner, **how)  # pyright: ignore[reportArgumentType]


def _vision(stored: str, part: str, cut: int | None = None) -> Row:
    """A row of the tile encoder; names are completed with its prefixes."""
    return Row(f"vision_embeddings.{stored}", (f"vision_model.{part}",), cut)


_BLOCK = "vision_encoder.transformer.resblocks.{i}"
_EXPERTS = "feed_forward.experts"
_SHARED = "feed_forward.shared_expert"

# Rows that both spellings share.
_COMMON = (
    Row("tok_embeddings.weight", ("model.embed_tokens.weight",), 0),
    Row("norm.weight", ("model.norm.weight",)),
    Row("output.weight", ("lm_head.weight",), 0),
    _text("attention.wo.weight", "self_attn.o_proj.weight", cut=1),
    _text("feed_forward.router_DE", "feed_forward.router.weight", transposed=True, layers="moe"),
)

_FUSED = (
    _text("attention.wqkv.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
          "self_attn.v_proj.weight", cut=0),
    _text("attention.wqkv.layer_norm_weight", "input_layernorm.weight"),
    _text("feed_forward.norm.weight", "post_attention_layernorm.weight", layers="moe"),
    _text(f"{_EXPERTS}.moe_w_in_eD_F", f"{_EXPERTS}.gate_up_proj", cut=2, half=0, flat=True,
          layers="moe"),
    _text(f"{_EXPERTS}.moe_w_swiglu_eD_F", f"{_EXPERTS}.gate_up_proj", cut=2, half=1, flat=True,
          layers="moe"),
    _text(f"{_EXPERTS}.moe_w_out_eF_D", f"{_EXPERTS}.down_proj", cut=1, flat=True, layers="moe"),
    _text("feed_forward.w_in_shared_FD.weight", f"{_SHARED}.gate_proj.weight", cut=0, layers="moe"),
    _text("feed_forward.w_swiglu_FD.weight", f"{_SHARED}.up_proj.weight", cut=0, layers="moe"),
    _text("feed_forward.w_out_shared_DF.weight", f"{_SHARED}.down_proj.weight", cut=1,
          layers="moe"),
    _text("feed_forward.mlp.layer_norm_weight", "post_attention_layernorm.weight", layers="dense"),
    _text("feed_forward.mlp.fc1_weight", "feed_forward.gate_proj.weight",
          "feed_forward.up_proj.weight", cut=0, layers="dense"),
    _text("feed_forward.mlp.fc2_weight", "feed_forward.down_proj.weight", cut=1, layers="dense"),
)  # fmt: skip

_PLAIN = (
    _text("attention.wq.weight", "self_attn.q_proj.weight", cut=0),
    _text("attention.wk.weight", "self_attn.k_proj.weight", cut=0),
    _text("attention.wv.weight", "self_attn.v_proj.weight", cut=0),
    _text("attention_norm.weight", "input_layernorm.weight"),
    _text("ffn_norm.weight", "post_attention_layernorm.weight"),
    _text(f"{_EXPERTS}.w1", f"{_EXPERTS}.gate_up_proj", cut=2, half=0, layers="moe"),
    _text(f"{_EXPERTS}.w3", f"{_EXPERTS}.gate_up_proj", cut=2, half=1, layers="moe"),
    _text(f"{_EXPERTS}.w2", f"{_EXPERTS}.down_proj", cut=1, layers="moe"),
    _text(f"{_SHARED}.w1.weight", f"{_SHARED}.gate_proj.weight", cut=0, layers="moe"),
    _text(f"{_SHARED}.w3.weight", f"{_SHARED}.up_proj.weight", cut=0, layers="moe"),
    _text(f"{_SHARED}.w2.weight", f"{_SHARED}.down_proj.weight", cut=1, layers="moe"),
    _text("feed_forward.w1.weight", "feed_forward.gate_proj.weight", cut=0, layers="dense"),
    _text("feed_forward.w3.weight", "feed_forward.up_proj.weight", cut=0, layers="dense"),
    _text("feed_forward.w2.weight", "feed_forward.down_proj.weight", cut=1, layers="dense"),
)

_TILES = (
    Row("vision_projection.weight", ("multi_modal_projector.linear_1.weight",), 0),
    _vision("vision_encoder.conv1._linear.weight", "patch_embedding.linear.weight", 0),
    _vision("vision_encoder.class_embedding", "class_embedding"),
    _vision("vision_encoder.positional_embedding_vlm", "positional_embedding_vlm"),
    *(_vision(f"vision_encoder.ln_{end}.{kind}", f"layernorm_{end}.{kind}")
      for end in ("pre", "post") for kind in ("weight", "bias")),
    *(_vision(f"{_BLOCK}.attn.w{x}.{kind}", f"model.layers.{{i}}.self_attn.{x}_proj.{kind}", 0)
      for x in "qkv" for kind in ("weight", "bias")),
    _vision(f"{_BLOCK}.attn.wo.weight", "model.layers.{i}.self_attn.o_proj.weight", 1),
    _vision(f"{_BLOCK}.attn.wo.bias", "model.layers.{i}.self_attn.o_proj.bias"),
    _vision(f"{_BLOCK}.mlp.c_fc.weight", "model.layers.{i}.mlp.fc1.weight", 0),
    _vision(f"{_BLOCK}.mlp.c_fc.bias", "model.layers.{i}.mlp.fc1.bias", 0),
    _vision(f"{_BLOCK}.mlp.c_proj.weight", "model.layers.{i}.mlp.fc2.weight", 1),
    _vision(f"{_BLOCK}.mlp.c_proj.bias", "model.layers.{i}.mlp.fc2.bias"),
    *(_vision(f"{_BLOCK}.ln_{n}.{kind}", f"model.layers.{{i}}.{norm}_layernorm.{kind}")
      for n, norm in ((1, "input"), (2, "post_attention")) for kind in ("weight", "bias")),
    _vision("vision_adapter.mlp.c_fc.weight", "vision_adapter.mlp.fc1.weight", 0),
    _vision("vision_adapter.mlp.c_proj.weight", "vision_adapter.mlp.fc2.weight", 1),
)  # fmt: skip

# Stored beside the weights but no part of the model: tables that are recomputed, quantization
# leftovers, and training statistics.
_DROPPED = re.compile(
    r"(^|\.)(rope\.freqs|freqs_cis|freq_cis|_extra_state|global_gate_stats_3E"
    r"|running_gate_stats_3E|expert_activation_DE|vision_adapter\.fc\.weight)$"
)


def dropped(name: str) -> bool:
    """Whether a stored name is known and carries no weight of the model."""
    return _DROPPED.search(name) is not None


def rows(config: ModelConfig, *, plain: bool) -> dict[str, Row]:
    """Stored name -> row for a whole model: with `plain` every readable name, else those written."""
    found: dict[str, Row] = {}
    prefix = "language_model." if config.vision else ""
    for row in _COMMON + _FUSED + (_PLAIN if plain else ()):
        if "{l}" not in row.stored:
            found[row.stored] = replace(row, parts=tuple(prefix + part for part in row.parts))
            continue
        for layer in range(config.text.num_hidden_layers):
            if row.layers in ("", "moe" if config.text.is_moe(layer) else "dense"):
                parts = tuple(prefix + part.replace("{l}", str(layer)) for part in row.parts)
                stored = row.stored.replace("{l}", str(layer))
                found[stored] = replace(row, stored=stored, parts=parts)
    for row in _TILES if config.vision else ():
        count = config.vision.num_hidden_layers if config.vision and "{i}" in row.stored else 1
        for layer in range(count):
            stored = row.stored.replace("{i}", str(layer))
            part = row.parts[0].replace("{i}", str(layer))
            found[stored] = replace(row, stored=stored, parts=(part,))
    return found


def block(part: Tensor, row: Row, rank: int, ranks: int) -> Tensor:
    """The view of one parameter that file `rank` of `ranks` holds, in Meta's orientation."""
    if row.half is not None:
        part = part.chunk(2, -1)[row.half]
    if row.transposed:
        part = part.T
    if row.cut is None:
        return part
    size = part.shape[row.cut] // ranks
    return part.narrow(row.cut, rank * size, size)


def pack(parts: list[Tensor], row: Row, rank: int, ranks: int) -> Tensor:
    """The stored tensor of file `rank` (new memory), from whole parameters."""
    blocks = [block(part, row, rank, ranks) for part in parts]
    stored = torch.cat(blocks, row.cut or 0)
    return stored.flatten(0, 1) if row.flat else stored


def stored_shape(shapes: list[tuple[int, ...]], row: Row, ranks: int) -> tuple[int, ...]:
    """Shape of one file's tensor for parameters of these shapes."""
    parts = [torch.empty(shape, device="meta") for shape in shapes]
    return tuple(pack(parts, row, 0, ranks).shape)


def piece(
    stored: Tensor, row: Row, shapes: list[tuple[int, ...]], which: int, ranks: int
) -> Tensor:
    """The view of one file's tensor that belongs to part `which`: what its `block` must become.

    `shapes` are those of the row's whole parameters, in order.
    """
    if row.flat:
        stored = stored.unflatten(0, (shapes[0][0], -1))
    if len(row.parts) == 1 or row.cut is None:
        return stored
    return stored.split([shape[row.cut] // ranks for shape in shapes], row.cut)[which]
