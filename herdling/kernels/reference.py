"""Plain forms of the operations, written to be read. Tests hold the fast forms against these."""

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_dense(
    x: Tensor, chosen: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Routed experts by the formula: every expert sees every token, unchosen ones with score 0.

    x (N, D); chosen (N, k) expert ids; scores (N, k); gate_up (E, D, 2F); down (E, F, D) -> (N, D).
    SwiGLU without biases maps 0 to 0, so an expert that was not chosen adds nothing. The score
    multiplies the expert's *input*. Source: Meta `llama4/moe.py`, spec section 1.4.
    """
    N, E = x.shape[0], gate_up.shape[0]
    weight = torch.zeros(N, E, dtype=x.dtype, device=x.device).scatter(
        1, chosen, scores.to(x.dtype)
    )
    inputs = weight.t()[:, :, None] * x[None]  # (E, N, D)
    gate, up = torch.bmm(inputs, gate_up).chunk(2, -1)
    return torch.bmm(F.silu(gate) * up, down).sum(0)


def visible(
    positions: Tensor, documents: Tensor, keys: Tensor, key_documents: Tensor, chunk: int | None
) -> Tensor:
    """Who sees whom: (B, Tq, Tk) bool from positions and document ids, nothing else.

    A query sees a key of its own document that is not later and, where `chunk` is given, in the
    same absolute chunk (`position // chunk`), as in Meta `create_chunked_attention_mask`.
    """
    q, k = positions[:, :, None], keys[:, None, :]
    mask = (documents[:, :, None] == key_documents[:, None, :]) & (k <= q)
    return mask if chunk is None else mask & (q // chunk == k // chunk)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention in float32: q (B, Tq, H, d), k and v (B, Tk, KV, d), mask (B, Tq, Tk)."""
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, 2).float() for t in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of next-token losses with all logits at once: hidden (N, D), head (V, D)."""
    losses = F.cross_entropy((hidden @ head.t()).float(), labels, reduction="none")
    return (losses * weights).sum()
