"""Toy models and configs for the checkpoint tests."""

from dataclasses import replace

import pytest
import torch

from herdling.model.config import ModelConfig, preset
from herdling.model.llama import LanguageModel, build


@pytest.fixture(params=["scout", "maverick", "scout-text", "maverick-text"])
def toy(request) -> ModelConfig:
    """Scout-like (all MoE) or Maverick-like (every other layer, no QK norm), with or without vision."""
    kind, _, text = request.param.partition("-")
    changes = dict(interleave_moe_layer_step=2, use_qk_norm=False) if kind == "maverick" else {}
    config = preset("nano", vision=not text, vocab_size=320, **changes)
    if text:
        return config  # a text folder has no image ids to keep
    return replace(config, image_token_index=319, boi_token_index=317, eoi_token_index=318)


@pytest.fixture
def random_model():
    """A function: config -> model with every parameter random and non-zero, norms near one."""

    def make(config: ModelConfig, seed: int = 0) -> LanguageModel:
        generator = torch.Generator().manual_seed(seed)
        model = build(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                gain = "norm" in name and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if gain else 0.1 * noise)
        return model

    return make
