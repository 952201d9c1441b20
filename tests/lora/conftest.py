"""Toy models with adapters whose factors are far from zero."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from herdling import lora
from herdling.lora import LoraConfig

EVERYTHING = ("all", "router")


@pytest.fixture(scope="session")
def put_on() -> Callable[..., lora.Adapters]:
    """put_on(model, targets, name, seed, **config): an adapter that changes what the model says."""

    def put(
        model: nn.Module,
        targets: tuple[str, ...] = EVERYTHING,
        name: str = "adapter",
        seed: int = 0,
        **config,
    ) -> lora.Adapters:
        adapters = lora.attach(model, LoraConfig(**{"r": 3, "alpha": 6, "targets": targets, **config}), name, seed)  # fmt: skip
        stir(adapters, name, seed)
        return adapters

    return put


def stir(adapters: lora.Adapters, name: str, seed: int = 0) -> None:
    """Give B (and DoRA's magnitudes) values that training might give."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, factors in adapters.factors(name).values():
            factors.B.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
            if factors.magnitude is not None:
                factors.magnitude.mul_(1 + 0.2 * torch.rand(factors.magnitude.shape, generator=generator))  # fmt: skip


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 21), generator=torch.Generator().manual_seed(1))
