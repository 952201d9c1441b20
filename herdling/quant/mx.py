"""Scales of OCP MX 1.0: a power of two for each block of 32, stored as its exponent (E8M0).

    scales(most, E2M1, "floor")     # most: largest magnitude of each block

Modes, from the largest magnitude a of a block and the element's largest number t = m * 2^emax:
`floor` (OCP): floor(log2 a) - emax; `ceil`: ceil(log2 a) - emax; `even`: as floor after a was rounded
to the element's mantissa; `rceil`: the least s with a <= t * 2^s (arXiv 2506.08027, exact here where
others take a float logarithm). A block of zeros has exponent -127, one with inf or NaN the scale NaN.
"""

from typing import Literal

import torch
from torch import Tensor

from herdling.quant.elements import Floats, Integers

BLOCK = 32
Mode = Literal["floor", "ceil", "even", "rceil"]
E8M0 = torch.float8_e8m0fnu


def scales(most: Tensor, element: Floats | Integers, mode: Mode) -> Tensor:
    """most (..) float32, not negative -> scales (..) of type E8M0."""
    emax, mantissa = (element.emax, element.mantissa) if isinstance(element, Floats) else (0, 6)
    part, exponent = torch.frexp(most)
    if mode == "even":  # the last half step below a power of two goes up to it
        exponent = exponent + (part >= 1 - 2.0 ** -(mantissa + 2))
    exponent = exponent - 1 - emax  # most = 2 * part * 2^(exponent + emax), 1 <= 2 * part < 2
    if mode == "ceil":
        exponent = exponent + (part > 0.5)
    elif mode == "rceil":
        exponent = exponent + (2 * part > element.top / 2.0**emax)
    code = (exponent + 127).clamp_(0, 254)
    code = torch.where(most == 0, 0, code)
    return torch.where(most.isfinite(), code, 255).to(torch.uint8).view(E8M0)


def powers(scales: Tensor) -> Tensor:
    """E8M0 -> float32, exact down to 2^-127 (a subnormal float); code 255 is NaN."""
    codes = scales.view(torch.uint8).to(torch.int32)
    bits = torch.where(codes == 0, 1 << 22, codes << 23)
    return torch.where(codes == 255, 0x7FC00000, bits).view(torch.float32)
