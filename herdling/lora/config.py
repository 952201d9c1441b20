"""What an adapter is: its rank, its scale, and which matrices it reaches."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from herdling.config import nearest
from herdling.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank change W + scale * (B A) of chosen matrices (Hu et al., arXiv 2106.09685).

    Left out on purpose: dropout. The experts' change is added inside the grouped products, where
    there is no place for it (peft refuses it for the same tensors).
    """

    r: int = 16
    """Rank: inner width of the two factors."""
    alpha: float = 32.0
    """The change is multiplied by alpha / r."""
    targets: tuple[str, ...] = ("attention", "shared", "experts")
    """Kinds (attention, shared, experts, dense, vision, projector, head, router), `all` of them but
    the router, or patterns over names such as `*.layers.0.*`."""
    dora: bool = False
    """Learn each row's length apart from its direction (DoRA, arXiv 2402.09353); not for experts."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora r is {self.r}; it must be at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"lora alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise ConfigError("lora targets is empty; example: targets=attention+experts")
        if "" in self.targets:
            raise ConfigError(
                "lora targets has an empty name in it; example: targets=attention+experts"
            )

    @classmethod
    def parse(cls, text: str) -> "LoraConfig":
        """Of `r=16,alpha=32,targets=attention+experts`; fields left out keep their defaults."""
        fields = {f.name: f.type for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in fields:
                raise ConfigError(f"lora: {name!r} is no setting{nearest(name, list(fields))}")
            if not equals or not value or name in values:
                raise ConfigError(
                    f"lora: {part!r} must be NAME=VALUE, once; example: r=16,alpha=32"
                )
            values[name] = _value(name, value)
        return cls(**values)


def _value(name: str, text: str) -> Any:
    try:
        if name == "r":
            return int(text)
        if name == "alpha":
            return float(text)
    except ValueError:
        raise ConfigError(f"lora {name} is {text!r}; it must be a number") from None
    if name == "targets":
        return tuple(part.strip() for part in text.split("+"))
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"lora {name} is {text!r}; it must be true or false")
    return text.lower() == "true"
