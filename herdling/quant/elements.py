"""What single codes stand for: integers, floats of 4 to 8 bits, a table of values.

    E2M1.snap(x)     # the nearest number the element has, as float32
    E2M1.encode(v)   # numbers it has -> bit patterns
    E2M1.decode(c)   # and back

All of it is exact: numbers are rounded once, to nearest, ties to even (or away from zero). What is
beyond the largest number becomes it. Formats of floats: OCP 8-bit (E4M3, E5M2) and OCP MX 1.0.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

Rounding = Literal["even", "away"]


class Element(Protocol):
    """A set of numbers with codes of `bits` bits."""

    @property
    def bits(self) -> int: ...
    @property
    def signed(self) -> bool:
        """Whether codes are int8 in two's complement; else uint8."""
        ...

    @property
    def top(self) -> float:
        """The largest number."""
        ...

    def snap(self, x: Tensor, rounding: Rounding = "even") -> Tensor:
        """float32 -> the nearest numbers of the element; may overwrite `x`. NaN stays."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Numbers of the element -> codes."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float32."""
        ...


def _round(x: Tensor, rounding: Rounding) -> Tensor:
    if rounding == "even":
        return x.round_()
    whole = x.abs().floor()
    # Not floor(|x| + 0.5): the sum itself would be rounded just below a half.
    return (whole + (x.abs() - whole >= 0.5)).copysign(x)


@dataclass(frozen=True)
class Integers:
    """low .. 2^(bits-1) - 1 times `unit`, codes in two's complement."""

    bits: int
    low: int
    unit: float = 1.0
    high: int | None = None
    signed: bool = True

    @property
    def top(self) -> float:
        return self._high * self.unit

    @property
    def _high(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.high is None else self.high

    def snap(self, x: Tensor, rounding: Rounding = "even") -> Tensor:
        if self.unit == 1:
            return _round(x, rounding).clamp_(self.low, self._high)
        return _round(x / self.unit, rounding).clamp_(self.low, self._high).mul_(self.unit)

    def encode(self, values: Tensor) -> Tensor:
        return (values if self.unit == 1 else values / self.unit).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float() if self.unit == 1 else codes.float().mul_(self.unit)


@dataclass(frozen=True)
class Floats:
    """Sign, `exponent` bits, `mantissa` bits, subnormals; specials only where `nan` or `inf` say so."""

    exponent: int
    mantissa: int
    top: float
    """Largest finite number."""
    nan: int | None = None
    """Its code, the sign aside."""
    inf: int | None = None
    signed: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def least(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        return int(torch.tensor(self.top).log2().floor())

    def snap(self, x: Tensor, rounding: Rounding = "even") -> Tensor:
        # The exponent bits alone are the power of two at or below |x|; steps are that over 2^mantissa.
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = power.clamp_(2.0**self.least, 2.0**self.emax).mul_(2.0**-self.mantissa)
        out = _round(x / step, rounding).mul_(step).clamp_(-self.top, self.top)
        if self.inf is not None:
            out = torch.where(x.isinf(), x, out)
        elif self.nan is not None:  # E4M3 has no infinity: it is no number either
            out = torch.where(x.isinf(), torch.nan, out)
        return out

    def encode(self, values: Tensor) -> Tensor:
        m, sizes = self.mantissa, values.abs()
        normal = (sizes.view(torch.int32) >> (23 - m)) - ((126 + self.least) << m)
        small = (sizes * 2.0 ** (m - self.least)).to(torch.int32)
        codes = torch.where(sizes < 2.0**self.least, small, normal)
        for special, where in ((self.nan, values.isnan), (self.inf, values.isinf)):
            if special is not None:
                codes = torch.where(where(), special, codes)
        return (codes | (values.signbit().int() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return _floats(self).to(codes.device)[codes.int()]


@lru_cache
def _floats(element: Floats) -> Tensor:
    """Every code's number."""
    m = element.mantissa
    codes = torch.arange(2**element.bits)
    exponent, mantissa = codes >> m & (2**element.exponent - 1), codes & (2**m - 1)
    size = torch.where(
        exponent == 0,
        mantissa.float() * 2.0 ** (element.least - m),
        (1 + mantissa.float() / 2**m) * 2.0 ** (exponent - 1 + element.least).float(),
    )
    magnitude = codes & (2 ** (element.bits - 1) - 1)
    if element.inf is not None:
        size[magnitude == element.inf] = torch.inf
        size[magnitude > element.inf] = torch.nan
    elif element.nan is not None:
        size[magnitude == element.nan] = torch.nan
    return torch.where(codes >> (element.bits - 1) == 1, -size, size)


@dataclass(frozen=True)
class Table:
    """Any ascending numbers; a code is the place of the nearest."""

    numbers: tuple[float, ...]
    bits: int
    signed: bool = False

    @property
    def top(self) -> float:
        return self.numbers[-1]

    def snap(self, x: Tensor, rounding: Rounding = "even") -> Tensor:
        return torch.where(x.isnan(), x, self.decode(self._nearest(x)))

    def encode(self, values: Tensor) -> Tensor:
        return self._nearest(values).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.numbers, device=codes.device)[codes.int()]

    def _nearest(self, x: Tensor) -> Tensor:
        numbers = torch.tensor(self.numbers, dtype=torch.float64)
        between = ((numbers[1:] + numbers[:-1]) / 2).float().to(x.device)
        return torch.bucketize(x.contiguous(), between)


E4M3 = Floats(4, 3, 448.0, nan=0x7F)
E5M2 = Floats(5, 2, 57344.0, nan=0x7F, inf=0x7C)
E2M3 = Floats(2, 3, 7.5)
E3M2 = Floats(3, 2, 28.0)
E2M1 = Floats(2, 1, 6.0)
MXINT8 = Integers(8, -127, 1 / 64)
"""-2 would have a code and no opposite; it is left unused, as OCP MX allows."""
TERNARY = Integers(2, -1, high=1)
# Quantiles of N(0, 1) with an exact zero (QLoRA, arXiv 2305.14314, appendix E).
NF4 = Table(
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    4,
)  # fmt: skip


def integers(bits: int) -> Integers:
    """All of two's complement."""
    return Integers(bits, -(2 ** (bits - 1)))
