"""A toy multimodal model with weights large enough that the likeliest token is clear."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build, decoder_of

VARIANTS = {
    "scout": {},
    "maverick": dict(interleave_moe_layer_step=2, use_qk_norm=False),
    "top2": dict(num_experts_per_tok=2),
}


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    text = "the quick brown fox jumps over the lazy dog, and then the dog sleeps. " * 4
    return Tokenizer.train([text, "numbers 1 2 3 and signs (), = #"], 320)


@pytest.fixture(scope="session")
def make_lm(tok: Tokenizer) -> Callable[..., LM]:
    """make_lm(vision=True, **text fields): nano with chunks of 8 positions, nothing near zero."""

    def make(vision: bool = True, **fields) -> LM:
        small = dict(attention_chunk_size=8, floor_scale=4, max_position_embeddings=256)
        config = preset("nano", vision=vision, vocab_size=len(tok), **{**small, **fields})
        if vision:
            config = replace(
                config,
                image_token_index=tok.patch,
                boi_token_index=tok.special("<|image_start|>"),
                eoi_token_index=tok.special("<|image_end|>"),
            )
        model = initialize(build(config), seed=3, std=0.12).eval()
        # Greedy replies stay free of control tokens: their logits are 0, far below the largest.
        with torch.no_grad():
            decoder_of(model).lm_head.weight[list(tok.specials.values())] = 0
        return LM(model, tok)

    return make


@pytest.fixture(scope="session", params=VARIANTS)
def lm(request, make_lm) -> LM:
    return make_lm(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def plain_lm(make_lm) -> LM:
    """Scout-like."""
    return make_lm()
