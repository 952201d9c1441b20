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
    Output matrices of blocks: divided by sqrt(2 * layers), so that the residual stream keeps its scale.
    Norms 1, biases 0; vision class token and positions 1/sqrt(width) as in transformers.
    """
    text, vision = model.config.text, model.config.vision
    sigma = text.initializer_range if std is None else std
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        in_vision = "vision_model" in name
        if parameter.dim() == 1 and not name.endswith("class_embedding"):
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scale = sigma
        if in_vision and name.endswith(("class_embedding", "positional_embedding_vlm")):
            assert vision is not None
            scale = vision.hidden_size**-0.5
        elif name.endswith("gate_up_proj"):
            scale = 2 * sigma
        elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj", "mlp.fc2.weight")):
            depth = vision.num_hidden_layers if in_vision and vision else text.num_hidden_layers
            if "vision_adapter" not in name:
                scale = sigma / (2 * depth) ** 0.5
        parameter.copy_(_normal(parameter, scale, generator))
    return model


def _normal(like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).mul_(scale).to(like.device, like.dtype)
