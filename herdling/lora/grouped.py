"""Routed experts with low-rank changes: each chosen expert's factors on its own rows, no merged copy.

Rows are sorted by expert as in `kernels.grouped_matmul`; both products of an expert then get
`scale * rows A B` added. An adapter that only some tokens use is computed for their rows alone.

Shape letters: N tokens, k experts a token, M = N * k routed rows, E experts, D model width, F expert
width, r rank.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.kernels.grouped_matmul import autocast


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


def adapted_experts(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    parts: Sequence[Part],
) -> Tensor:
    """`routed_experts` with weights W[e] + scale * A[e] B[e], never formed.

    x (N, D); chosen (N, k) int64; scores (N, k); gate_up (E, D, 2F); down (E, F, D) -> (N, D).
    """
    (x,) = autocast(x)
    (N, k), E = chosen.shape, gate_up.shape[0]
    order = chosen.reshape(-1).argsort(stable=True)
    token, expert = order // k, chosen.reshape(-1).index_select(0, order)
    rows = x.index_select(0, token) * scores.reshape(-1, 1).to(x.dtype).index_select(0, order)
    groups = Groups(expert, E)
    picks = [(factors, _pick(tokens, token, expert, N, E)) for factors, tokens in parts]

    hidden = grouped_matmul(rows, groups, gate_up)
    gate, up = _add(hidden, rows, groups, picks, "gate_up_proj").chunk(2, -1)
    act = F.silu(gate) * up  # (M, F)
    out = _add(grouped_matmul(act, groups, down), act, groups, picks, "down_proj")

    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(N * k, device=order.device))
    out = out.index_select(0, inverse)  # token-major again
    return out if k == 1 else out.view(N, k, -1).sum(1)


Span = tuple[int, int, int]
"""(expert, first row, end row)."""


class Groups:
    """How many of the rows, which are sorted by expert, belong to each."""

    def __init__(self, expert: Tensor, experts: int) -> None:
        """`expert` (M,) int64, ascending: whose row it is."""
        self.expert = expert
        self.counts = torch.zeros(experts, dtype=torch.int64, device=expert.device)
        self.counts.scatter_add_(0, expert, torch.ones_like(expert))

    @cached_property
    def spans(self) -> list[Span]:
        """(expert, first row, end row) of every expert that has rows; waits for the device."""
        spans, start = [], 0
        for expert, count in enumerate(self.counts.tolist()):
            if count:
                spans.append((expert, start, start + count))
                start += count
        return spans

    @cached_property
    def ends(self) -> Tensor:
        """(E,) int32: the row after each expert's last."""
        return self.counts.cumsum(0).to(torch.int32)


def grouped_matmul(rows: Tensor, groups: Groups, weight: Tensor) -> Tensor:
    """Each row times its expert's matrix: rows (M, in), weight (E, in, out) -> (M, out).

    A weight of another type is cast expert by expert. A gradient goes only where one is wanted, so a
    frozen weight costs none.
    """
    # The grouped launch takes rows of whole 16 bytes.
    if rows.is_cuda and rows.dtype == torch.bfloat16 and not any(n % 8 for n in weight.shape[1:]):
        return F.grouped_mm(rows, weight.to(rows.dtype), offs=groups.ends)
    return _GroupedMatmul.apply(rows, groups.spans, weight)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, spans: list[Span], weight: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        for e, a, b in spans:
            torch.mm(rows[a:b], weight[e].to(rows.dtype), out=out[a:b])
        ctx.save_for_backward(rows, weight)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        want_rows, _, want_weight = ctx.needs_input_grad
        grad = grad.contiguous()
        d_rows = torch.empty_like(rows) if want_rows else None
        d_weight = torch.zeros_like(weight) if want_weight else None  # zero where no row came
        for e, a, b in ctx.spans:
            if d_rows is not None:
                torch.mm(grad[a:b], weight[e].to(grad.dtype).t(), out=d_rows[a:b])
            if d_weight is not None:
                d_weight[e] = rows[a:b].t() @ grad[a:b]
        return d_rows, None, d_weight


_Pick = tuple[Tensor, Groups] | None


def _pick(tokens: Tensor | None, token: Tensor, expert: Tensor, N: int, E: int) -> _Pick:
    """The routed rows of some tokens, still sorted by expert; None for all."""
    if tokens is None:
        return None
    mine = torch.zeros(N, dtype=torch.bool, device=token.device)
    mine[tokens] = True
    rows = mine.index_select(0, token).nonzero().squeeze(1)
    return rows, Groups(expert.index_select(0, rows), E)


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
