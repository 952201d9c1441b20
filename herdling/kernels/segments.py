"""Attention over packed rows as what they are: many short sequences.

A mask over a row of T tokens costs T * T whatever it hides, and rows of training data hold documents of
some dozens of tokens. So the runs of tokens that see one another are taken out of their rows, sorted
into batches of about equal length, attended to without a mask, and put back: the cost follows the
documents, not the rows. A local layer's runs end at chunk boundaries too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herdling.kernels.attention import attend, attend_bmm

SHORT = 64
"""Tokens up to which plain products beat torch's fused attention on two threads."""


@dataclass(frozen=True)
class Segments:
    """Where the tokens of B rows of T go, and where they come back from."""

    batches: Sequence[tuple[int, int]]
    """(sequences, tokens of each) of the batches that follow one another in packed order."""
    source: Tensor
    """(M,) int64: of each packed place its token among B * T; any token where a sequence is shorter."""
    place: Tensor
    """(B * T,) int64: of each token its packed place."""


def find_segments(positions: Tensor, documents: Tensor, chunk: int | None) -> Segments | None:
    """Runs of equal document (and chunk) in positions and documents (B, T), both on the CPU.

    None where a document is no run of consecutive positions, so that only a mask can say who sees whom.
    """
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = (documents.diff(dim=1) != 0) | (positions.diff(dim=1) != 1)
    rows = torch.arange(len(documents))[:, None].expand_as(documents)
    owners = torch.stack((rows[first], documents[first]))
    if owners.shape[1] != owners.unique(dim=1).shape[1]:
        return None
    if chunk is not None:
        first |= positions % chunk == 0
    starts = first.flatten().nonzero()[:, 0]
    sizes = torch.diff(starts, append=starts.new_tensor([documents.numel()]))
    order = sizes.argsort(stable=True)
    batches, source = [], []
    place = torch.empty(documents.numel(), dtype=torch.int64)
    filled = 0
    # Lengths up to a power of two share a batch, which is as long as its longest.
    for group in _by_power(sizes[order].tolist()):
        own = order[group]
        begin, size = starts[own, None], sizes[own, None]
        length = int(size.max())
        at = torch.arange(length)
        tokens = begin + torch.minimum(at, size - 1)  # (n, length)
        packed = filled + torch.arange(tokens.numel()).view_as(tokens)
        real = at < size
        place[tokens[real]] = packed[real]
        batches.append((len(own), length))
        source.append(tokens.flatten())
        filled += tokens.numel()
    return Segments(batches, torch.cat(source), place)


def _by_power(sizes: Sequence[int]) -> list[slice]:
    """Slices of ascending sizes, each within (2^(n-1), 2^n]; up to 16 are one."""
    classes = [max(15, size - 1).bit_length() for size in sizes]
    cuts = [i for i in range(1, len(sizes)) if classes[i] != classes[i - 1]]
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(sizes)], strict=True)]


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention within each segment: q (B, T, H, d), k and v (B, T, KV, d) -> (B, T, H, d)."""
    packed = [_Pack.apply(t.flatten(0, 1), segments) for t in (q, k, v)]
    out, start = [], 0
    for n, length in segments.batches:
        end = start + n * length
        one, two, three = (t[start:end].unflatten(0, (n, length)) for t in packed)
        if length <= SHORT:
            result = attend_bmm(one, two, three, None, causal=True)
        else:
            result = attend(one, two, three, causal=True)
        out.append(result.flatten(0, 1))
        start = end
    return _Unpack.apply(torch.cat(out), segments).view_as(q)


class _Pack(torch.autograd.Function):
    """(B * T, ..) -> (M, ..). Where a sequence is shorter than its batch, copies of a token stand, which
    no earlier token sees and whose own results are thrown away: their gradients are zero."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return x.index_select(0, segments.source)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.index_select(0, ctx.segments.place), None


class _Unpack(torch.autograd.Function):
    """(M, ..) -> (B * T, ..)."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return x.index_select(0, segments.place)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        packed = grad.new_zeros(len(ctx.segments.source), *grad.shape[1:])
        return packed.index_copy_(0, ctx.segments.place, grad), None
