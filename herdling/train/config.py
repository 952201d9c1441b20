"""The settings of parts of training, apart from their code: `--help` shows them without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from herdling.errors import ConfigError

GradientBits = Literal[32, 8, 4]


@dataclass(frozen=True)
class RoutingConfig:
    """How experts are kept busy, and watched."""

    balance: float = 0.01
    """Coefficient of the load-balancing term; 0 leaves it out (loads are still measured)."""
    window: int = 50
    """Optimizer steps over which an expert without a token counts as dead."""

    def __post_init__(self) -> None:
        if not 0 <= self.balance < math.inf:
            raise ConfigError(
                f"routing.balance is {self.balance}; it must be 0 or more, and finite"
            )
        if self.window < 1:
            raise ConfigError(f"routing.window is {self.window}; it must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and what is kept."""

    every: int = 500
    """Steps between checkpoints; the end of the run is always saved."""
    keep: int = 2
    """How many of the latest checkpoints stay."""
    permanent: int = 0
    """Checkpoints at multiples of this many steps stay for ever; 0: none."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1), ("permanent", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"checkpoint.{name} is {getattr(self, name)}; it must be at least {least}"
                )


PreferenceKind = Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard",
               "apo_zero", "apo_down", "simpo", "orpo"]  # fmt: skip
REFERENCE_FREE = ("simpo", "orpo")
AVERAGED = ("ipo", "simpo", "orpo")
"""Losses that are defined on log-probabilities per token."""


@dataclass(frozen=True)
class PreferenceConfig:
    """How an answer is preferred to another."""

    loss: PreferenceKind = "sigmoid"
    """sigmoid is DPO; the others are its published variants (docs/dpo.md). simpo and orpo need no
    reference."""
    beta: float = 0.1
    """How closely the model is held to the reference: larger is closer."""
    label_smoothing: float = 0.0
    """How often a pair is thought to be the wrong way round (sigmoid, robust, exo_pair, simpo)."""
    margin: float = 0.5
    """By how much simpo wants the chosen answer ahead (its gamma)."""
    length_normalised: bool = False
    """Compare log-probabilities per token, so that length is no way to win; ipo, simpo, orpo always do."""
    sft: float = 0.2
    """Share of the chosen answer's own loss per token that is added: keeps it from growing unlikely."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"preference.beta is {self.beta}; it must be above 0, and finite")
        if not 0 <= self.sft < math.inf:
            raise ConfigError(f"preference.sft is {self.sft}; it must be 0 or more, and finite")
        if not math.isfinite(self.margin):
            raise ConfigError(f"preference.margin is {self.margin}; it must be finite")
        least = 0.0 if self.loss != "exo_pair" else 1e-6
        if not least <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}; {self.loss} takes "
                f"{'0' if least == 0 else 'above 0'} to below 0.5"
            )

    @property
    def needs_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE

    @property
    def averaged(self) -> bool:
        return self.length_normalised or self.loss in AVERAGED
