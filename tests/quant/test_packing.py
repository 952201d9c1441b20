"""Packed codes are a plain little-endian stream of bits."""

import numpy as np
import pytest
import torch

from herdling.quant.packing import WIDTHS, pack, packed_length, unpack


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [1, 3, 8, 31, 64])
def test_stream_of_bits(bits, length):
    codes = torch.randint(0, 2**bits, (5, length), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, packed_length(length, bits))
    for row, stream in zip(codes.numpy(), packed.numpy(), strict=True):
        plain = np.unpackbits(row[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1)
        assert np.array_equal(np.unpackbits(stream, bitorder="little")[: plain.size], plain)
    assert torch.equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_signed_codes_along_any_dimension(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 13, 6), dtype=torch.int8)
    for dim in range(3):
        packed = pack(codes, bits, dim)
        assert torch.equal(unpack(packed, bits, codes.shape[dim], dim, signed=True), codes)


def test_sizes_are_exact():
    assert [packed_length(64, b) for b in WIDTHS] == [16, 24, 32, 48, 64]
    assert [packed_length(5, b) for b in WIDTHS] == [2, 3, 3, 6, 5]
