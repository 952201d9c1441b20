"""A nano model folder with random weights, for those who only need something that answers.

    python tests/clients/nano.py FOLDER          # with Herdling's own Python

Text and pictures, 4096 positions. Its greedy replies never hold a control token, so they run to
their limit; what a reply must look like is up to the grammar of the call.
"""

import sys
from dataclasses import replace

import torch

import herdling
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build, decoder_of

TEXT = (
    "the quick brown fox jumps over the lazy dog, and then the dog sleeps. "
    'numbers 1 2 3 and signs (), = # [weather(city="Oslo")] {"name": "x", "parameters": {}}'
)


def make() -> LM:
    tok = Tokenizer.train([TEXT] * 4, 330)
    config = preset("nano", vision=True, vocab_size=len(tok), max_position_embeddings=4096)
    config = replace(
        config,
        image_token_index=tok.patch,
        boi_token_index=tok.special("<|image_start|>"),
        eoi_token_index=tok.special("<|image_end|>"),
    )
    # Weights large enough that the likeliest token is clear; control tokens get a logit of 0.
    model = initialize(build(config), seed=3, std=0.12).eval()
    with torch.no_grad():
        decoder_of(model).lm_head.weight[list(tok.specials.values())] = 0
    return LM(model, tok)


if __name__ == "__main__":
    herdling.save(make(), sys.argv[1])
