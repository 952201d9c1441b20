"""Routed experts where the cost of a token follows the experts it chose, forward and backward.

Tokens are sorted by expert; each chosen expert multiplies its own contiguous rows. On CPU a loop
over the chosen experts writes into preallocated outputs (a GEMM a matrix, no copies of weights); the
backward writes each expert's gradient once, in place, into one tensor the size of the parameter
(indexing `w[e]` under autograd would make a full-size zero tensor per expert instead). On CUDA in
bfloat16 it is one grouped launch a matrix and no synchronisation with the host.

`dispatched` and `grouped_matmul` are the same steps one by one, for whoever puts something between them
(adapters, casts to fewer bits).

Shape letters: N tokens, k experts a token, M = N * k routed rows, E experts, D model, F expert width.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_experts(
    x: Tensor, chosen: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Sum over the chosen experts of SwiGLU(score * x): equal to `reference.experts_dense`.

    x (N, D); chosen (N, k) int64; scores (N, k); gate_up (E, D, 2F); down (E, F, D) -> (N, D).
    """

    def swiglu(rows: Tensor, groups: Groups) -> Tensor:
        return grouped_swiglu(rows, groups.counts, gate_up, down)

    return dispatched(x, chosen, scores, gate_up.shape[0], swiglu)


def dispatched(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    experts: int,
    body: Callable[[Tensor, "Groups"], Tensor],
) -> Tensor:
    """Scale, sort by expert, `body`, back to token order, sum over a token's experts.

    x (N, D); chosen (N, k) int64; scores (N, k). `body` maps rows (M, D), sorted by expert, to (M, D).
    """
    (x,) = autocast(x)
    N, k = chosen.shape
    expert_of_row = chosen.reshape(-1)
    order = expert_of_row.argsort(stable=True)
    token = order if k == 1 else order // k
    rows = x.index_select(0, token) * scores.reshape(-1, 1).to(x.dtype).index_select(0, order)
    out = body(rows, Groups(expert_of_row.index_select(0, order), token, experts))
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(N * k, device=order.device))
    out = out.index_select(0, inverse)  # token-major again
    return out if k == 1 else out.view(N, k, -1).sum(1)


Span = tuple[int, int, int]
"""(expert, first row, end row)."""


class Groups:
    """Whose the rows are that are sorted by expert, and how many belong to each."""

    def __init__(self, expert: Tensor, token: Tensor, experts: int) -> None:
        """Of every row its expert, ascending, and its token: (M,) int64."""
        self.expert, self.token = expert, token
        # Not bincount, which waits for the device to learn the largest id.
        self.counts = torch.zeros(experts, dtype=torch.int64, device=expert.device)
        self.counts.scatter_add_(0, expert, torch.ones_like(expert))

    @cached_property
    def spans(self) -> list[Span]:
        """(expert, first row, end row) of every expert that has rows; waits for the device."""
        return _spans(self.counts.tolist())

    @cached_property
    def ends(self) -> Tensor:
        """(E,) int32: the row after each expert's last."""
        return self.counts.cumsum(0).to(torch.int32)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch.autocast would cast the operands of a matrix product."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)


def grouped_swiglu(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of rows sorted by expert: rows (M, D), counts (E,) rows per expert -> (M, D).

    Weights of another type (float32 under autocast) are cast expert by expert, chosen ones only.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        gate_up, down = gate_up.to(rows.dtype), down.to(rows.dtype)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, down, offs=ends)
    return _GroupedSwiGLU.apply(rows, counts.tolist(), gate_up, down)


def _spans(counts: list[int]) -> list[Span]:
    """(expert, first row, end row) of every expert that has rows."""
    spans, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, start, start + count))
            start += count
    return spans


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
        spans = _spans(counts)
        hidden = rows.new_empty(rows.shape[0], gate_up.shape[2])  # (M, 2F)
        for e, a, b in spans:
            torch.mm(rows[a:b], gate_up[e].to(rows.dtype), out=hidden[a:b])
        gate, up = hidden.chunk(2, -1)
        act = F.silu(gate).mul_(up)  # (M, F)
        out = torch.empty_like(rows)
        for e, a, b in spans:
            torch.mm(act[a:b], down[e].to(rows.dtype), out=out[a:b])
        ctx.save_for_backward(rows, hidden, gate_up, down)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, hidden, gate_up, down = ctx.saved_tensors
        grad = grad.contiguous()
        want_rows, _, want_up, want_down = ctx.needs_input_grad
        gate, up = hidden.chunk(2, -1)
        silu = F.silu(gate)
        d_down = _gradient_like(down, ctx.spans) if want_down else None
        d_act = torch.empty_like(silu)
        act = silu * up
        for e, a, b in ctx.spans:
            torch.mm(grad[a:b], down[e].to(rows.dtype).t(), out=d_act[a:b])
            if d_down is not None:
                _product_into(d_down[e], act[a:b].t(), grad[a:b])
        d_hidden = torch.empty_like(hidden)
        d_gate, d_up = d_hidden.chunk(2, -1)
        torch.mul(d_act, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate)
        d_rows = torch.empty_like(rows) if want_rows else None
        d_gate_up = _gradient_like(gate_up, ctx.spans) if want_up else None
        for e, a, b in ctx.spans:
            if d_rows is not None:
                torch.mm(d_hidden[a:b], gate_up[e].to(rows.dtype).t(), out=d_rows[a:b])
            if d_gate_up is not None:
                _product_into(d_gate_up[e], rows[a:b].t(), d_hidden[a:b])
        return d_rows, None, d_gate_up, d_down


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _gradient_like(weight: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    """Storage for a weight's gradient: zero where an expert had no rows, else to be written."""
    grad = torch.empty_like(weight)
    chosen = {e for e, _, _ in spans}
    for e in range(weight.shape[0]):
        if e not in chosen:
            grad[e].zero_()
    return grad


class Matrices(Protocol):
    """A matrix for each expert that is made when asked for: quantized ones are such."""

    @property
    def shape(self) -> torch.Size:
        """(E, in, out)"""
        ...

    def __getitem__(self, expert: int, /) -> Tensor:
        """(in, out)"""
        ...


def grouped_matmul(rows: Tensor, groups: Groups, weight: Tensor | Matrices) -> Tensor:
    """Each row times its expert's matrix: rows (M, in), weight (E, in, out) -> (M, out).

    A weight of another type is cast expert by expert. A gradient goes only where one is wanted, so a
    frozen weight costs none; of `Matrices` one is held at a time, in the backward too.
    """
    if not isinstance(weight, Tensor):
        return _GroupedMatrices.apply(rows, groups.spans, weight)
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
        d_weight = _gradient_like(weight, ctx.spans) if want_weight else None
        for e, a, b in ctx.spans:
            if d_rows is not None:
                torch.mm(grad[a:b], weight[e].to(grad.dtype).t(), out=d_rows[a:b])
            if d_weight is not None:
                _product_into(d_weight[e], rows[a:b].t(), grad[a:b])
        return d_rows, None, d_weight


class _GroupedMatrices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, spans: list[Span], weight: Matrices) -> Tensor:
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        for e, a, b in spans:
            torch.mm(rows[a:b], weight[e].to(rows.dtype), out=out[a:b])
        ctx.weight, ctx.spans = weight, spans
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        d_rows = grad.new_empty(grad.shape[0], ctx.weight.shape[1])
        for e, a, b in ctx.spans:
            torch.mm(grad[a:b], ctx.weight[e].to(grad.dtype).t(), out=d_rows[a:b])
        return d_rows, None, None
