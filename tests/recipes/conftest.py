"""Model folders to start a stage from, made by the real pretraining."""

from collections.abc import Callable
from pathlib import Path

import pytest

from herdling.data import embedded
from herdling.inputs.tokenizer import Tokenizer
from herdling.recipes import pretrain


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer of 512 tokens."""
    folder = tmp_path_factory.mktemp("tok")
    Tokenizer.train(embedded.texts(limit=200_000), 512, "compact").save(folder)
    return folder


@pytest.fixture(scope="session")
def pretrained(tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """pretrained(vision=True): the folder of a nano model after two steps; not to be written to."""
    made: dict[bool, Path] = {}

    def make(vision: bool = True) -> Path:
        if vision not in made:
            out = tmp_path_factory.mktemp("pretrained")
            config = pretrain.Config(
                model="nano", vision=vision, tokenizer=tokenizer, out=out, steps=2, rows=2, length=128,
                data="english:1,picture/number:1" if vision else "english",
            )  # fmt: skip
            assert pretrain.main(config) == 0
            made[vision] = out / "model"
        return made[vision]

    return make
