"""Every code of every element, and rounding, against ml_dtypes and numbers listed one by one."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from herdling.quant import elements
from herdling.quant.elements import E2M1, E2M3, E3M2, E4M3, E5M2, MXINT8, NF4, TERNARY

FLOATS = {
    "E4M3": (E4M3, ml_dtypes.float8_e4m3fn),
    "E5M2": (E5M2, ml_dtypes.float8_e5m2),
    "E2M3": (E2M3, ml_dtypes.float6_e2m3fn),
    "E3M2": (E3M2, ml_dtypes.float6_e3m2fn),
    "E2M1": (E2M1, ml_dtypes.float4_e2m1fn),
}
INTEGERS = {
    "int8": elements.integers(8),
    "int4": elements.integers(4),
    "int3": elements.integers(3),
    "int2": elements.integers(2),
    "mxint8": MXINT8,
    "ternary": TERNARY,
}


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_means_what_ml_dtypes_says_and_comes_back(name):
    element, dtype = FLOATS[name]
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    numbers = element.decode(codes)
    theirs = torch.from_numpy(codes.numpy().view(dtype).astype(np.float32))
    torch.testing.assert_close(numbers, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(numbers.signbit()[numbers == 0], theirs.signbit()[theirs == 0])
    known = ~numbers.isnan()
    assert torch.equal(element.encode(element.snap(numbers.clone()))[known], codes[known])
    assert element.decode(element.encode(numbers[~known])).isnan().all()


def edges(element) -> torch.Tensor:
    """Numbers, midpoints, their float neighbours, ties of bf16, and a wide spread."""
    numbers = element.decode(torch.arange(2 ** (element.bits - 1), dtype=torch.uint8))
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles])
    near = [torch.nextafter(exact, torch.full_like(exact, to)) for to in (0.0, torch.inf)]
    spread = torch.randn(20000) * torch.exp2(torch.randint(-20, 8, (20000,)).float())
    tiny = torch.tensor([1e-45, 1e-38, 2.0**-127, 2.0**-16])
    x = torch.cat([exact, *near, spread, spread.bfloat16().float(), tiny])
    return torch.cat([x, -x])


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_that_of_ml_dtypes(name):
    element, dtype = FLOATS[name]
    x = edges(element).clamp(-element.top, element.top)
    theirs = torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))
    assert torch.equal(element.snap(x.clone()), theirs)


def test_half_away_from_zero():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 0.24999999, 4.9999995])
    assert E2M1.snap(x.clone(), "even").tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -4, 0, 4]
    assert E2M1.snap(x.clone(), "away").tolist() == [0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -6, 0, 4]
    below = torch.tensor([0.49999997, 0.5, -0.5, 2.5])  # the first plus a half would be 1
    assert elements.integers(4).snap(below.clone(), "away").tolist() == [0, 1, -1, 3]


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_too_large_becomes_the_largest(name):
    element, _ = FLOATS[name]
    x = torch.tensor([element.top * 1.2, -element.top * 64, 3e38])
    assert element.snap(x).tolist() == [element.top, -element.top, element.top]


def test_infinity_never_becomes_a_number():
    """torch's own cast makes 448 of it in E4M3."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert x.to(torch.float8_e4m3fn).float()[0] == 448  # the trap
    assert E4M3.decode(E4M3.encode(E4M3.snap(x))).isnan().all()
    back = E5M2.decode(E5M2.encode(E5M2.snap(x)))
    assert back[:2].tolist() == [torch.inf, -torch.inf]
    assert back[2].isnan()


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name):
    element = INTEGERS[name]
    low, high = element.low, round(element.top / element.unit)
    assert (low, high) == {
        "int8": (-128, 127), "int4": (-8, 7), "int3": (-4, 3), "int2": (-2, 1),
        "mxint8": (-127, 127), "ternary": (-1, 1),
    }[name]  # fmt: skip
    numbers = torch.arange(low, high + 1).float() * element.unit
    codes = element.encode(element.snap(numbers.clone()))
    assert codes.tolist() == list(range(low, high + 1))
    assert torch.equal(element.decode(codes), numbers)
    x = torch.randn(5000) * high * element.unit
    expected = [min(max(round(v / element.unit), low), high) * element.unit for v in x.tolist()]
    assert element.snap(x.clone()).tolist() == expected


def test_nf4_is_the_nearest_of_its_numbers():
    x = torch.rand(4000) * 2.4 - 1.2
    numbers = NF4.numbers
    expected = [min(range(16), key=lambda i: abs(numbers[i] - v)) for v in x.tolist()]
    codes = NF4.encode(NF4.snap(x.clone()))
    assert codes.tolist() == expected
    # The construction of QLoRA's appendix E: quantiles of a normal, 8 positive and 7 negative.
    normal = torch.distributions.Normal(0.0, 1.0)
    edge = (1 - 1 / 30 + 1 - 1 / 32) / 2
    positive = normal.icdf(torch.linspace(edge, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(edge, 0.5, 8)[:-1])
    made = torch.cat([negative, torch.zeros(1), positive.flip(0)]) / positive.max()
    torch.testing.assert_close(torch.tensor(numbers), made, atol=2e-3, rtol=0)


def test_emax():
    assert [e.emax for e in (E4M3, E5M2, E2M3, E3M2, E2M1)] == [8, 15, 2, 4, 2]
    assert all(math.log2(e.top) < e.emax + 1 for e, _ in FLOATS.values())
