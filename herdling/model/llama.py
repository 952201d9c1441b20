"""The Llama 4 decoder, top to bottom: norm, positions, attention, experts, block, whole model.

Numerically Meta's model (spec: `docs/model.md`); parameter names are transformers', so a state dict
here is a model folder there. Left out on purpose: dropout, biases, weight tying (Llama 4 has none),
and everything that alters a model (LoRA, quantization, sharding, precision), which acts from outside.

Shape letters: B rows, T tokens, D model width, H query heads, KV key-value heads, d head width,
N = B * T tokens, E experts, k experts a token, F expert width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdling.errors import InputError
from herdling.kernels.attention import attend, attend_causal, attend_chunked
from herdling.kernels.grouped_matmul import routed_experts
from herdling.kernels.reference import visible
from herdling.kernels.rope import rotate
from herdling.kernels.segments import Segments, attend_segments, find_segments
from herdling.model.cache import Cache, LayerCache
from herdling.model.config import ModelConfig, TextConfig
from herdling.model.vision import Projector, VisionModel

Readout = Callable[[Tensor, nn.Linear], Tensor]
"""(hidden (B, T, D), lm_head) -> whatever the caller wants instead of logits."""


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, statistics in float32, result in x's type."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a gain; cast back *before* the gain, as both reference codes do."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight


@lru_cache(maxsize=64)
def rope_frequencies(config: TextConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head, float32 (d / 2,).

    With scaling, wavelengths above original/low are divided by `factor`, those below original/high
    are kept, and a band between is interpolated (Meta `llama4/model.py`; empty for low = high = 1).
    """
    with torch.inference_mode(False):
        pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
        frequency = 1.0 / config.rope_theta ** (pairs / config.head_dim)
        scaling = config.rope_scaling
        if scaling is None:
            return frequency
        old, low, high = (
            scaling.original_max_position_embeddings,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
        )
        wavelength = 2 * math.pi / frequency
        scaled = torch.where(wavelength > old / low, frequency / scaling.factor, frequency)
        if low == high:
            return scaled
        smooth = (old / wavelength - low) / (high - low)
        between = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        middle = (wavelength <= old / low) & (wavelength >= old / high)
        return torch.where(middle, between, scaled)


class Places:
    """Positions of one call's tokens: the single source for RoPE, chunks and temperature.

    A subclass says which keys each token sees (`attend`); the model knows no more of batches than that.
    """

    def __init__(self, config: TextConfig, at: Tensor) -> None:
        """`at` (B or 1, T) int64: positions from 0 within a document."""
        self.chunk = config.attention_chunk_size
        angles = at[..., None].float() * rope_frequencies(config, at.device)
        self.cos, self.sin = angles.cos(), angles.sin()  # (B or 1, T, d / 2)
        self.temperature = None
        if config.attn_temperature_tuning:
            floor = torch.floor((at.float() + 1) / config.floor_scale)
            self.temperature = (1 + config.attn_scale * torch.log1p(floor))[..., None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, local: bool, cache: Any) -> Tensor:
        """q (B, T, H, d), k and v (B, T, KV, d) of the new tokens -> (B, T, H, d).

        `cache` is the layer's own store of earlier keys and values, if there is one.
        """
        raise NotImplementedError


