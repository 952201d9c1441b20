"""The decoder's leaves on native kernels while a step of few tokens runs, and only then.

Decoding reads every active weight for a handful of tokens, which torch's products do at a quarter to
a half of what the memory gives; `kernels.cpu` does it at nearly all of it. The module tree is not
changed: leaves get another `forward` for the duration of a step. Without a compiler, on other devices
and for longer steps the leaves stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from herdling.kernels import cpu
from herdling.lora.layers import LoraExperts, LoraLinear
from herdling.model.llama import MLP, Experts, RMSNorm, Router, TextLM

MOST_TOKENS = 16
"""Tokens of a step up to which the native products are faster than torch's."""
MANY_SEEN = 2**14
"""Positions seen by a step's tokens from which on attention is worth torch's threads."""


class Native:
    """Swaps the leaves of one decoder."""

    def __init__(self, decoder: TextLM) -> None:
        weight = decoder.lm_head.weight
        self._leaves: list[tuple[nn.Module, str, Callable]] = []
        kinds = (torch.float32, torch.bfloat16)
        self.fits = weight.device.type == "cpu" and weight.dtype in kinds and cpu.available()
        """Whether there is anything to swap in."""
        if not self.fits:
            return
        inside: set[nn.Module] = set()
        for module in decoder.modules():
            forward = None if module in inside else _forward(module)
            if forward is not None:
                self._leaves.append((module, "forward", forward))
                inside.update(module.children())
            elif (plain := _plain(module)) is not None:
                self._leaves.append((module, "plain", plain))

    @contextmanager
    def leaves(self, tokens: int, seen: int = 0) -> Iterator[None]:
        """Native leaves for a step of so many tokens, if it is short enough.

        Where they see few positions, `seen` in all, torch does the rest in one thread.
        """
        if not self.fits or tokens > MOST_TOKENS:
            yield
            return
        for module, name, forward in self._leaves:
            module.__dict__[name] = forward
        try:
            with cpu.alone() if seen < MANY_SEEN else nullcontext():
                yield
        finally:
            for module, name, _ in self._leaves:
                module.__dict__.pop(name, None)


def _forward(module: nn.Module) -> Callable | None:
    """The native forward of a plain leaf; None for anything else, and for what is already altered."""
    plain = all(type(child) is nn.Linear for child in module.children())
    if "forward" in module.__dict__ or not plain:
        return None
    native = NATIVE.get(type(module))  # a subclass is something else
    return native and partial(native, module)


def _plain(module: nn.Module) -> Callable | None:
    """The native form of what an adapted leaf does without its adapters."""
    if isinstance(module, LoraLinear):
        return lambda x: cpu.linear(x, module.base)
    return partial(_experts, module) if isinstance(module, LoraExperts) else None


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return cpu.linear(x, layer.weight)


def _mlp(layer: MLP, x: Tensor) -> Tensor:
    return cpu.swiglu(x, layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight)


def _norm(layer: RMSNorm, x: Tensor) -> Tensor:
    return cpu.rms_norm(x, layer.weight, layer.eps)


def _experts(layer: Experts, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    return cpu.experts(x, chosen, gates, layer.gate_up_proj, layer.down_proj)


def _router(layer: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.choose(cpu.linear(x, layer.weight), x.dtype)


NATIVE: dict[type[nn.Module], Callable] = {
    nn.Linear: _linear,
    MLP: _mlp,
    RMSNorm: _norm,
    Experts: _experts,
    Router: _router,
}
