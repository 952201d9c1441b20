"""What a request may ask of the drawing of its tokens, and which values make sense.

Left out: whether token ids of `logit_bias` exist, which needs the model (`check_vocabulary`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from herdling.errors import ConfigError

Bias = Mapping[int, float] | tuple[tuple[int, float], ...]
TINY = math.ulp(0.0)
"""The smallest number above 0."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: cuts in the order top-k, top-p, min-p, typical, after the temperature."""

    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Keep a token while the mass before it is at most p, so the one that crosses p stays."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens already in prompt or reply."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the entropy, up to this mass (Meister et al.,
    Locally Typical Sampling, 2022)."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that is in the reply, as OpenAI defines it."""
    frequency_penalty: float = 0.0
    """Taken from the logit of each token as often as it is in the reply."""
    logit_bias: Bias = ()
    """Added to the logits of these token ids; kept as pairs in the order of the ids."""
    min_tokens: int = 0
    """No stop token before the reply has so many tokens. A grammar decides its end itself."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, math.inf, "0 or more, and finite")
        _check_count("top_k", self.top_k, "use 0 for no limit, or 1 and more")
        _check("top_p", self.top_p, TINY, 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0, 1, "0 to 1")
        remedy = "above 0 (1: none), and finite"
        _check("repetition_penalty", self.repetition_penalty, TINY, math.inf, remedy)
        _check("typical_p", self.typical_p, TINY, 1, "above 0 and at most 1")
        _check("presence_penalty", self.presence_penalty, -2, 2, "-2 to 2")
        _check("frequency_penalty", self.frequency_penalty, -2, 2, "-2 to 2")
        object.__setattr__(self, "logit_bias", bias_pairs(self.logit_bias))
        _check_count("min_tokens", self.min_tokens, "it must be 0 or more")

    @property
    def adjusts(self) -> bool:
        """Whether logits change before the temperature."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )

    def check_vocabulary(self, size: int) -> None:
        """Raise ConfigError when `logit_bias` names a token that a vocabulary of `size` lacks."""
        if self.logit_bias and (highest := bias_pairs(self.logit_bias)[-1][0]) >= size:
            raise ConfigError(f"logit_bias has token id {highest}; the vocabulary is 0..{size - 1}")


def _check(name: str, value: float, low: float, high: float, allowed: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must be {allowed}")


def _check_count(name: str, value: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} is {value}; {remedy}")


def bias_pairs(bias: Bias) -> tuple[tuple[int, float], ...]:
    """(id, bias) in the order of the ids. Raises ConfigError for what is neither."""
    for id, value in dict(bias).items():
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**31:
            raise ConfigError(f"logit_bias has token id {id!r}; ids are integers from 0 up")
        _check(f"logit_bias of token {id}", value, -100, 100, "-100 to 100")
    return tuple(sorted(dict(bias).items()))
