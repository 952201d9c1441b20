"""Routed experts with low-rank changes: each chosen expert's factors on its own rows, no merged copy.

Rows are sorted by expert as in `kernels.grouped_matmul`; both products of an expert then get
`scale * rows A B` added. An adapter that only some tokens use is computed for their rows alone.

Shape letters: N tokens, k experts a token, M = N * k routed rows, E experts, D model width, F expert
width, r rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.kernels.grouped_matmul import Groups, Matrices, dispatched, grouped_matmul


class ExpertFactors(Protocol):
    """A low-rank change of one fused tensor: scale * A[e] @ B[e]."""

    A: Tensor
    """(E, in, r)"""
    B: Tensor
    """(E, r, out)"""
    scale: float


FEW_ROWS = 32
"""Rows up to which gathering each row's factors is faster than a product for each expert."""

Part = tuple[Mapping[str, ExpertFactors], Tensor | None]
"""Factors by fused tensor (gate_up_proj, down_proj), and the tokens that use them (None: all)."""

Product = Callable[[Tensor, Groups, str], Tensor]
"""Rows sorted by expert, whose they are, and the name of a fused tensor -> rows times it."""


def adapted_experts(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    gate_up: Tensor | Matrices,
    down: Tensor | Matrices,
    parts: Sequence[Part],
    product: Product | None = None,
) -> Tensor:
    """`routed_experts` with weights W[e] + scale * A[e] B[e], never formed.

    x (N, D); chosen (N, k) int64; scores (N, k); gate_up (E, D, 2F); down (E, F, D) -> (N, D).
    `product` (rows, groups, name) multiplies by W in the place of `grouped_matmul`.
    """
    weights = {"gate_up_proj": gate_up, "down_proj": down}
    product = product or (lambda rows, groups, name: grouped_matmul(rows, groups, weights[name]))
    N, E = x.shape[0], gate_up.shape[0]

    def swiglu(rows: Tensor, groups: Groups) -> Tensor:
        picks = [(factors, _pick(tokens, groups, N)) for factors, tokens in parts]
        hidden = product(rows, groups, "gate_up_proj")
        gate, up = _add(hidden, rows, groups, picks, "gate_up_proj").chunk(2, -1)
        act = F.silu(gate) * up  # (M, F)
        return _add(product(act, groups, "down_proj"), act, groups, picks, "down_proj")

    return dispatched(x, chosen, scores, E, swiglu)


_Pick = tuple[Tensor, Groups] | None


def _pick(tokens: Tensor | None, groups: Groups, N: int) -> _Pick:
    """The routed rows of some tokens, still sorted by expert; None for all."""
    if tokens is None:
        return None
    mine = torch.zeros(N, dtype=torch.bool, device=tokens.device)
    mine[tokens] = True
    rows = mine.index_select(0, groups.token).nonzero().squeeze(1)
    expert, token = (t.index_select(0, rows) for t in (groups.expert, groups.token))
    return rows, Groups(expert, token, len(groups.counts))


def _add(
    out: Tensor,
    rows: Tensor,
    groups: Groups,
    picks: Sequence[tuple[Mapping[str, ExpertFactors], _Pick]],
    name: str,
) -> Tensor:
    for factors, pick in picks:
        if name not in factors:
            continue
        own = factors[name]
        if pick is None:
            out = out + _delta(rows, groups, own)
        else:
            index, mine = pick
            out = out.index_add(0, index, _delta(rows.index_select(0, index), mine, own))
    return out


def _delta(rows: Tensor, groups: Groups, factors: ExpertFactors) -> Tensor:
    if rows.shape[0] <= FEW_ROWS and not torch.is_grad_enabled():
        A, B = (f.index_select(0, groups.expert).to(rows.dtype) for f in (factors.A, factors.B))
        inner = torch.bmm(rows[:, None], A) * factors.scale  # (M, 1, r)
        return torch.bmm(inner, B)[:, 0]
    inner = grouped_matmul(rows, groups, factors.A) * factors.scale  # (M, r)
    return grouped_matmul(inner, groups, factors.B)
