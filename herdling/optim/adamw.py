"""AdamW (torch's own, or with 8-bit averages) with its parameters sorted into groups: what decays, and at which rate.

Matrices decay. Norm gains and other vectors, and embeddings, do not unless asked. A rate rule
`PATTERN=FACTOR` multiplies the learning rate of the parameters whose name matches; torch multiplies
the decay by the learning rate, so it scales along.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from herdling.errors import ConfigError
from herdling.optim.adamw_8bit import AdamW8bit


@dataclass(frozen=True)
class AdamWConfig:
    """How the weights move."""

    learning_rate: float = 1e-3
    """The peak; the schedule gives each step its share."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How slowly the averages of the gradient and of its square forget."""
    eps: float = 1e-8
    """Added to the root of the second average."""
    weight_decay: float = 0.1
    """Decoupled decay, times the learning rate a step."""
    decay_vectors: bool = False
    """Whether norm gains and other one-dimensional parameters decay too."""
    decay_embeddings: bool = False
    """Whether token, class and position embeddings decay too."""
    rates: tuple[str, ...] = ()
    """Rules PATTERN=FACTOR on parameter names, such as '*router*=0.5'; the last match counts."""
    implementation: Literal["auto", "fused", "foreach", "loop"] = "auto"
    """Which of torch's codes runs the update; auto takes fused where the device has it."""
    state_bits: Literal[32, 8] = 32
    """Bits of each of the two averages a parameter: 8 takes 2 bytes a parameter in place of 8."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}; each must be in [0, 1)")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        if self.state_bits == 8 and self.implementation != "auto":
            raise ConfigError(
                f"state_bits is 8 and implementation {self.implementation}; remedy: implementation "
                "auto, as 8-bit averages have one code"
            )
        self.rules()

    def rules(self) -> list[tuple[str, float]]:
        """`rates` as (pattern, factor)."""
        rules = []
        for rule in self.rates:
            pattern, equals, factor = rule.rpartition("=")
            try:
                rules.append((pattern, float(factor)))
            except ValueError:
                equals = ""
            if not equals or not pattern or rules[-1][1] < 0:
                raise ConfigError(f"rates: {rule!r} is not PATTERN=FACTOR; example: '*router*=0.5'")
        return rules


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
