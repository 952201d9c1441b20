"""The optimizer's settings, apart from its code: `--help` shows them without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from herdling.errors import ConfigError


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
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be above 0, and finite"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}; each must be in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"weight_decay is {self.weight_decay}; it must be 0 or more, and finite"
            )
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
