"""The native products as torch custom ops, with shapes for tracing: torch.compile sees through them."""

import torch
from torch import Tensor

from herdling.kernels.cpu import dense


@torch.library.custom_op("herdling::linear_small", mutates_args=())
def linear_small(x: Tensor, weight: Tensor) -> Tensor:
    return dense.linear(x, weight)


@linear_small.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("herdling::swiglu_small", mutates_args=())
def swiglu_small(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return dense.swiglu(x, gate, up, down)


@swiglu_small.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("herdling::experts_small", mutates_args=())
def experts_small(
    x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return dense.experts(x, chosen, gates, gate_up, down)


@experts_small.register_fake
def _(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("herdling::rms_norm_small", mutates_args=())
def rms_norm_small(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return dense.rms_norm(x, gain, eps)


@rms_norm_small.register_fake
def _(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
