"""A toy model folder with random weights, and a reader of GGUF files that owes nothing to ours."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from herdling.checkpoint import Card, Folder, save_model
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.llama import LanguageModel, build

TEXTS = ["the quick brown fox jumps over the lazy dog, 123 times a day"] * 9


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture(scope="session")
def make(tok, tmp_path_factory):
    """make(vision=..., **text): a saved folder of random weights -> (model, folder)."""

    def made(*, vision: bool = False, card: Card | None = None, **text: Any) -> tuple[LanguageModel, Folder]:  # fmt: skip
        config = preset("nano", vision=vision, **{"vocab_size": len(tok) + 4, **text})
        if vision:
            ids = {name: tok.special(f"<|{word}|>") for name, word in TOKENS.items()}
            config = replace(config, **ids)
        model = build(config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(1 + noise if "norm" in name and parameter.dim() == 1 else noise)
        path = tmp_path_factory.mktemp("made") / "toy"
        save_model(model, config, path, tok, card=card or Card("toy", license="mit"))
        return model, Folder.open(path)

    return made


TOKENS = {"image_token_index": "patch", "boi_token_index": "image_start", "eoi_token_index": "image_end"}  # fmt: skip


class Read:
    """Fields and tensors of a file, the tensors as floats in torch's order of axes."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.kinds = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
        self.bytes = {t.name: np.asarray(t.data) for t in reader.tensors}
        self.tensors = {
            t.name: torch.from_numpy(
                gguf.quants.dequantize(t.data, t.tensor_type)
                .reshape(tuple(reversed(t.shape.tolist())))
                .astype(np.float32)
            )
            for t in reader.tensors
        }


@pytest.fixture
def read():
    return Read
