"""A toy multimodal model with weights large enough that the likeliest token is clear."""

from collections.abc import Callable

import pytest

from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer

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
def make_lm(tok: Tokenizer, toy_lm: Callable[..., LM]) -> Callable[..., LM]:
    """make_lm(vision=True, **text fields): nano with chunks of 8 positions, nothing near zero."""

    def make(vision: bool = True, **fields) -> LM:
        small = dict(attention_chunk_size=8, floor_scale=4, max_position_embeddings=256)
        return toy_lm(tok, vision, seed=3, std=0.12, **{**small, **fields})

    return make


@pytest.fixture(scope="session", params=VARIANTS)
def lm(request, make_lm) -> LM:
    return make_lm(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def plain_lm(make_lm) -> LM:
    """Scout-like."""
    return make_lm()
