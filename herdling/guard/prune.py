"""A mixture of experts made dense: routers and routed experts go, each shared expert becomes the layer.

    prune("runs/demo/model", "runs/dense")      # one shard in memory at a time

Llama Guard 4 began as Scout pruned so, and was then tuned (meta-llama/PurpleLlama
`Llama-Guard4/12B/MODEL_CARD.md`); the same folder serves as a draft for speculation. What the experts knew
is lost until the model is tuned again. Where dense layers stand between the mixtures, as in Maverick, the
narrower feed-forwards are widened with zeros, since a config knows one width for all: the same function.

Shape letters: D model width, F width of a feed-forward.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from herdling.checkpoint.card import Card
from herdling.checkpoint.folder import Folder
from herdling.checkpoint.save import ShardWriter, check_target, copy_inputs, save_config
from herdling.checkpoint.source import on_hub
from herdling.errors import ConfigError
from herdling.files import atomic_folder
from herdling.model import weights
from herdling.model.config import ModelConfig

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
              "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
              "generation_config.json", "LICENSE", "LICENSE.txt")  # fmt: skip


def dense(config: ModelConfig) -> ModelConfig:
    """The config without routed experts. Raises ConfigError for one that has none."""
    text = config.text
    if not text.moe_layers:
        raise ConfigError("the model has no MoE layers; there is nothing to prune")
    mixed = len(text.moe_layers) < text.num_hidden_layers
    width = max(text.intermediate_size, text.intermediate_size_mlp if mixed else 0)
    return replace(
        config,
        text=replace(
            text,
            moe_layers=(),
            interleave_moe_layer_step=0,
            num_local_experts=0,
            num_experts_per_tok=0,
            intermediate_size_mlp=width,
        ),
    )


def pruned(
    name: str, shape: tuple[int, ...], read: Callable[[str], Tensor], names: dict[str, tuple]
) -> Tensor:
    """One parameter of the dense model, of the given shape, from those of the mixture."""
    shared = name.replace(".feed_forward.", ".feed_forward.shared_expert.")
    tensor = read(shared if shared in names else name)
    if tuple(tensor.shape) == shape:
        return tensor
    wide = torch.zeros(shape, dtype=tensor.dtype)  # gate, up (F, D) or down (D, F)
    wide[: tensor.shape[0], : tensor.shape[1]] = tensor
    return wide


def prune(path: str | Path, out: Path) -> ModelConfig:
    """Write the dense folder to `out`; returns its config. Raises ConfigError or CheckpointError."""
    check_target(out, None if on_hub(str(path)) else path)
    source = Folder.open(path)
    config, names = dense(source.config), weights.shapes(source.config)
    card = Card.open(source.path, source.config).after(
        "prune", name=out.resolve().name, source=str(path), note="shared experts only, dense",
        hub=(str(path),) if on_hub(str(path)) else (),
    )  # fmt: skip
    with atomic_folder(out) as temporary:
        writer = ShardWriter(temporary)
        for name, shape in weights.shapes(config).items():
            writer.add(name, pruned(name, shape, source.read, names))
        writer.close()
        save_config(temporary, config, source.dtype)
        card.save(temporary, config)
        copy_inputs(source.path, temporary, SIDE_FILES)
        Folder.open(temporary)
    return config
