"""What the routers do in training: expert load, its balance in the loss, experts that died.

`Routing` watches the routers of a model from outside, through forward hooks, and so works for every
stage and every loss. Two things come of it:

- a balancing term for the loss, after Switch Transformer (arXiv 2101.03961): per layer
  E * sum_e f_e p_e, 1 when even, E when one expert takes all. p_e is the mean over the tokens of
  sigmoid scores normalised to sum 1, and carries the gradient. f_e is the share of tokens that chose
  e in the *previous* optimizer step, over all micro-batches and processes: only so is the term, and
  its gradient, the same however the batch is split (the first step's f is even: no pull).
- numbers: MaxVio (max load / mean load - 1) and router entropy (share of its maximum) a step, and
  over a window of steps the load of every expert, with a warning for each that got no token.

Activation checkpointing must be the non-reentrant kind; the hooks do nothing in a recomputation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from herdling import distributed
from herdling.errors import ConfigError, Error
from herdling.model.llama import Router
from herdling.train.config import RoutingConfig

_BARS = "".join(chr(0x2581 + i) for i in range(8))


class Routing:
    """The routers of a model under observation; a context manager that takes its hooks off again.

    The loop calls `recording` around each forward, then `term`, and `finish` after each update.
    """

    def __init__(self, model: nn.Module, config: RoutingConfig | None = None) -> None:
        self.config = config or RoutingConfig()
        self.routers = {n: m for n, m in model.named_modules() if isinstance(m, Router)}
        sizes = [router.out_features for router in self.routers.values()]
        self.share = [torch.full((size,), 1 / size) for size in sizes]
        """Per layer (E,): the part of the last step's tokens that each expert got."""
        self._counts = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        self._entropy = [torch.zeros((), dtype=torch.float64) for _ in sizes]
        self._window = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        self._steps = 0
        self._seen: list[list[Tensor]] = [[] for _ in sizes]
        self._blind = False
        self._open = False
        self._real: Tensor | None = None

    def __enter__(self) -> "Routing":
        self._hooks = [
            router.register_forward_hook(self._watch(layer))
            for layer, router in enumerate(self.routers.values())
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, layer: int) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor, Tensor]], None]:
        def hook(router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if not torch.is_grad_enabled():
                self._blind = self._blind or self._open
                return
            chosen, _, logits = output
            if self._real is not None and self._real.numel() == logits.shape[0]:
                chosen, logits = chosen[self._real], logits[self._real]
            # Computed in a recomputation too: it must save the tensors that the first pass saved.
            scores = torch.sigmoid(logits.float())
            p = scores / scores.sum(-1, keepdim=True)  # (N, E)
            mean = p.mean(0) if len(p) else p.sum(0)
            if self._open:
                self._seen[layer].append(mean)
                self._count(layer, chosen, p.detach())

        return hook

    @torch.no_grad()
    def _count(self, layer: int, chosen: Tensor, p: Tensor) -> None:
        counts = torch.bincount(chosen.flatten(), minlength=p.shape[1])
        self._counts[layer] = self._counts[layer].to(counts.device) + counts
        entropy = torch.special.entr(p).sum().double()
        self._entropy[layer] = self._entropy[layer].to(entropy.device) + entropy

    @contextmanager
    def recording(self, documents: Tensor | None = None) -> Iterator[None]:
        """Record the forward passes inside; tokens of negative documents (padding) do not count."""
        self._seen = [[] for _ in self._seen]
        self._real = None if documents is None else (documents >= 0).flatten()
        self._blind, self._open = False, True
        try:
            yield
        finally:
            self._open = False
        if self._blind and not any(self._seen):
            raise Error(
                "the routers ran without gradients, so experts cannot be balanced; "
                "remedy: checkpoint activations with use_reentrant=False"
            )

    def term(self) -> Tensor | None:
        """Sum over layers of E * sum_e f_e p_e for the recorded micro-batch; None without routers."""
        terms = [
            len(share) * (share.to(means[0].device) * torch.stack(means).mean(0)).sum()
            for share, means in zip(self.share, self._seen, strict=True)
            if means
        ]
        return torch.stack(terms).sum() if terms else None

    def finish(self) -> tuple[dict[str, Any], list[str]]:
        """Close an optimizer step: its numbers for `metrics.jsonl`, and warnings in words."""
        counts = [distributed.total(c).cpu() for c in self._counts]
        entropy = [float(distributed.total(e)) for e in self._entropy]
        self._counts = [torch.zeros_like(c) for c in counts]
        self._entropy = [torch.zeros((), dtype=torch.float64) for _ in entropy]
        if not counts or not all(int(c.sum()) for c in counts):
            return {}, []
        self.share = [(c.double() / c.sum()).float() for c in counts]
        self._window = [w + c for w, c in zip(self._window, counts, strict=True)]
        self._steps += 1
        top_k = [router.top_k for router in self.routers.values()]
        numbers: dict[str, Any] = {
            "max_violation": [max_violation(c) for c in counts],
            "router_entropy": [
                e / (int(c.sum()) / k) / math.log(max(len(c), 2))
                for e, c, k in zip(entropy, counts, top_k, strict=True)
            ],
        }
        if self._steps < self.config.window:
            return numbers, []
        return self._close_window(numbers)

    def _close_window(self, numbers: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        numbers["expert_load"] = [(w.double() / w.sum()).tolist() for w in self._window]
        dead = {n: (w == 0).nonzero()[:, 0].tolist() for n, w in zip(self.routers, self._window, strict=True)}  # fmt: skip
        numbers["dead_experts"] = sum(map(len, dead.values()))
        warnings = [
            f"{name}: {len(experts)} of {self.routers[name].out_features} experts got no token in "
            f"{self._steps} steps: {', '.join(map(str, experts))}"
            for name, experts in dead.items()
            if experts
        ]
        self._window = [torch.zeros_like(w) for w in self._window]
        self._steps = 0
        return numbers, warnings

    def line(self) -> str:
        """The load of the last step in a few characters: a bar chart a layer, or the worst layer."""
        if not self.share:
            return ""
        worst = max(len(s) * float(s.max()) for s in self.share)
        if sum(map(len, self.share)) > 64:
            return f"load {worst:.1f}x"
        charts = " ".join("".join(_bar(float(x) * len(s)) for x in s) for s in self.share)
        return f"load {worst:.1f}x {charts}"

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {
            "share": dict(zip(self.routers, self.share, strict=True)),
            "window": dict(zip(self.routers, self._window, strict=True)),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if list(state["share"]) != list(self.routers):
            raise ConfigError(
                f"the checkpoint has routers {', '.join(state['share']) or 'none'}; "
                f"the model has {', '.join(self.routers) or 'none'}"
            )
        self.share = [state["share"][name] for name in self.routers]
        self._window = [state["window"][name] for name in self.routers]
        self._steps = state["steps"]


def max_violation(counts: Tensor) -> float:
    """MaxVio: how far the busiest expert is above the mean, as a share of the mean; 0 is even."""
    return int(counts.max()) * len(counts) / int(counts.sum()) - 1.0


def _bar(load: float) -> str:
    """A block whose height is the load: even load is half high, twice the mean and more is full."""
    return _BARS[min(7, round(load * 3.5))] if load > 0 else "_"
