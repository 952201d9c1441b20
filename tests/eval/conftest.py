"""A toy model that sees pictures of 32 pixels, and its tokenizer."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build, decoder_of


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train(["how many shapes are there? which number is in the picture? " * 4], 320)


@pytest.fixture(scope="session")
def make_lm(tok: Tokenizer) -> Callable[..., LM]:
    def make(vision: bool = True, **fields) -> LM:
        config = preset("nano", vision=vision, vocab_size=len(tok), **fields)
        if vision:
            config = replace(config, image_token_index=tok.patch)
        model = initialize(build(config), std=0.1).eval()
        with (
            torch.no_grad()
        ):  # logits of 0: greedy replies hold no control token, so none ends early
            decoder_of(model).lm_head.weight[list(tok.specials.values())] = 0
        return LM(model, tok)

    return make


@pytest.fixture(scope="session")
def lm(make_lm) -> LM:
    return make_lm()
