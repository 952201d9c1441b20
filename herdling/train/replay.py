"""Routing replay: the trainer's tokens go to the experts that they went to when they were drawn.

A sampler and a trainer round differently, and where two experts are nearly tied a token goes another
way; with one expert a token its whole routed output is then another. Replay (R3, arXiv 2510.11370)
takes the sampler's choice and keeps the trainer's scores: a gate is the sigmoid of the trainer's own
logit at the replayed expert, so the router goes on learning. It acts on the routers' outputs from
outside, for one forward pass; a backward pass that computes activations again is not supported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from herdling.errors import Error
from herdling.model.llama import Router


@dataclass
class Routes:
    """How far the trainer's own choice differs: counts of (token, layer) pairs."""

    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def seen(self) -> Tensor | None:
        """Pairs whose experts in the rollout are known; None if there was nothing to compare."""
        return torch.stack([seen for _, seen in self.found]).sum() if self.found else None

    @property
    def flipped(self) -> Tensor:
        """Those that would have gone to other experts."""
        return torch.stack([flipped for flipped, _ in self.found]).sum()


@contextmanager
def replaying(model: nn.Module, experts: Tensor | None, replay: bool = True) -> Iterator[Routes]:
    """In here the routers of `model` choose `experts` (L, N, k) int, where those are not -1.

    Without `replay` they choose freely and are only compared. Raises Error where layers or tokens do
    not fit.
    """
    routes = Routes()
    if experts is None:
        yield routes
        return
    routers = [m for m in model.modules() if isinstance(m, Router)]
    if len(routers) != len(experts):
        raise Error(f"the rollouts have experts of {len(experts)} layers, the model {len(routers)}")
    # Before the other hooks: who counts loads is to see where the tokens really go.
    hooks = [
        router.register_forward_hook(_Hook(own.long(), routes, replay), prepend=True)
        for router, own in zip(routers, experts, strict=True)
    ]
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


class _Hook:
    def __init__(self, experts: Tensor, routes: Routes, replay: bool) -> None:
        self.experts, self.routes, self.replay = experts, routes, replay

    def __call__(self, router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> Any:
        chosen, gates, logits = output
        if chosen.shape != self.experts.shape:
            raise Error(
                f"the rollouts have experts {tuple(self.experts.shape)} of a layer, the model "
                f"chooses {tuple(chosen.shape)}"
            )
        known = (self.experts >= 0).all(-1)  # (N,)
        other = (chosen.sort(-1).values != self.experts.sort(-1).values).any(-1)
        self.routes.found.append(((other & known).sum(), known.sum()))
        if not self.replay:
            return None
        chosen = torch.where(known[:, None], self.experts, chosen)
        gates = torch.sigmoid(logits.gather(-1, chosen).float()).to(gates.dtype)
        return chosen, gates, logits
