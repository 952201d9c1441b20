"""AdamW (torch's own, or with 8-bit averages) with its parameters sorted into groups: what decays, and at which rate.

Matrices decay. Norm gains and other vectors, and embeddings, do not unless asked. A rate rule
`PATTERN=FACTOR` multiplies the learning rate of the parameters whose name matches; torch multiplies
the decay by the learning rate, so it scales along.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from herdling.errors import ConfigError
from herdling.optim.adamw_8bit import AdamW8bit
from herdling.optim.config import AdamWConfig


def build(model: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of `model` that require a gradient."""
    groups = groups_of(model, config)
    if not groups:
        raise ConfigError(
            "no parameter of the model requires a gradient; there is nothing to train"
        )
    if config.state_bits == 8:
        return AdamW8bit(groups, config.learning_rate, config.betas, config.eps)
    devices = {p.device.type for group in groups for p in group["params"]}
    chosen = config.implementation
    if chosen == "auto":
        chosen = "fused" if devices <= {"cpu", "cuda"} else "foreach"
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=chosen == "fused",
        foreach=chosen == "foreach",
    )


def groups_of(model: nn.Module, config: AdamWConfig) -> list[dict[str, Any]]:
    """Parameter groups by (decays, rate factor), in the order of the model.

    Raises ConfigError for a rate rule that matches no trainable parameter.
    """
    embeddings = set(_embeddings(model))
    rules = config.rules()
    used: set[str] = set()
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matches = [(pattern, factor) for pattern, factor in rules if fnmatchcase(name, pattern)]
        used.update(pattern for pattern, _ in matches)
        if name in embeddings:
            decays = config.decay_embeddings
        else:
            decays = parameter.ndim > 1 or config.decay_vectors
        groups.setdefault((decays, matches[-1][1] if matches else 1.0), []).append(parameter)
    for pattern, _ in rules:
        if pattern not in used:
            raise ConfigError(
                f"rates: {pattern!r} matches no trainable parameter; remedy: patterns are over whole "
                "names, as in '*.router.weight'"
            )
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * factor,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (decays, factor), parameters in groups.items()
    ]


def _embeddings(model: nn.Module) -> Iterator[str]:
    """Names of parameters that are looked up or added rather than multiplied."""
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or "embedding" in name:
                yield f"{prefix}.{name}" if prefix else name
