"""FP8 products on a GPU's own units, through torch's `_scaled_mm`.

Kept apart because nothing here runs on a CPU: there `low_precision.product` emulates the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.quant.elements import E4M3
from herdling.quant.formats import Format


def scaled_product(a: Tensor, b: Tensor, of_a: Format, of_b: Format) -> Tensor:
    """a (M, K) times b (N, K) transposed -> (M, N) in a's type; K and N in steps of 16."""
    a8, scale_a = cast(a, of_a)
    b8, scale_b = cast(b, of_b)
    M, N = a8.shape[0], b8.shape[0]
    # The units take dimensions of whole 16: zeros add nothing.
    pad_k, pad_n = -a8.shape[1] % 16, -N % 16
    if pad_k or pad_n:
        a8, b8 = _padded(a8, 0, pad_k), _padded(b8, pad_n, pad_k)
        scale_b = F.pad(scale_b, (0, 0, 0, pad_n), value=1.0) if of_b.per == "row" else scale_b
    out = torch._scaled_mm(
        a8, b8.t(), scale_a, scale_b.t() if of_b.per == "row" else scale_b,
        out_dtype=torch.bfloat16, use_fast_accum=False,
    )  # fmt: skip
    return out[:M, :N].to(a.dtype)


def cast(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """x (R, K) -> float8 (R, K), contiguous, and its scales: () or (R, 1), powers of two, rounded up."""
    kind = torch.float8_e4m3fn if form.element == E4M3 else torch.float8_e5m2
    wide = x.float()
    most = wide.abs().amax(1, keepdim=True) if form.per == "row" else wide.abs().amax()
    part, exponent = torch.frexp(most / form.divisor)
    scale = torch.ldexp(torch.ones_like(most), exponent - (part == 0.5).int())
    scale = torch.where(most == 0, 1.0, torch.where(most.isfinite(), scale, torch.nan))
    return (wide / scale).to(kind).contiguous(), scale


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    bits = F.pad(x.view(torch.uint8), (0, columns, 0, rows))
    return bits.view(x.dtype)
