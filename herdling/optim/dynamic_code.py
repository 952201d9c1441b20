"""Eight bits a number for an optimizer's averages: a dynamic map and a scale for each block of 256.

The map (Dettmers et al., arXiv 2110.02861, section 2.3) spends its bits like a small float whose
exponent is coded in unary: seven decades, the finer the nearer to 1. Signed for the first average,
unsigned for the second. A block is divided by its largest magnitude, so one outlier costs 256 numbers
their precision and not the whole tensor.

Differs from bitsandbytes in one point: what is above 0 in the second average never becomes 0. A step
divides by its root, and a rare row whose gradient is 0 in this step would be divided by eps alone.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


@lru_cache(maxsize=8)
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, ascending, in [-1, 1] or [0, 1]: float32."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade + (0 if signed else 1))
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += [*middles, *(-m for m in middles)] if signed else middles
    return torch.tensor(sorted(values), dtype=torch.float64).float()


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """values (n,) float32 -> codes (n,) uint8 and scales (blocks,) float32, blocks = ceil(n / 256)."""
    blocks = _in_blocks(values)
    scales = blocks.abs().amax(1)
    scaled = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    table, middles = _tables(signed, values.device)
    flat = scaled.reshape(-1)
    # The upper 16 bits of a float32 say between which two middles it lies, or name the one inside.
    upper = (flat.view(torch.int32) >> 16) & 0xFFFF
    low = table.index_select(0, upper)
    codes = low + (flat > middles.index_select(0, low))
    return codes.to(torch.uint8)[: len(values)], scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """codes (n,) uint8, scales (blocks,) -> (n,) float32."""
    values = _map(signed, codes.device).index_select(0, codes.int())
    if len(values) % BLOCK == 0:
        return values.view(-1, BLOCK).mul_(scales[:, None]).view(-1)
    return values.mul_(scales.repeat_interleave(BLOCK)[: len(values)])


def _in_blocks(values: Tensor) -> Tensor:
    missing = -len(values) % BLOCK
    return (F.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


@lru_cache(maxsize=8)
def _map(signed: bool, device: torch.device) -> Tensor:
    return dynamic_map(signed).to(device)


@lru_cache(maxsize=8)
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each upper half of a float32 the smallest code it may get, and the middles between codes.

    No half spans two middles: the map's steps near 1 are 1.4 and 0.7 %, a half's at most 0.8 and 0.4 %.
    """
    levels = dynamic_map(signed)
    middles = (levels[:-1] + levels[1:]) / 2
    if not signed:
        middles[0] = 0.0
    halves = torch.arange(2**16, dtype=torch.int64)
    # Of a negative half the far end is the smaller number: the next half's, in magnitude.
    ends = halves + (halves >= 2**15).long()
    bits = torch.where(ends >= 2**15, (ends << 16) - 2**32, ends << 16)
    table = torch.bucketize(bits.to(torch.int32).view(torch.float32), middles)
    table = table.clamp(max=len(levels) - 1).int()
    return table.to(device), F.pad(middles, (0, 1), value=float("inf")).to(device)
