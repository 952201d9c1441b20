"""A toy model that sees pictures of 32 pixels, and its tokenizer."""

from collections.abc import Callable
from functools import partial

import pytest

from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train(["how many shapes are there? which number is in the picture? " * 4], 320)


@pytest.fixture(scope="session")
def make_lm(tok: Tokenizer, toy_lm: Callable[..., LM]) -> Callable[..., LM]:
    return partial(toy_lm, tok)


@pytest.fixture(scope="session")
def lm(make_lm) -> LM:
    return make_lm()
