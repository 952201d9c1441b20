"""Attention over a layer's view of the sequence, without a mask wherever none is needed.

Three cases, from cheap to general:
- plain causal: rows are one document from its beginning;
- chunked: the rows are folded, chunk by chunk, into the batch, so local layers cost T * chunk
  instead of T * T and need no mask;
- anything else (packed documents, padding, batches at unequal positions): a boolean mask.

Two more serve an engine whose keys lie in a store: `attend_last` for one new token a row, and
`attend_past` for new tokens behind a long past, merged from two parts so that no mask is made.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Grouped-query attention: q (B, Tq, H, d), k and v (B, Tk, KV, d) -> (B, Tq, H, d).

    mask (B, Tq, Tk) bool, True where a query sees a key. KV heads serve H / KV consecutive query
    heads. Scale 1/sqrt(d).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] > 1 and _by_bmm(q, k):
        return attend_bmm(q, k, v, mask, causal)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _by_bmm(q: Tensor, k: Tensor) -> bool:
    """Whether two plain products beat torch's fused attention, which on CPU they do in bf16.

    Not where the CPU multiplies tiles (AMX) and no gradient is wanted, nor where all attention
    weights at once would be too many to keep.
    """
    if not (torch.is_grad_enabled() and q.requires_grad) and _has_tiles():
        return False
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] <= 2**24


@lru_cache(maxsize=1)
def _has_tiles() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def attend_bmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The same by two batched products: in bf16 without AMX 2 to 4 times faster than torch's own, and
    for many short sequences (causal, up to 64 tokens) in float32 up to twice as fast on two threads.

    The query heads of a KV head lie along the query axis, so keys are never repeated.
    """
    B, Tq, H, d = q.shape
    Tk, KV = k.shape[1], k.shape[2]
    groups = H // KV
    rows = q.view(B, Tq, KV, groups, d).permute(0, 2, 3, 1, 4).reshape(B * KV, groups * Tq, d)
    keys, values = (t.transpose(1, 2).reshape(B * KV, Tk, d) for t in (k, v))
    bias = None
    if causal:
        bias = q.new_full((Tq, Tk), float("-inf")).triu(1).repeat(groups, 1)[None]
    elif mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        bias = bias[:, None, None].expand(B, KV, groups, Tq, Tk).reshape(B * KV, groups * Tq, Tk)
    out = _Products.apply(rows, keys, values, bias, d**-0.5)
    return out.view(B, KV, groups, Tq, d).permute(0, 3, 1, 2, 4).reshape(B, Tq, H, d)


class _Products(torch.autograd.Function):
    """softmax(scale * rows @ keys^T + bias) @ values; the weights are kept for the backward.

    rows (N, R, d), keys and values (N, T, d), bias (N or 1, R, T) -> (N, R, d).
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        added, share = (rows.new_zeros(1, 1, 1), 0) if bias is None else (bias, 1)
        weights = torch.baddbmm(added, rows, keys.transpose(1, 2), beta=share, alpha=scale)
        weights = weights.softmax(-1)
        ctx.save_for_backward(rows, keys, values, weights)
        ctx.scale = scale
        return torch.bmm(weights, values)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, keys, values, weights = ctx.saved_tensors
        d_values = torch.bmm(weights.transpose(1, 2), grad)
        d_weights = torch.bmm(grad, values.transpose(1, 2))
        # d logits = weights * (d_weights - sum(d_weights * weights))
        d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_logits.mul_(ctx.scale)
        d_rows = torch.bmm(d_logits, keys)
        return d_rows, torch.bmm(d_logits.transpose(1, 2), rows), d_values, None, None


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries are the last Tq of the Tk positions; each sees everything up to itself."""
    Tq, Tk = q.shape[1], k.shape[1]
    if Tq == Tk:
        return attend(q, k, v, causal=Tq > 1)
    if Tq == 1:
        return attend(q, k, v)
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return attend(q, k, v, mask.expand(q.shape[0], Tq, Tk))


def attend_chunked(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Causal attention within absolute chunks; the keys begin at a chunk boundary.

    The first Tk - Tq keys come from the cache and, by the cache's rule, belong to the chunk of the
    first query (they are fewer than `chunk`).
    """
    B, Tq = q.shape[:2]
    cached = k.shape[1] - Tq
    pieces = []
    head = min(Tq, chunk - cached) if cached else 0
    if head:  # finish the chunk that the cache began
        pieces.append(attend_causal(q[:, :head], k[:, : cached + head], v[:, : cached + head]))
    whole = (Tq - head) // chunk
    if whole:
        a, b = head, head + whole * chunk
        fold = [
            t.reshape(B * whole, chunk, *t.shape[2:])
            for t in (q[:, a:b], k[:, cached + a : cached + b], v[:, cached + a : cached + b])
        ]
        pieces.append(attend_causal(*fold).reshape(B, whole * chunk, *q.shape[2:]))
    tail = head + whole * chunk
    if tail < Tq:
        pieces.append(attend_causal(q[:, tail:], k[:, cached + tail :], v[:, cached + tail :]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def attend_last(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """One query a row: q (B, 1, H, d), k and v (B, T, KV, d), seen (B, T) bool -> (B, 1, H, d).

    The query heads of a KV head lie along the query axis, so keys are never repeated.
    """
    B, _, H, d = q.shape
    rows = q.reshape(B, k.shape[2], -1, d)  # (B, KV, groups, d)
    mask = None if seen is None else seen[:, None, None, :]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(B, 1, H, d)


def attend_past(q: Tensor, past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> Tensor:
    """New tokens behind a past that all of them see: q (1, T, H, d), past (1, P, KV, d) twice.

    k and v (1, T, KV, d) are of the new tokens. Attention over each part is weighed by its share of
    the softmax's denominator (as FlashDecoding does), so memory is linear in P + T.
    """
    if q.device.type != "cpu":
        keys, values = (torch.cat(pair, 1) for pair in zip(past, (k, v), strict=True))
        return attend_causal(q, keys, values)
    T, H, d = q.shape[1:]
    KV = k.shape[2]
    heads = q.transpose(1, 2)  # (1, H, T, d)
    near, near_weight = _flash(heads, *(_repeat(t, H // KV) for t in (k, v)), causal=True)
    folded = q.view(1, T, KV, H // KV, d).permute(0, 2, 3, 1, 4).reshape(1, KV, -1, d)
    far, far_weight = _flash(folded, *(t.transpose(1, 2) for t in past), causal=False)
    far, far_weight = far.reshape(1, H, T, d), far_weight.reshape(1, H, T)
    share = torch.sigmoid(far_weight - near_weight)[..., None]
    out = near.to(share.dtype).lerp(far.to(share.dtype), share)  # at least float32
    return out.to(q.dtype).transpose(1, 2)


def _repeat(t: Tensor, groups: int) -> Tensor:
    return t.transpose(1, 2).repeat_interleave(groups, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(.., H, T, d) -> the same, and the log of the softmax's denominator (.., H, T)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
