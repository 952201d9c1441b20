"""Which experts a model uses, by domain and by modality, on held-out examples."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from herdling.data.sources import Example
from herdling.infer.lm import LM
from herdling.model.llama import Router


@torch.no_grad()
def expert_use(lm: LM, examples: Iterable[Example]) -> dict[str, Tensor]:
    """Shares of tokens per expert, (layers, E), by domain; tokens of pictures count as "image".

    Each example runs alone, so every routed token is known to be real. Empty for a dense model.
    """
    routers = [m for m in lm.model.modules() if isinstance(m, Router)]
    chosen: list[Tensor] = []

    def watch(router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen.append(output[0])

    counts: dict[str, Tensor] = {}
    handles = [router.register_forward_hook(watch) for router in routers]
    try:
        for example in examples:
            chosen.clear()
            ids = torch.tensor([example.tokens], device=lm.device)
            tiles = None if example.tiles is None else example.tiles.to(lm.device)
            lm.model(ids, tiles, readout=lambda hidden, head: hidden)
            picture = ids[0] == lm.tokenizer.patch
            for layer, experts in enumerate(chosen):
                size = routers[layer].out_features
                for name, part in ((example.domain, ~picture), ("image", picture)):
                    table = counts.setdefault(name, torch.zeros(len(routers), size))
                    table[layer] += torch.bincount(experts[part].flatten(), minlength=size).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: table / table.sum(1, keepdim=True) for name, table in counts.items() if table.any()
    }