class Layout(Places):
    """Rows of equal length. A token sees only its own document.

    Plain rows (one document each, from the cache's length on) need no mask. Otherwise positions and
    document ids (B, T) decide everything, so padding and packing never change a result: by a mask, or by
    taking rows apart where documents are runs of tokens.
    """

    def __init__(
        self,
        config: TextConfig,
        x: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: Cache | None,
    ) -> None:
        B, T, device = x.shape[0], x.shape[1], x.device
        start = cache.length if cache else 0
        self.masks: dict[bool, Tensor] = {}
        """By `local`: who sees whom, (B, T, keys)."""
        self.segments: dict[bool, Segments] = {}
        """By `local`: who sees whom, where that takes no mask."""
        self.plain = (
            positions is None and documents is None and (not cache or cache.positions is None)
        )
        at = torch.arange(start, start + T, device=device)[None] if positions is None else positions
        if (positions is None) != (documents is None):
            raise InputError(
                f"{'documents' if positions is None else 'positions'} given alone; positions and "
                "documents describe packing and padding only together"
            )
        if not self.plain:
            at = at.expand(B, T)
        super().__init__(config, at)
        if not self.plain:
            documents = torch.zeros_like(at) if documents is None else documents.expand(B, T)
            if not cache and self._segmented(at, documents):
                return
            keys, key_documents, first = at, documents, 0
            if cache:
                keys, key_documents = cache.record(at, documents)
                first = cache.local_start
            self.masks = {
                False: visible(at, documents, keys, key_documents, None),
                True: visible(at, documents, keys[:, first:], key_documents[:, first:], self.chunk),
            }

    def _segmented(self, at: Tensor, documents: Tensor) -> bool:
        """Find `segments`; only on a CPU, where a mask costs its whole area and lengths are at hand."""
        if at.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        whole = find_segments(at, documents, None)
        if whole is None:
            return False
        local = None if self.chunk is None else find_segments(at, documents, self.chunk)
        self.segments = {False: whole, True: local or whole}
        return True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, local: bool, cache: LayerCache | None
    ) -> Tensor:
        if cache is not None:
            k, v = cache.extend(k, v)
        if self.segments:
            return attend_segments(q, k, v, self.segments[local])
        if not self.plain:
            return attend(q, k, v, self.masks[local])
        if local and self.chunk is not None:
            return attend_chunked(q, k, v, self.chunk)
        return attend_causal(q, k, v)


class Attention(nn.Module):
    """Grouped-query attention: local layers with RoPE, or global ones without position encoding."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        self.head_dim, self.eps = d, config.rms_norm_eps
        self.local = config.is_local(layer)
        self.qk_norm = config.use_qk_norm and self.local
        self.q_proj = nn.Linear(D, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, D, bias=False)

    def forward(self, x: Tensor, at: Places, cache: Any) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        if self.local:
            q, k = rotate(q, at.cos, at.sin), rotate(k, at.cos, at.sin)
            if self.qk_norm:  # no gain, per head, after RoPE, with the model's eps
                q, k = rms_norm(q, self.eps), rms_norm(k, self.eps)
        elif at.temperature is not None:
            q = (q * at.temperature).to(q.dtype)
        out = at.attend(q, k, v, self.local, cache)
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Dense layers and the shared expert."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Linear):
    """Chooses k experts a token by raw logits; the gate is the sigmoid of the chosen logit."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.hidden_size, config.num_local_experts, bias=False)
        self.top_k = config.num_experts_per_tok

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (N, D) -> chosen experts (N, k), their gates (N, k), all logits (N, E)."""
        return self.choose(super().forward(x), x.dtype)

    def choose(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same from logits (N, E); gates are of type `dtype`."""
        # topk also for one: where two logits are equal, as some are in bf16, it chooses what the
        # reference codes choose; max would not.
        top, chosen = logits.topk(self.top_k, dim=-1)
        return chosen, torch.sigmoid(top.float()).to(dtype), logits


class Experts(nn.Module):
    """All routed experts of a layer in two fused tensors, [expert, in, out] as transformers has them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, D, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * inner))  # gate, then up
        self.down_proj = nn.Parameter(torch.empty(E, inner, D))

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        return routed_experts(x, chosen, gates, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """The shared expert on every token plus the chosen routed experts on gate-scaled input."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # (N, D)
        chosen, gates, _ = self.router(flat)
        return self.shared_expert(x) + self.experts(flat, chosen, gates).view_as(x)


