"""python -m pytest tests/optim/test_adamw_8bit.py"""

import math

import pytest
import torch
from torch import nn

from herdling.errors import ConfigError
from herdling.optim import adamw
from herdling.optim.adamw import AdamWConfig
from herdling.optim.adamw_8bit import SMALL, AdamW8bit, state_bytes
from herdling.optim.dynamic_code import BLOCK, decode, dynamic_map, encode


def test_the_map_is_the_published_one():
    """Seven decades, 2^i (signed) or 2^(i+1) middles of equal parts of 0.1..1 in decade i, 0 and 1."""
    for signed in (True, False):
        levels = dynamic_map(signed).double()
        assert len(levels) == 256
        assert (levels[1:] > levels[:-1]).all()
        assert levels[-1] == 1.0
        assert 0.0 in levels
        for decade in range(7):
            count = 2**decade if signed else 2 ** (decade + 1)
            low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
            inside = levels[(levels > low) & (levels < high)]
            width = (high - low) / count
            want = torch.tensor([low + (i + 0.5) * width for i in range(count)], dtype=torch.double)
            torch.testing.assert_close(inside, want, rtol=1e-6, atol=0)
        if signed:
            torch.testing.assert_close(levels[:127], -levels[128:255].flip(0), rtol=0, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_gets_the_nearest_code(signed):
    """Against a search in float64: random numbers over ten decades, every level, every middle's sides."""
    levels = dynamic_map(signed)
    g = torch.Generator().manual_seed(1)
    spread = 10.0 ** (-10 * torch.rand(20_000, generator=g))
    middles = (levels[:-1] + levels[1:]) / 2
    sides = [torch.nextafter(middles, torch.tensor(x)) for x in (-2.0, 2.0)]
    parts = torch.cat([spread, levels, *sides])
    values = torch.cat([parts, -parts]) if signed else parts.abs()
    count = len(values) // (BLOCK - 1) * (BLOCK - 1)
    # A 1 in each block, so that its scale is 1.
    blocks = torch.cat([torch.ones(count // (BLOCK - 1), 1), values[:count].view(-1, BLOCK - 1)], 1)
    codes, scales = encode(blocks.view(-1), signed)
    assert (scales == 1).all()
    flat, wide = blocks.view(-1).double(), levels.double()
    distances = torch.cat([(part[:, None] - wide).abs() for part in flat.split(4096)])
    best, nearest = distances.min(1)
    if not signed:  # what is above 0 never becomes 0
        raised = (flat > 0) & (nearest == 0)
        assert raised.any()
        assert (codes[raised] == 1).all()
        codes, best, flat = codes[~raised], best[~raised], flat[~raised]
    error = (flat - wide[codes.long()]).abs()
    assert (error <= best + 1e-7 * flat.abs()).all()  # middles are rounded to float32


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_blocks_have_their_own_scales(n):
    values = torch.randn(n) * 10.0 ** torch.arange(n).div(BLOCK, rounding_mode="floor").sub(5)
    codes, scales = encode(values, True)
    assert codes.shape == (n,)
    assert scales.shape == (math.ceil(n / BLOCK),)
    back = decode(codes, scales, True)
    for i, scale in enumerate(scales):
        block = slice(i * BLOCK, (i + 1) * BLOCK)
        assert scale == values[block].abs().max()
        # Half the widest step of the map, 0.9 / 64 / 2.
        assert (back[block] - values[block]).abs().max() <= scale * 0.0071
    zeros, none = encode(torch.zeros(n), True)
    assert not decode(zeros, none, True).any()


class Reference:
    """The update in float64 with averages coded by search, for one parameter."""

    def __init__(self, weight, lr, betas, eps, decay):
        self.w = weight.double().reshape(weight.shape[0] if weight.dim() == 3 else 1, -1)
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.lr, self.betas, self.eps, self.decay, self.t = lr, betas, eps, decay, 0

    def step(self, gradient):
        g, (b1, b2) = gradient.double().reshape(self.w.shape), self.betas
        self.t += 1
        m, v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        self.w *= 1 - self.lr * self.decay
        self.w -= self.lr * (m / (1 - b1**self.t)) / ((v / (1 - b2**self.t)).sqrt() + self.eps)
        self.m, self.v = self.rounded(m, True), self.rounded(v, False)

    @staticmethod
    def rounded(rows, signed):
        levels, out = dynamic_map(signed).double(), torch.empty_like(rows)
        for row, result in zip(rows, out, strict=True):
            for a in range(0, len(row), BLOCK):
                block = row[a : a + BLOCK]
                scaled = block / block.abs().max().clamp(min=1e-300)
                nearest = (scaled[:, None] - levels).abs().argmin(1)
                if not signed:
                    nearest = torch.where(scaled > 0, nearest.clamp(min=1), nearest)
                result[a : a + BLOCK] = levels[nearest] * block.abs().max()
        return out


@pytest.mark.parametrize("shape", [(64, 80), (3, 40, 50), (1, 4099)])
def test_steps_are_the_formula(shape):
    """20 steps against float64; a coin toss between two codes may fall otherwise now and then."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    settings = (1e-2, (0.9, 0.95), 1e-8, 0.1)
    reference = Reference(parameter.detach().clone(), *settings)
    optimizer = AdamW8bit([parameter], *settings)
    direction = torch.randn(shape)
    for _ in range(20):
        parameter.grad = direction + torch.randn(shape)
        reference.step(parameter.grad)
        optimizer.step()
    difference = (parameter.detach().double().view(reference.w.shape) - reference.w).abs()
    assert difference.max() < 2e-3  # 20 steps of 1e-2
    assert difference.mean() < 2e-6
    assert optimizer.state[parameter]["exp_avg_code"].dtype == torch.uint8


def test_small_tensors_are_torchs_adamw_exactly():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(SMALL - 1)) for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    a, b = AdamW8bit([ours], **settings), torch.optim.AdamW([theirs], foreach=False, **settings)
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_byte_a_parameter_each():
    model = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 300))
    optimizer = adamw.build(model, AdamWConfig(state_bits=8))
    model(torch.randn(4, 256)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) / sum(p.numel() for p in model.parameters()) <= 2.1
    plain = adamw.build(model, AdamWConfig())
    plain.step()
    assert state_bytes(plain) / sum(p.numel() for p in model.parameters()) >= 8


def test_a_rare_row_is_not_thrown_far():
    """A row that gets small gradients and then none, in a block with large ones (an embedding's)."""
    table = nn.Parameter(torch.zeros(64, 128))
    optimizer = AdamW8bit([table], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(8):
        table.grad = torch.zeros_like(table)
        table.grad[0] = 1.0
        if step < 2:
            table.grad[1] = 1e-4  # its square is 1e-8 of the block's largest: below the map
        optimizer.step()
    assert table.detach().abs().max() <= 8.5e-3


def test_it_has_one_implementation():
    with pytest.raises(ConfigError, match="state_bits is 8 and implementation fused"):
        AdamWConfig(state_bits=8, implementation="fused")
