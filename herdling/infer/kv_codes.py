"""Keys and values as small integers: rounding, packing, and back.

    codes, scale = by_token(v, bits=4)          # one scale for each group of a token's channels
    codes, scale, low = by_channel(k, bits=4)   # one scale and offset for each channel of a page

Values differ from token to token, keys without position encoding from channel to channel: so these
two (KIVI, arXiv 2402.02750). Scales are rounded to float16 first and the codes made for the rounded
ones, so an error is at most half a step, plus what float16 loses at the end of the range (a 1000th
of it). int4 codes of channels i and i + d/2 share a byte.

Shape letters: n tokens, P pages, t tokens of a page, KV key-value heads, d head width, G groups.
"""

import torch
from torch import Tensor

GROUP = 64
"""Most channels of a token that share a scale."""
BITS = (4, 8)
_LARGEST = torch.finfo(torch.float16).max


def group_of(d: int) -> int:
    """Channels that share a scale: the largest divisor of d up to GROUP."""
    return next(g for g in range(min(d, GROUP), 0, -1) if d % g == 0)


def by_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x (n, KV, d) -> codes (n, KV, d * bits / 8) uint8, scale (n, KV, G) float16; 0 stays 0."""
    top = 2 ** (bits - 1) - 1
    groups = x.float().unflatten(-1, (-1, group_of(x.shape[-1])))
    scale = (groups.abs().amax(-1) / top).clamp(max=_LARGEST).half()
    steps = (groups / _positive(scale)[..., None]).round_().clamp_(-top, top)
    return _pack(steps.flatten(-2) + (top + 1), bits), scale


def from_token(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers that `by_token` codes stand for: (n, KV, d) of `dtype`."""
    steps = _unpack(codes, bits).sub_(2 ** (bits - 1)).unflatten(-1, (scale.shape[-1], -1))
    return steps.mul_(scale.float()[..., None]).flatten(-2).to(dtype)


def by_channel(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (P, t, KV, d) -> codes (P, t, KV, d * bits / 8) uint8, scale and low (P, KV, d) float16."""
    top = 2**bits - 1
    x = x.float()
    low = x.amin(1).clamp(-_LARGEST, _LARGEST).half()
    scale = ((x.amax(1) - low.float()) / top).clamp(0, _LARGEST).half()
    steps = (x - low.float()[:, None]) / _positive(scale)[:, None]
    return _pack(steps.round_().clamp_(0, top), bits), scale, low


def from_channel(
    codes: Tensor, scale: Tensor, low: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """The numbers that `by_channel` codes stand for: (P, t, KV, d) of `dtype`."""
    steps = _unpack(codes, bits)
    return steps.mul_(scale.float()[:, None]).add_(low.float()[:, None]).to(dtype)


def _positive(scale: Tensor) -> Tensor:
    """A group of zeros, or of numbers too small for float16, has scale 0: any divisor will do."""
    return scale.float().masked_fill(scale == 0, 1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def _unpack(codes: Tensor, bits: int) -> Tensor:
    """(.., d * bits / 8) uint8 -> (.., d) float32."""
    if bits == 8:
        return codes.float()
    out = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], device=codes.device)
    low, high = out.chunk(2, -1)
    low.copy_(codes & 15)
    high.copy_(codes >> 4)
    return out
