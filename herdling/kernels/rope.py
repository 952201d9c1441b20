"""Rotary position embedding on interleaved pairs.

Dimensions (2i, 2i+1) of a head form pair i, as Meta and transformers store Llama 4 (no
half-rotation). A pair is a complex number on a CPU, where torch multiplies those in one pass over memory
(ten times faster); elsewhere, and where the model is compiled, arithmetic is real.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pair i of x (B, T, H, d) by an angle given as cos and sin, float32 (B or 1, T, d / 2).

    Computed in float32, returned in x's type.
    """
    return _Rotate.apply(x, cos[:, :, None], sin[:, :, None])


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation, so nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _apply(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _apply(grad, cos, -sin), None, None


def _apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, T, H, d / 2)
    out = torch.empty_like(x)
    pairs = out.unflatten(-1, (-1, 2))
    pairs[..., 0] = even * cos - odd * sin
    pairs[..., 1] = even * sin + odd * cos
    return out
