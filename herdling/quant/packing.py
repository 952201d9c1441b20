"""Small codes as a dense stream of bits, and back.

The stream is little-endian along one dimension: code i of width b starts at bit b * i. So two 4-bit
codes share a byte with the even one low, eight 3-bit or four 6-bit codes fill three bytes. Signed
codes below 8 bits are stored with 2^(b-1) added, as compressed-tensors stores them.
"""

from math import lcm

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 6, 8)


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes take: whole units of the fewest codes that fill whole bytes."""
    unit = lcm(bits, 8) // bits
    return -(-length // unit) * unit * bits // 8


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """uint8 or int8 codes (.., n, ..) -> uint8 (.., packed_length(n, bits), ..)."""
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    if codes.dtype == torch.int8:
        codes = codes + 2 ** (bits - 1)
    unit = lcm(bits, 8) // bits
    rows = codes.movedim(dim, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % unit)).unflatten(-1, (-1, unit))
    words = torch.zeros(rows.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(unit):
        words |= rows[..., i].to(torch.int32) << (bits * i)
    parts = [(words >> (8 * j) & 255).to(torch.uint8) for j in range(unit * bits // 8)]
    return torch.stack(parts, -1).flatten(-2).movedim(-1, dim).contiguous()


def unpack(packed: Tensor, bits: int, length: int, dim: int = -1, signed: bool = False) -> Tensor:
    """The codes of `pack`, `length` along `dim`: uint8, or int8 if `signed`."""
    if bits == 8:
        return packed.view(torch.int8) if signed else packed
    unit = lcm(bits, 8) // bits
    rows = packed.movedim(dim, -1).unflatten(-1, (-1, unit * bits // 8))
    out = torch.empty(*rows.shape[:-1], unit, dtype=torch.uint8, device=packed.device)
    if bits in (2, 4):  # a unit is a byte
        for i in range(unit):
            torch.bitwise_and(rows[..., 0] >> (bits * i), 2**bits - 1, out=out[..., i])
    else:
        words = torch.zeros(rows.shape[:-1], dtype=torch.int32, device=packed.device)
        for j in range(rows.shape[-1]):
            words |= rows[..., j].to(torch.int32) << (8 * j)
        for i in range(unit):
            out[..., i] = words >> (bits * i) & (2**bits - 1)
    codes = out.flatten(-2)[..., :length].movedim(-1, dim)
    return (codes.to(torch.int8) - 2 ** (bits - 1) if signed else codes).contiguous()
