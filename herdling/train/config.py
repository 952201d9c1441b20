"""The settings of parts of training, apart from their code: `--help` shows them without torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from herdling.errors import ConfigError, at_least

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
        at_least(self, "routing.", window=1)


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
        at_least(self, "checkpoint.", every=1, keep=1, permanent=0)


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


@dataclass(frozen=True)
class OnlineConfig:
    """How much is played between updates."""

    prompts: int = 8
    """Prompts of a batch of rollouts: groups that teach, where prompts are filtered."""
    samples: int = 8
    """Rollouts of each prompt, whose grades are compared."""
    updates: int = 1
    """Optimizer steps on a batch of rollouts, each on its own part of them."""
    max_tokens: int = 32
    """Most tokens of a turn of the model."""
    turns: int = 4
    """Most turns of the model in a conversation; calls of tools are answered between them."""
    length: int = 256
    """Tokens in a row; rollouts are packed into rows, and longer ones are left out."""

    def __post_init__(self) -> None:
        at_least(self, "online.", prompts=1, samples=2, updates=1, max_tokens=1, turns=1, length=2)


PolicyKind = Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"]
Correction = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]  # fmt: skip

PUBLISHED: Mapping[str, tuple[float, float, bool]] = {
    "dapo": (0.2, 0.28, True),
    "grpo": (0.2, 0.2, True),
    "dr_grpo": (0.2, 0.2, False),
    "gspo": (3e-4, 4e-4, True),
    "cispo": (1.0, 4.0, True),
}
"""Of each loss: how far below and above 1 the ratio may go, and whether advantages are divided by the
standard deviation. CISPO's clip is one-sided in practice."""


@dataclass(frozen=True)
class PolicyConfig:
    """How graded rollouts become a gradient."""

    loss: PolicyKind = "dapo"
    """What is averaged over what, and whose ratio is clipped; see `herdling.train.policy`."""
    clip: tuple[float, float] | None = None
    """How far below and above 1 the ratio may go; none: what was published with the loss."""
    scale: bool | None = None
    """Whether advantages are divided by their group's standard deviation; none: as published."""
    correction: Correction = "token_truncate"
    """What a too large pi_old / pi_sampler does: cut at the cap, or mask, token or sequence."""
    cap: float = 2.0
    """The largest such weight."""
    kl: float = 0.0
    """Coefficient of the divergence from the model that the run began with."""
    sft: float = 0.5
    """With --examples: what their loss per token counts beside the policy's."""
    mask_truncated: bool = True
    """Whether rollouts that ran out of tokens are left out of the loss."""
    replay: bool = True
    """Whether the trainer's tokens go to the experts that they went to in the rollout."""

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not (0 < low <= 1 and high > 0):
            raise ConfigError(f"policy.clip is {low, high}; it must be in (0, 1] and above 0")
        if not self.cap >= 1:
            raise ConfigError(f"policy.cap is {self.cap}; it must be at least 1")
        for name in ("kl", "sft"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"policy.{name} is {value}; it must be 0 or more, and finite")

    @property
    def bounds(self) -> tuple[float, float]:
        return PUBLISHED[self.loss][:2] if self.clip is None else self.clip

    @property
    def scaled(self) -> bool:
        return PUBLISHED[self.loss][2] if self.scale is None else self.scale
