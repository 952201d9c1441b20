"""Shared toys: tiny random Llama 4 models in transformers, the oracle of every parity test."""

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration

from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import ModelConfig, preset
from herdling.model.init import initialize
from herdling.model.llama import LanguageModel, build, decoder_of

transformers.logging.set_verbosity_error()
# A shell starts background jobs with Ctrl-C ignored, and children inherit that; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB, BOI, EOI, PATCH = 320, 317, 318, 319
TILE, TOKENS_PER_TILE = 56, 4  # 4 x 4 patches of 14 pixels, folded 2 x 2
CHUNK = 8
SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,  # small, so that some pairs are scaled, some are not
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
TEXT = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, intermediate_size_mlp=192,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1, use_qk_norm=True,
    no_rope_layer_interval=4, attention_chunk_size=CHUNK, attn_temperature_tuning=True,
    floor_scale=4, attn_scale=0.1, rms_norm_eps=1e-5, rope_parameters=SCOUT_ROPE,
    max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MAVERICK = dict(interleave_moe_layer_step=2, use_qk_norm=False, rope_parameters=PLAIN_ROPE)
VISION = dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    image_size=TILE, patch_size=14, pixel_shuffle_ratio=0.5, projector_input_dim=48,
    projector_output_dim=48, vision_output_dim=48,
)  # fmt: skip

Pair = tuple[torch.nn.Module, LanguageModel]


def make_reference(vision: bool = True, seed: int = 0, **text) -> torch.nn.Module:
    """A transformers model with weights large enough that routing, norms and masks matter."""
    torch.manual_seed(seed)
    values = {**TEXT, **text}
    if vision:
        config = Llama4Config(
            text_config=values,
            vision_config=VISION,
            boi_token_index=BOI,
            eoi_token_index=EOI,
            image_token_index=PATCH,
        )
        model = Llama4ForConditionalGeneration(config)
    else:
        model = Llama4ForCausalLM(transformers.Llama4TextConfig(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if gain else 0.12 * noise)
    return model.eval()


def ours_from(reference: torch.nn.Module) -> LanguageModel:
    model = build(ModelConfig.from_hf(reference.config.to_dict()))
    model.load_state_dict(reference.state_dict(), strict=True)
    return model.eval()


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    """make_pair(vision=True, **text fields) -> (transformers model, ours with the same weights)."""

    def make(vision: bool = True, **text) -> Pair:
        reference = make_reference(vision, **text)
        return reference, ours_from(reference)

    return make


@pytest.fixture(scope="session")
def image_batch() -> Callable[[list[list[int]], int], tuple[torch.Tensor, torch.Tensor]]:
    """image_batch(tiles per image, per row; length) -> input_ids (B, T), pixel_values (N, 3, S, S)."""

    def make(rows: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(3, BOI, (len(rows), length), generator=generator)
        for r, images in enumerate(rows):
            at = 2
            for tiles in images:
                ids[r, at] = BOI
                at += 1
                for _ in range(tiles):
                    ids[r, at : at + TOKENS_PER_TILE] = PATCH
                    at += TOKENS_PER_TILE + 1  # an ordinary token stands between tiles
                ids[r, at] = EOI
                at += 2
            assert at <= length, "the toy sequence is too short for its images"
        total = sum(sum(images) for images in rows)
        return ids, torch.randn(total, 3, TILE, TILE, generator=generator)

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LanguageModel]:
    """make_model(vision=False, **text fields): nano, half of its layers with experts."""

    def make(vision: bool = False, seed: int = 3, **fields) -> LanguageModel:
        small = dict(attention_chunk_size=8, floor_scale=4, interleave_moe_layer_step=2)
        config = preset("nano", vision=vision, vocab_size=320, **{**small, **fields})
        if vision:
            config = replace(config, image_token_index=319)
        return initialize(build(config), seed=seed, std=0.12).eval()

    return make


@pytest.fixture(scope="session")
def toy_lm() -> Callable[..., LM]:
    """toy_lm(tok, vision=True, seed=0, std=0.1, mute=True, **text fields): nano with that tokenizer.

    `mute`: logits of control tokens are 0, far below the largest, so greedy replies hold none and none
    ends early.
    """

    def make(
        tok: Tokenizer,
        vision: bool = True,
        seed: int = 0,
        std: float = 0.1,
        mute: bool = True,
        **fields,
    ) -> LM:
        config = preset("nano", vision=vision, vocab_size=len(tok), **fields)
        if vision:
            config = replace(
                config,
                image_token_index=tok.patch,
                boi_token_index=tok.special("<|image_start|>"),
                eoi_token_index=tok.special("<|image_end|>"),
            )
        model = initialize(build(config), seed=seed, std=std).eval()
        if mute:
            with torch.no_grad():
                decoder_of(model).lm_head.weight[list(tok.specials.values())] = 0
        return LM(model, tok)

    return make