class Block(nn.Module):
    """x + attention(norm(x)), then + feed-forward(norm(.))."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = (
            MoE(config)
            if config.is_moe(layer)
            else MLP(config.hidden_size, config.intermediate_size_mlp)
        )

    def forward(self, x: Tensor, at: Places, cache: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), at, cache)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor | None, documents: Tensor | None, cache: Cache | None
    ) -> Tensor:
        at = Layout(self.config, x, positions, documents, cache)
        x = self.blocks(x, at, cache.layers if cache else None)
        if cache:
            cache.advance(x.shape[1])
        return self.norm(x)

    def blocks(self, x: Tensor, at: Places, caches: Sequence[Any] | None) -> Tensor:
        """All layers over tokens that stand where `at` says; `caches` holds one store a layer."""
        for i, layer in enumerate(self.layers):
            x = layer(x, at, caches[i] if caches else None)
        return x


class TextLM(nn.Module):
    """The decoder with its output head: transformers' `Llama4ForCausalLM`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        readout: Readout | None = None,
    ) -> Tensor:
        """input_ids (B, T) -> logits (B, T, V) in float32, or what `readout` makes of hidden states.

        positions (B, T) count from 0 within a document (default: on from the cache); documents
        (B, T) are ids: tokens of different ids never see each other, negative ids are padding. Both
        are given, or neither. With a cache padding stands at the left (InputError otherwise).
        """
        if pixel_values is not None:
            raise InputError("pixel_values given to a text-only model; open a folder with vision")
        return self.decode(self.model.embed_tokens(input_ids), positions, documents, cache, readout)

    def decode(
        self,
        embeddings: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: Cache | None,
        readout: Readout | None,
    ) -> Tensor:
        """The same from embeddings (B, T, D) on."""
        hidden = self.model(embeddings, positions, documents, cache)
        return self.lm_head(hidden).float() if readout is None else readout(hidden, self.lm_head)


class MultimodalLM(nn.Module):
    """Early fusion of image tiles and text: transformers' `Llama4ForConditionalGeneration`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vision is not None
        self.config = config
        self.vision_model = VisionModel(config.vision)
        self.multi_modal_projector = Projector(config.vision, config.text.hidden_size)
        self.language_model = TextLM(config)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        readout: Readout | None = None,
    ) -> Tensor:
        """As `TextLM.forward`; pixel_values (tiles, 3, S, S) fill the patch tokens in batch order.

        Raises InputError when tiles and patch tokens do not match in number.
        """
        x = self.language_model.model.embed_tokens(input_ids)
        if pixel_values is not None:
            x = self.fuse(x, input_ids, pixel_values)
        return self.language_model.decode(x, positions, documents, cache, readout)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Image features in the decoder's width: (tiles, 3, S, S) -> (tiles, tokens a tile, D)."""
        return self.multi_modal_projector(self.vision_model(pixel_values))

    def fuse(self, x: Tensor, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Put projected image features in place of the embeddings of patch tokens."""
        features = self.encode(pixel_values)
        slots = input_ids == self.config.image_token_index
        if int(slots.sum()) != features.shape[0] * features.shape[1]:
            raise InputError(
                f"{int(slots.sum())} patch tokens for {features.shape[0]} tiles of "
                f"{features.shape[1]} tokens; each tile needs exactly its own"
            )
        return x.masked_scatter(slots[..., None], features.to(x.dtype))


LanguageModel = TextLM | MultimodalLM


def build(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """The model of a config with uninitialised weights: load them, or call `init.initialize`.

    No buffer is needed beside the parameters, so a model built on "meta" is whole once each
    parameter has been replaced.
    """
    with torch.device("meta"):
        model = TextLM(config) if config.vision is None else MultimodalLM(config)
    return model.to(dtype).to_empty(device=device) if str(device) != "meta" else model.to(dtype)


def decoder_of(model: LanguageModel) -> TextLM:
    """The text model inside either kind."""
    return model if isinstance(model, TextLM) else model.language_model
