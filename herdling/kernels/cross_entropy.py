"""Next-token losses straight from hidden states: the full logits tensor never exists.

Rows are taken in blocks whose logits fit `BLOCK_BYTES`; with a vocabulary of 202,048 words that is
some 160 rows at a time. `weighted_nll` computes the gradients in the same pass as the loss (three
matrix products in all, as many as the plain form needs); `log_probs` keeps nothing but the result
and computes the logits again in its backward.
"""

import torch
from torch import Tensor, nn

from herdling.kernels.grouped_matmul import autocast

BLOCK_BYTES = 128 * 2**20


def _blocks(rows: int, vocabulary: int) -> list[tuple[int, int]]:
    size = max(1, min(rows, BLOCK_BYTES // (4 * vocabulary)))
    return [(a, min(a + size, rows)) for a in range(0, rows, size)]


def weighted_nll(hidden: Tensor, lm_head: nn.Linear, labels: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights_i * -log p(labels_i): hidden (..., D), labels and weights (...) -> scalar fp32.

    Rows with weight 0 are skipped, so any label (also -100) may stand there. Weights are constants:
    no gradient reaches them.
    """
    hidden, head = autocast(hidden.reshape(-1, hidden.shape[-1]), lm_head.weight)
    weights = weights.detach().reshape(-1).float()
    keep = weights.nonzero().squeeze(1)
    return _WeightedNLL.apply(
        hidden.index_select(0, keep), head, labels.reshape(-1)[keep], weights[keep]
    )


def log_probs(hidden: Tensor, lm_head: nn.Linear, labels: Tensor) -> Tensor:
    """log p(labels) per position: hidden (..., D), labels (...) -> (...) fp32; -100 gives 0."""
    flat, head = autocast(hidden.reshape(-1, hidden.shape[-1]), lm_head.weight)
    targets = labels.reshape(-1)
    keep = (targets != -100).nonzero().squeeze(1)
    chosen = _LogProbs.apply(flat.index_select(0, keep), head, targets[keep])
    out = torch.zeros(targets.shape[0], dtype=torch.float32, device=hidden.device)
    return out.index_copy(0, keep, chosen).view(labels.shape)


class _Scratch:
    """One block's logits in float32, in storage used again by every block.

    Fresh pages for each block would cost more time than the arithmetic on them.
    """

    def __init__(self, hidden: Tensor, head: Tensor, blocks: list[tuple[int, int]]) -> None:
        self.hidden, self.head_t = hidden, head.t()
        rows = max((b - a for a, b in blocks), default=0)
        self.wide = hidden.new_empty(rows, head.shape[0], dtype=torch.float32)
        same = hidden.dtype == torch.float32
        self.low = self.wide if same else hidden.new_empty(rows, head.shape[0])

    def logits(self, a: int, b: int) -> Tensor:
        low, wide = self.low[: b - a], self.wide[: b - a]
        torch.mm(self.hidden[a:b], self.head_t, out=low)
        return low if low.dtype == torch.float32 else wide.copy_(low)

    def narrow(self, wide: Tensor) -> Tensor:
        """The block in the type of the matrix products."""
        low = self.low[: wide.shape[0]]
        return wide if low.dtype == torch.float32 else low.copy_(wide)


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = None
        blocks = _blocks(hidden.shape[0], head.shape[0])
        scratch = _Scratch(hidden, head, blocks)
        for a, b in blocks:
            logits = scratch.logits(a, b)
            at, weight = labels[a:b, None], weights[a:b, None]
            peak = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, at) - peak
            z = logits.sub_(peak).exp_().sum(-1, keepdim=True)
            total += ((z.log() - chosen) * weight).sum()
            if not (need_hidden or need_head):
                continue
            # d loss / d logits = weight * (softmax - one-hot)
            d_logits = scratch.narrow(logits.mul_(weight / z).scatter_add_(1, at, -weight))
            if d_hidden is not None:
                torch.mm(d_logits, head, out=d_hidden[a:b])
            if need_head and d_head is None:
                d_head = torch.mm(d_logits.t(), hidden[a:b])
            elif d_head is not None:
                # In the type of the products, as gradient accumulation is: a float32 sum of bf16
                # blocks costs more in fresh pages than it wins in digits.
                torch.addmm(d_head, d_logits.t(), hidden[a:b], out=d_head)
        if need_head and d_head is None:
            d_head = torch.zeros_like(head)
        ctx.gradients = d_hidden, d_head
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_head = ctx.gradients
        del ctx.gradients
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in (d_hidden, d_head)]
        return scaled[0], scaled[1], None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for a, b in _blocks(hidden.shape[0], head.shape[0]):
            logits = (hidden[a:b] @ head.t()).float()
            out[a:b] = logits.gather(1, labels[a:b, None]).squeeze(1) - logits.logsumexp(-1)
        ctx.save_for_backward(hidden, head, labels)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, head, labels = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        for a, b in _blocks(hidden.shape[0], head.shape[0]):
            # d log p / d logits = one-hot - softmax
            d_logits = (hidden[a:b] @ head.t()).float().softmax(-1).mul_(-grad[a:b, None])
            d_logits.scatter_add_(1, labels[a:b, None], grad[a:b, None])
            d_logits = d_logits.to(head.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, head, out=d_hidden[a:b])
            if d_head is not None:
                d_head += d_logits.t() @ hidden[a:b]
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None
