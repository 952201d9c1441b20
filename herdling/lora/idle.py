"""Experts that a step did not touch stay exactly as they are.

Torch's AdamW moves every element of a parameter: with a gradient of zero it still decays the
weight and still follows the old average. In a fused tensor that would carry off the experts that no
token chose. This holds them, and their averages, where they were.
"""

from typing import Any

import torch
from torch import Tensor, nn

from herdling.lora.adapters import of


def spare_idle_experts(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on `optimizer.step()` changes nothing of an expert's factor whose gradient is zero."""
    adapters = of(model)
    fused = {
        id(tensor)
        for name in adapters.names
        for site, factors in adapters.factors(name).values()
        if site.fused
        for tensor in (factors.A, factors.B)
    }
    parameters = [p for g in optimizer.param_groups for p in g["params"] if id(p) in fused]
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(*_: Any) -> None:
        kept.clear()
        for parameter in parameters:
            if parameter.grad is None:
                continue
            idle = (parameter.grad == 0).flatten(1).all(1)  # (E,)
            state = optimizer.state.get(parameter, {})
            # Averages, or their codes and scales: what has a row for each expert.
            averages = [t for t in state.values() if isinstance(t, Tensor) and t.dim() > 1]
            kept.extend((t, idle, t.detach().clone()) for t in (parameter, *averages))

    @torch.no_grad()
    def after(*_: Any) -> None:
        for tensor, idle, old in kept:
            tensor.copy_(torch.where(idle.view(-1, *[1] * (tensor.dim() - 1)), old, tensor))
        kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
