"""Initial weights of a new model, a pure function of config, parameter name and seed."""

import zlib

import torch
from torch import Tensor

from herdling.model.llama import LanguageModel


@torch.no_grad()
def initialize(model: LanguageModel, seed: int = 0, std: float | None = None) -> LanguageModel:
    """Fill every parameter in place and return the model.

    Matrices: normal with `std` (default: the config's `initializer_range`). Experts' gate_up: twice
    that, which undoes what the sigmoid gate of 1/2 on their input takes away at the start (SwiGLU is
    about quadratic near 0, so the routed part would begin at a quarter of the shared expert's).
    Output matrices of decoder blocks: divided by sqrt(2 * layers), so that the residual stream keeps
    its scale. Vision encoder and projector: 1/sqrt(inputs) each, so that features of different
    pictures differ from the first step on (with `std` everywhere a toy model needs some three times
    as many pictures before it begins to read them, docs/log.md). Norms 1, biases 0; vision class
    token and positions 1/sqrt(width) as in transformers.
    """
    text = model.config.text
    sigma = text.initializer_range if std is None else std
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        if parameter.dim() == 1 and not name.endswith("class_embedding"):
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if name.endswith(("class_embedding", "positional_embedding_vlm")):
            scale = parameter.shape[-1] ** -0.5
        elif "vision_model." in name or "multi_modal_projector." in name:
            scale = parameter.shape[1] ** -0.5
        elif name.endswith("gate_up_proj"):
            scale = 2 * sigma
        elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            scale = sigma / (2 * text.num_hidden_layers) ** 0.5
        else:
            scale = sigma
        parameter.copy_(_normal(parameter, scale, generator))
    return model


def _normal(like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).mul_(scale).to(like.device, like.dtype)
