"""The settings of the curriculum, apart from its code: `--help` shows them without torch."""

import math
from dataclasses import dataclass

from herdling.errors import ConfigError, at_least


@dataclass(frozen=True)
class FilterConfig:
    """How prompts are filtered."""

    pool: int = 512
    """Prompts of each task that are asked again and again."""
    easiest: float = 0.8
    """Estimated pass rate above which a prompt is too easy."""
    floor: float = 0.01
    """Weight of a prompt that is too easy or too hard, where a pass rate of a half has 0.25; and the
    least that is left of a class's share."""
    memory: int = 60
    """Steps after which what was seen of a prompt counts half."""
    prior: float = 0.5
    """Grades of its own that a prompt needs to count as much as its class."""
    refills: int = 2
    """How often a step draws again for groups that taught nothing."""

    def __post_init__(self) -> None:
        at_least(self, "filter.", pool=1, memory=1, refills=0)
        if not 0 < self.easiest <= 1:
            raise ConfigError(f"filter.easiest is {self.easiest}; it must be in (0, 1]")
        if not (0 < self.floor < math.inf and 0 < self.prior < math.inf):
            raise ConfigError(
                f"filter.floor is {self.floor} and prior {self.prior}; both must be finite and above "
                "0, else what was too hard once is never asked again"
            )
