"""The learning rate over a run: a rise, then cosine, linear or warm-up-stable-decay.

A pure function of the step, so a resumed run needs nothing but its step to go on.
"""

import math
from dataclasses import dataclass
from typing import Literal

from herdling.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """The share of the peak learning rate that each step gets."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and falls linearly at the end."""
    warmup: float = 0.02
    """Length of the linear rise: steps if 1 or more, else a share of all steps."""
    final: float = 0.1
    """What is left of the peak at the last step (constant ignores it)."""
    decay: float = 0.2
    """Length of wsd's fall: steps if 1 or more, else a share of all steps."""

    def __post_init__(self) -> None:
        for name in ("warmup", "decay"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"schedule.{name} is {value}; it must be 0 or more, and finite")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final is {self.final}; it must be in 0..1")

    def __call__(self, step: int, steps: int) -> float:
        """The factor for the update number `step` (0-based) of `steps`, in [0, 1]."""
        rise = _length(self.warmup, steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            rise = max(rise, steps - _length(self.decay, steps))
            if step < rise:
                return 1.0
        done = min(1.0, (step - rise) / max(1, steps - 1 - rise))
        left = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.final + (1 - self.final) * left


def _length(given: float, steps: int) -> int:
    return round(given) if given >= 1 else round(given * steps)
